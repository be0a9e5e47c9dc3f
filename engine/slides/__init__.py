"""Images in, labels out: discovery, one reader for every format, and the OME-Zarr writer.

It must not know models, tiles or the journal of a run (a conversion keeps a journal of its own).
"""
