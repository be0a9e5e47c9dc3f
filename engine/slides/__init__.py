"""Read images and write labels: discovery, the registry of image formats, one reader for all, the OME-Zarr writer.

This folder must not know models, tiles or the journal of a run (a conversion keeps a journal of its own).
"""
