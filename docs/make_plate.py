"""Write plate.zarr: four wells of two fields each, cut from the images of ``cellseg-batch demo slides.zarr``."""

import zarr

# Well -> demo image, and the row of the image that its fields are cut from.
WELLS = {
    "A/1": ("fluorescence_small", 0),
    "A/2": ("fluorescence_small", 256),
    "B/1": ("fluorescence_large", 0),
    "B/2": ("fluorescence_large", 512),
}
FIELDS = ("0", "1")
SIDE = 256
AXES = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
DATASET = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1]}]}
IMAGE = {"multiscales": [{"axes": AXES, "datasets": [DATASET]}], "omero": {"channels": [{"label": "DNA"}]}}

plate = zarr.create_group("plate.zarr")
places = [{"path": well, "rowIndex": "AB".index(well[0]), "columnIndex": "12".index(well[2])} for well in WELLS]
layout = {"rows": [{"name": "A"}, {"name": "B"}], "columns": [{"name": "1"}, {"name": "2"}], "wells": places}
plate.attrs["ome"] = {"version": "0.5", "plate": layout}
for name, (image, top) in WELLS.items():
    well = plate.create_group(name)
    well.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": field} for field in FIELDS]}}
    for number, field in enumerate(FIELDS):
        pixels = zarr.open_array(f"slides.zarr/{image}/0", mode="r")[:, top : top + SIDE, number * SIDE :][..., :SIDE]
        group = well.create_group(field)
        group.attrs["ome"] = {"version": "0.5", **IMAGE}
        group.create_array("0", data=pixels, dimension_names=("c", "y", "x"))
