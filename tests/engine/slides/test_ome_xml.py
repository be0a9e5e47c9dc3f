"""OME-TIFFs of several files: each image is found once, in the file of its first plane, or what it lacks is named."""

import numpy as np
import pytest
import tifffile

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.ome_xml import parse, read_images, xml_of
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from tests.support.slides import coordinates, only, read

SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
PIXELS = coordinates("yx", (24, 32), "uint16")


def uuid(name):
    return f"urn:uuid:{name}"


def image(planes, number=0, name="", attributes=""):
    """An image element of the channels in ``planes``: (file, page) of each; None as file for the file itself."""
    channels = "".join(f'<Channel ID="C:{number}:{c}" Name="c{c}" SamplesPerPixel="1"/>' for c in range(len(planes)))
    data = "".join(
        f'<TiffData FirstC="{c}" IFD="{page}" PlaneCount="1">'
        + (f'<UUID FileName="{file}">{uuid(file)}</UUID>' if file else "")
        + "</TiffData>"
        for c, (file, page) in enumerate(planes)
    )
    return (
        f'<Image ID="Image:{number}" Name="{name}"><Pixels ID="P:{number}" DimensionOrder="XYCZT" Type="uint16" '
        f'SizeX="32" SizeY="24" SizeC="{len(planes)}" SizeZ="1" SizeT="1" {attributes}>{channels}{data}'
        "</Pixels></Image>"
    )


def xml(content, own=None):
    identity = f' UUID="{uuid(own)}"' if own else ""
    return f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{SCHEMA}"{identity}>{content}</OME>'


def write(folder, name, description, *values):
    """A file of a page for each value, which is added to `PIXELS`."""
    folder.mkdir(exist_ok=True)
    with tifffile.TiffWriter(folder / name) as tiff:
        for number, value in enumerate(values):
            tiff.write(PIXELS + value, description=None if number else description.encode(), metadata=None)


def first_pixels(slide):
    """The first pixel of each channel."""
    return read(slide, 0, tuple(range(slide.extent("c", 0))), 0, Box(0, 0, 1, 1)).ravel().tolist()


def positions(folder, names=("p0.ome.tif", "p1.ome.tif")):
    content = "".join(image([(name, 0)], number, name) for number, name in enumerate(names))
    for number, name in enumerate(names):
        write(folder, name, xml(content, name), 100 * number)


def channels(folder, names=("b.ome.tif", "a.ome.tif")):
    for number, name in enumerate(names):
        write(folder, name, xml(image([(name, 0) for name in names]), name), 100 * number)


def test_positions_in_files_of_their_own_are_found_once(tmp_path):
    positions(tmp_path / "in")
    slides = find_images(tmp_path / "in")
    assert [slide.name for slide in slides] == ["in/p0.ome.tif", "in/p1.ome.tif"]
    assert [first_pixels(slide) for slide in slides] == [[0], [100]]
    assert first_pixels(only(tmp_path / "in" / "p1.ome.tif")) == [100]


def test_channels_in_files_of_their_own_are_one_image_whichever_file_leads_to_it(tmp_path):
    channels(tmp_path / "in")
    for path in (tmp_path / "in", tmp_path / "in" / "a.ome.tif", tmp_path / "in" / "b.ome.tif"):
        slide = only(path)
        assert (slide.store.name, slide.path, slide.channels) == ("b.ome.tif", "", ("c0", "c1"))
        assert first_pixels(slide) == [0, 100]


@pytest.mark.parametrize("shared", [("a.ome.tif", "b.ome.tif"), ("b.ome.tif", "c.ome.tif")])
def test_files_are_known_by_their_names_even_if_they_share_a_uuid(tmp_path, shared):
    names = ("a.ome.tif", "b.ome.tif", "c.ome.tif")
    for number, name in enumerate(names):
        description = xml(image([(name, 0) for name in names]), name)
        for other in shared:
            description = description.replace(uuid(other), "urn:uuid:same")
        write(tmp_path, name, description, 100 * number)
    assert first_pixels(only(tmp_path)) == [0, 100, 200]


def test_a_missing_file_is_named_and_nothing_is_filled_in(tmp_path):
    channels(tmp_path / "in")
    (tmp_path / "in" / "a.ome.tif").unlink()
    assert "no a.ome.tif" in only(tmp_path / "in").reason
    positions(tmp_path / "p")
    (tmp_path / "p" / "p0.ome.tif").unlink()
    there, lost = find_images(tmp_path / "p")
    assert isinstance(there, Slide)
    assert isinstance(lost, UnreadableImage)
    assert lost.path.endswith("p0.ome.tif")


