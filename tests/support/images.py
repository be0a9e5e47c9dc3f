"""Images, stores and plates that tests make, and what they read back of a run."""

import numpy as np
import zarr
from skimage.measure import regionprops_table


def blobs(height, width, channels=3, seed=0):
    """A uint8 image (C, H, W) of smooth bright blobs on a dark ground."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width))
    for _ in range(max(1, height * width // 400)):
        centre_y, centre_x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 8)
        around = np.s_[max(0, int(centre_y) - 24) : int(centre_y) + 25, max(0, int(centre_x) - 24) : int(centre_x) + 25]
        y, x = np.ogrid[around[0].start : around[0].start + 49, around[1].start : around[1].start + 49]
        blob = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / radius**2)
        image[around] = np.maximum(image[around], blob[: image[around].shape[0], : image[around].shape[1]])
    noise = rng.normal(0, 6, (channels, height, width))
    return np.clip(20 + 200 * image[None] + noise, 0, 255).astype(np.uint8)


def write_ome_zarr(path, pixels, axes="cyx", version="0.5", levels=2, um=0.5, chunk=64, **omero):
    """Write ``pixels`` as an OME-Zarr image of ``levels`` halvings; returns ``path``."""
    zarr_format = 3 if version == "0.5" else 2
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    return fill_ome_zarr(group, path, pixels, axes, version, levels, um, chunk, **omero)


def fill_ome_zarr(group, path, pixels, axes="cyx", version="0.5", levels=2, um=0.5, chunk=64, **omero):
    units = {"t": ("time", "second"), "c": ("channel", None), "z": ("space", "micrometer")}
    described = []
    for axis in axes:
        kind, unit = units.get(axis, ("space", "micrometer"))
        described.append({"name": axis, "type": kind, **({"unit": unit} if unit else {})})
    datasets = []
    for level in range(levels):
        step = tuple(slice(None, None, 2**level) if axis in "yx" else slice(None) for axis in axes)
        chunks = tuple(
            min(chunk, length) if axis in "yx" else 1 for axis, length in zip(axes, pixels[step].shape, strict=True)
        )
        array = group.create_array(
            str(level),
            shape=pixels[step].shape,
            dtype=pixels.dtype,
            chunks=chunks,
            **({"dimension_names": tuple(axes)} if version == "0.5" else {}),
        )
        array[...] = pixels[step]
        scale = [um * 2**level if axis in "yx" else 1.0 for axis in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    metadata = {"multiscales": [{"axes": described, "datasets": datasets, "name": "test"}]}
    if omero:
        metadata["omero"] = omero
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", **metadata}
    else:
        metadata["multiscales"][0]["version"] = "0.4"
        group.attrs.update(metadata)
    return path


def labels_of(report, index=0, level=0):
    """The written labels of a run's slide."""
    return zarr.open_array(f"{report.slides[index].labels}/{level}", mode="r")[...]


def check_table(table, labels, pixels, channels):
    """Hold a table of objects against scikit-image's of the labels (H, W) and pixels (C, H, W)."""
    exact = {"id": "label", "area": "area"}
    exact |= {f"bbox_{side}": f"bbox-{number}" for number, side in enumerate(("y0", "x0", "y1", "x1"))}
    close = {"centroid_y": "centroid-0", "centroid_x": "centroid-1", "perimeter": "perimeter"}
    close |= {"axis_major": "axis_major_length", "axis_minor": "axis_minor_length", "eccentricity": "eccentricity"}
    for number, channel in enumerate(channels):
        close |= {f"intensity_{name}_{channel}": f"intensity_{name}-{number}" for name in ("mean", "min", "max", "std")}
    names = {name.split("-")[0] for name in (*exact.values(), *close.values())}
    expected = regionprops_table(labels, np.moveaxis(pixels, 0, -1), names)
    for ours, theirs in exact.items():
        np.testing.assert_array_equal(table[ours], expected[theirs], err_msg=ours)
    for ours, theirs in close.items():
        np.testing.assert_allclose(table[ours], expected[theirs], rtol=1e-6, atol=1e-6, err_msg=ours)
    for number, channel in enumerate(channels):
        sums = expected[f"intensity_mean-{number}"] * expected["area"]
        np.testing.assert_allclose(table[f"intensity_sum_{channel}"], sums, rtol=1e-6)
    border = np.union1d(labels[[0, -1]], labels[:, [0, -1]])
    np.testing.assert_array_equal(table["touches_border"], np.isin(expected["label"], border))


def write_plate(path, wells, fields, side=8, images=(), **omero):
    """A plate with an image in every field: the next of ``images``, or else of ``side`` px, empty if 8, with blobs."""
    images = iter(images)
    plate = zarr.open_group(str(path), mode="w")
    rows, columns = (sorted({well.split("/")[part] for well in wells}) for part in (0, 1))
    listed = [{"path": well, "rowIndex": 0, "columnIndex": 0} for well in wells]
    names = {"rows": [{"name": name} for name in rows], "columns": [{"name": name} for name in columns]}
    plate.attrs["ome"] = {"version": "0.5", "plate": {"wells": listed, **names}}
    for well in wells:
        group = plate.require_group(well)
        group.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": field} for field in fields]}}
        for field in fields:
            made = blobs(side, side, 1) if side > 8 else np.zeros((1, side, side), np.uint8)
            fill_ome_zarr(group.create_group(field), path, next(images, made), levels=1, **omero)
    return path
