"""What is said about images and runs: before (`info`, `plan`, `doctor`), during (`status`) and after
(`verify`, `report`, `preview`, plate summaries, exported tables).

It reads what a run has written and must not change pixels. It returns values and files, and prints nothing.
"""
