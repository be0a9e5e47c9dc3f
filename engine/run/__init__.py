"""One campaign, one slide, one block: what is done with each image, from its plan to its closing record.

`pipeline.segment_block` is the path of the data. It must not print, and it knows neither terminals nor commands.
"""
