"""Process arrays in fused kernels: gather, stitch, flat, instances, stardist, moments, quality, outline.

A kernel with several forms has a plain reference that defines its meaning.  It must not know slides, models or files.
"""
