"""What tables of objects in tests come from."""

from cellseg_batch.engine.objects.table import ChannelQuality, Provenance

PROVENANCE = Provenance(
    image="plate/B/03/1",
    labels="plate/B/03/1/labels/cellseg",
    shape=(100, 50),
    pixel_size_um=0.5,
    level0_scale=(1.0, 1.0),
    labelled_fraction=0.25,
    segmented_channels=("DAPI",),
    quality={"DAPI": ChannelQuality(focus=2.0, saturation=0.0)},
    provenance={"model": "tiny"},
)
