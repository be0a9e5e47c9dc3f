"""Gather the kernels that write codes of pixels from logits, for tensors on a GPU; they need triton."""

from cellseg_batch.kernels.classes_torch import write_classes
from cellseg_batch.kernels.hover_torch import classify_maps
from cellseg_batch.kernels.instances_triton import classify_foreground, classify_pixels

__all__ = ["classify_foreground", "classify_maps", "classify_pixels", "write_classes"]
