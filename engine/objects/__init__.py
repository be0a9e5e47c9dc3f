"""Make instances and their table: numbered seeds, the merge over blocks, moments, and `objects.parquet`.

This folder knows boxes and arrays. It must not know models, images or runs.
"""
