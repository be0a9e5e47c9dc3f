"""Carry out campaigns: everything that is done with an image, from its plan to its closing record.

`pipeline.segment_block` is the path of the data.  This folder must not print, and knows neither terminals nor commands.
"""
