"""Reports on images, models and runs: before a run (`info`, `plan`, `doctor`, `import_model`, `check_model`), during it
(`status`) and after it (`verify`, `report`, `preview`, plate summaries, exported tables).

This folder reads the output of runs and must not change pixels. It returns values and files, and prints nothing.
"""
