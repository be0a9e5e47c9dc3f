"""Reproducible measurements of this machine, with their conditions, and the comparison of two of them."""
