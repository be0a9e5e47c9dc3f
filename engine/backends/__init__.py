"""Backends: each turns a bundle into a function from a batch of pixels to logits on one device.

A backend must know its library, precisions and shapes; it must not know slides, tiles, thresholds or files.
"""
