"""Pixels in, logits and masks out: normalisation, compiled networks, stitching, and the race between backends.

It knows slides as readers of pixels only. It must not know journals, outputs or where blocks are computed.
"""
