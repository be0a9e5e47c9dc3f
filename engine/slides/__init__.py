"""Images in, labels out: discovery, the registry of image formats, one reader for all of them, the OME-Zarr writer.

It must not know models, tiles or the journal of a run (a conversion keeps a journal of its own).
"""