@pytest.mark.parametrize("own", ["old.ome.tif", None])
def test_a_renamed_file_is_read_from_itself(tmp_path, own):
    write(tmp_path, "new.ome.tif", xml(image([("old.ome.tif", 1), ("old.ome.tif", 0)]), own), 0, 100)
    assert first_pixels(only(tmp_path / "new.ome.tif")) == [100, 0]


def test_a_companion_file_and_the_files_that_refer_to_it_lead_to_the_same_images(tmp_path):
    names = ("0.ome.tif", "1.ome.tif", "2.ome.tif")
    content = image([("0.ome.tif", 0), ("1.ome.tif", 0)]) + image([("2.ome.tif", 0)], 1)
    (tmp_path / "x.companion.ome").write_text(xml(content, "x"))
    reference = f'<BinaryOnly MetadataFile="x.companion.ome" UUID="{uuid("x")}"/>'
    for number, name in enumerate(names):
        write(tmp_path, name, xml(reference, name), 100 * number)
    for path in (tmp_path, tmp_path / "x.companion.ome"):
        slides = find_images(path)
        assert [slide.store.name for slide in slides] == ["0.ome.tif", "2.ome.tif"]
        assert [first_pixels(slide) for slide in slides] == [[0, 100], [200]]
    assert first_pixels(only(tmp_path / "1.ome.tif")) == [0, 100]
    (tmp_path / "x.companion.ome").unlink()
    assert all("x.companion.ome" in broken.reason for broken in find_images(tmp_path))


def test_the_xml_of_an_image_describes_it_alone():
    content = "".join(image([(f"{number}.tif", 0)], number, f"n{number}") for number in range(3)) + '<Plate ID="P"/>'
    images = read_images(parse(xml(content), ""), None, "0.tif", lambda _: True)
    alone = parse(xml_of(images[1:2]), "")
    assert [child.get("Name") for child in alone] == ["n1"]


def test_xml_that_does_not_fit_the_pages_gives_way_to_them_unless_it_lists_other_files(tmp_path):
    content = image([(None, 0)]).replace('SizeX="32"', 'SizeX="40"')
    write(tmp_path, "a.ome.tif", xml(content), 5)
    slide = only(tmp_path / "a.ome.tif")
    assert slide.notes == ("its OME-XML does not fit its pages, which are read as they are",)
    np.testing.assert_array_equal(read(slide, 0, (0,), 0, Box(0, 0, 24, 32))[0], PIXELS + 5)
    parts = image([("b.ome.tif", 0), ("c.ome.tif", 0)]).replace('SizeX="32"', 'SizeX="40"')
    for name in ("b.ome.tif", "c.ome.tif"):
        write(tmp_path / "in", name, xml(parts, name), 0)
    assert "the pages that its OME-XML describes" in only(tmp_path / "in").reason


def test_planes_that_a_file_lacks_are_named(tmp_path):
    write(tmp_path, "a.ome.tif", xml(image([(None, 0), (None, 1)])), 0)
    assert "all 2 planes that its metadata list, found 1" in only(tmp_path / "a.ome.tif").reason


def test_one_bad_image_costs_no_other(tmp_path):
    content = image([(None, 0)]) + image([("lost.ome.tif", 0), (None, 0)], 1) + image([(None, 1)], 2)
    write(tmp_path, "a.ome.tif", xml(content, "a.ome.tif"), 0, 100)
    first, second, third = find_images(tmp_path / "a.ome.tif")
    assert (first_pixels(first), first_pixels(third)) == ([0], [100])
    assert "no lost.ome.tif" in second.reason
    assert [image.name for image in (first, second, third)] == [f"a.ome.tif/{number}" for number in range(3)]


def test_sizes_in_any_unit_and_absurd_ones(tmp_path):
    nm = 'PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="5000" PhysicalSizeYUnit="&#xC5;"'
    zero = 'PhysicalSizeX="0" PhysicalSizeY="-1"'
    write(tmp_path, "a.ome.tif", xml(image([(None, 0)], 0, "", nm) + image([(None, 1)], 1, "", zero)), 0, 1)
    known, unknown = find_images(tmp_path / "a.ome.tif")
    assert known.levels[0].scale == pytest.approx((0.5, 0.5))
    assert unknown.pixel_size_um(0) is None
    assert len(unknown.notes) == 2


def test_damaged_xml_is_named(tmp_path):
    write(tmp_path, "a.ome.tif", xml("<Image></OME>"), 0)
    assert "expected whole and well-formed OME-XML" in only(tmp_path / "a.ome.tif").reason


