"""Make instances and their table: seeds or stars, their merge over blocks, moments, and `objects.parquet`.

This folder knows boxes and arrays. It must not know models, images or runs.
"""
