"""Pixels in, logits and masks out: normalisation, compiled networks, stitching, and the race between backends.

It knows slides only as readers of pixels. It must not know journals, outputs or the workers that compute blocks.
"""