@pytest.mark.parametrize("declaration", [True, False])
def test_xml_that_is_cut_in_the_middle_is_named(tmp_path, declaration):
    whole = xml(image([(None, 0), (None, 1)]))
    cut = whole[: len(whole) // 2]
    write(tmp_path, "a.ome.tif", cut if declaration else cut.partition("?>")[2], 0, 1)
    assert "expected whole and well-formed OME-XML" in only(tmp_path / "a.ome.tif").reason


@pytest.mark.parametrize(
    ("old", "new", "expected", "found"),
    [
        ('SizeC="2"', 'SizeC="1000000000"', "from 1 to 10000000 as SizeC", "'1000000000'"),
        ('SizeC="2"', 'SizeC="0"', "from 1 to 10000000 as SizeC", "'0'"),
        ('SizeZ="1"', 'SizeZ="-3"', "as SizeZ", "'-3'"),
        ('SizeZ="1"', "", "as SizeZ", "none"),
        ('SizeT="1"', 'SizeT="one"', "as SizeT", "'one'"),
        ('SizeZ="1" SizeT="1"', 'SizeZ="9000" SizeT="9000"', "at most 10000000 planes", "162000000"),
        ('IFD="1"', 'IFD="-1"', "from 0 to 10000000 as IFD", "'-1'"),
        ("XYCZT", "XYWZT", "DimensionOrder", "'XYWZT'"),
        ("XYCZT", "XYCCT", "DimensionOrder", "'XYCCT'"),
        ("XYCZT", "XY", "DimensionOrder", "'XY'"),
    ],
)
def test_numbers_and_axes_that_cannot_be_are_named(tmp_path, old, new, expected, found):
    good, bad = image([(None, 0), (None, 1)]), image([(None, 0), (None, 1)], 1)
    write(tmp_path, "a.ome.tif", xml(good + bad.replace(old, new)), 0, 1)
    taken, refused = find_images(tmp_path)
    assert first_pixels(taken) == [0, 1]
    assert expected in refused.reason
    assert f"found {found} (" in refused.reason


def test_pages_that_the_xml_does_not_list_are_noted(tmp_path):
    write(tmp_path, "a.ome.tif", xml(image([(None, 0)]) + image([(None, 3)], 1)), 0, 1, 2, 3)
    stack = image([(None, 0)]).replace('FirstC="0" IFD="0" PlaneCount="1"', "").replace('SizeZ="1"', 'SizeZ="2"')
    write(tmp_path, "b.ome.tif", xml(stack), 0, 1, 2)
    first, second, cut = find_images(tmp_path)
    assert first.notes == ("2 of its 4 pages are in no image of its OME-XML and left out",)
    assert second.notes == ()
    assert (cut.axes, cut.notes) == ("zyx", ("1 of its 3 pages are in no image of its OME-XML and left out",))


def test_one_file_of_a_set_is_processed_and_the_others_are_named_once(tmp_path):
    names = [f"p{number}.ome.tif" for number in range(9)]
    positions(tmp_path / "in", names)
    for number in (0, 1, 3, 4, 5, 6, 7, 8):
        (tmp_path / "in" / names[number]).unlink()
    there, lost = find_images(tmp_path / "in")
    assert first_pixels(there) == [200]
    assert lost.path.endswith("p0.ome.tif")
    assert "not beside it: p0.ome.tif, p1.ome.tif, p3.ome.tif, p4.ome.tif, p5.ome.tif, 3 more;" in lost.reason


def test_a_file_is_opened_as_often_for_many_images_as_for_few(tmp_path, monkeypatch):
    for count in (2, 9):
        content = "".join(image([(None, number)], number) for number in range(count))
        write(tmp_path, f"{count}.ome.tif", xml(content), *range(count))
    opening, opened = tifffile.TiffFile.__init__, []

    def count_and_open(tiff, *arguments, **options):
        opened.append(arguments)
        opening(tiff, *arguments, **options)

    monkeypatch.setattr(tifffile.TiffFile, "__init__", count_and_open)
    assert len(find_images(tmp_path / "2.ome.tif")) == 2
    few = len(opened)
    slides = find_images(tmp_path / "9.ome.tif")
    assert len(opened) == 2 * few
    assert [first_pixels(slide) for slide in slides] == [[number] for number in range(9)]


def test_label_and_macro_are_left_out_and_said(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        for name, side in (("macro image", 20), ("scan", 60), ("label image", 30)):
            tiff.write(np.zeros((side, side), "uint8"), metadata={"axes": "YX", "Name": name})
    slide = only(tmp_path / "a.ome.tif")
    assert (slide.plane_shape(0), slide.path, slide.series) == ((60, 60), "", 1)
    assert slide.notes == ("left out beside the scan: macro image, label image",)
    assert read(slide, 0, (0,), 0, Box(0, 0, 60, 60)).shape == (1, 60, 60)
