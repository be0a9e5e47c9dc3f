"""Keep files that are whole or absent: paths and object stores, atomic writes, journal, lock, cache, checksums.

It must not know what the files mean.
"""
