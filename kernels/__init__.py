"""Fused array kernels: gather (cut, reflect, normalise) and stitch (crop, threshold).

Every kernel has a plain reference that defines its meaning.  Nothing here knows slides, models or files.
"""
