"""A pixel size in any unit of the schemas is known; one that cannot be true is unknown, and noted."""

import pytest

from cellseg_batch.engine.slides.pixel_size import settle_pixel_size


@pytest.mark.parametrize(
    ("size", "unit", "um"),
    [
        ("0.5", "µm", 0.5),
        (0.5, "μm", 0.5),
        (0.5, "micrometer", 0.5),
        (500, "nm", 0.5),
        (500.0, "nanometer", 0.5),
        (5000, "Å", 0.5),
        (5e-4, "mm", 0.5),
        (5e-5, "cm", 0.5),
        (5e-6, "dm", 0.5),
        (5e-7, "m", 0.5),
        (5e-10, "kilometer", 0.5),
        (5e5, "pm", 0.5),
        (5e8, "fm", 0.5),
        (1, "thou", 25.4),
        (1e-5, "in", 0.254),
        (1e-5, "inch", 0.254),
        (0.001, "pt", 25400 / 72 / 1000),
    ],
)
def test_units_of_length(size, unit, um):
    settled = settle_pixel_size({"x": (size, unit)})
    assert settled.um == pytest.approx({"x": um, "y": um})
    assert not settled.notes


@pytest.mark.parametrize(
    "size", [0, "0", -0.5, "nan", float("nan"), "inf", "0,5", "", "half", 1e-9, 1e6, [0.5], {}, True, 10**400]
)
def test_absurd_sizes_are_unknown_and_noted(size):
    settled = settle_pixel_size({"x": (size, "µm")})
    assert settled.um == {}
    (note,) = settled.notes
    assert str(size)[:40] in note
    assert "1 nm to 1 mm; `pixel_size`" in note


def test_a_unit_that_is_no_length_is_noted_and_none_at_all_is_not():
    assert "furlong" in settle_pixel_size({"x": (1, "furlong")}).notes[0]
    for unit in (None, "", "pixel", "reference frame"):
        assert settle_pixel_size({"x": (1, unit)}) == settle_pixel_size({})


def test_y_and_x_stand_in_for_each_other_unless_one_is_absurd():
    assert settle_pixel_size({"z": (2, "µm"), "y": (1, "µm")}).um == {"z": 2.0, "y": 1.0, "x": 1.0}
    assert settle_pixel_size({"z": (2, "µm"), "y": (1, "µm"), "x": (0, "µm")}).um == {"z": 2.0}
