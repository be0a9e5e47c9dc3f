"""Gather the kernels that write codes of pixels from logits, for host arrays."""

from cellseg_batch.kernels.classes import write_classes
from cellseg_batch.kernels.hover import classify_maps
from cellseg_batch.kernels.instances import classify_foreground, classify_pixels

__all__ = ["classify_foreground", "classify_maps", "classify_pixels", "write_classes"]
