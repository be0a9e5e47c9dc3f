"""The page about a run: whole, self-contained, and harmless whatever names the images have."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from cellseg_batch.engine.reports.svg_charts import bars, histogram, nice_ceiling, plate_chart, rate_chart
from tests.support.convolutions import write_convolution
from tests.support.images import blobs, fill_ome_zarr, write_ome_zarr

_VOID = {"meta", "img"}


class Outline(HTMLParser):
    """Checks that tags are balanced, and gathers headings, links and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.sources, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(text)


@pytest.fixture
def page(tmp_path, command):
    def call(*arguments):
        code, said = command("report", *arguments, "--out", tmp_path / "page.html")
        assert code == 0, said
        return (tmp_path / "page.html").read_text()

    return call


def write_plate(path):
    wells = [("A", 1), ("A", 2), ("B", 2)]
    root = zarr.open_group(str(path), mode="w", zarr_format=3)
    root.attrs["ome"] = {"version": "0.5", "plate": {"wells": [{"path": f"{row}/{column}"} for row, column in wells]}}
    for number, (row, column) in enumerate(wells):
        well = root.create_group(f"{row}/{column}")
        well.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": "0"}]}}
        fill_ome_zarr(well.create_group("0"), path, blobs(120, 120, seed=number))
    return path


def test_messages_name_settings_by_their_flags(tmp_path, segment, page):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64))
    segment(path)
    segment(path, threshold=0.4)
    text = page(path)
    assert "--threshold was 0.5, now 0.4; use the same settings, another --name, or --overwrite" in text
    assert "`" not in text


def test_a_finished_run_with_a_plate_and_a_failure(tmp_path, segment, page):
    write_plate(tmp_path / "in" / "plate.zarr")
    write_ome_zarr(tmp_path / "in" / "a.zarr", blobs(200, 200))
    (tmp_path / "in" / "torn.tif").write_bytes(b"torn")
    segment(tmp_path / "in")
    text = page(tmp_path / "in")
    outline = Outline(text)
    assert outline.headings == [
        "cellseg-batch",
        "To do",
        "Plate plate.zarr",
        "Pictures",
        "Images",
        "Throughput",
        "Where the time went",
    ]
    assert outline.tags.count("img") == 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in outline.sources)
    assert not re.search(r"https?://|url\(|<script|@import", text), "nothing is fetched, nothing runs"
    assert "torn.tif" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_objects_have_counts_densities_and_sizes_and_plates_their_heat_maps(tmp_path, segment, page):
    write_plate(tmp_path / "in" / "plate.zarr")
    write_ome_zarr(tmp_path / "in" / "a.zarr", blobs(200, 200), um=0)
    report = segment(tmp_path / "in", objects=True)
    text = page(tmp_path / "in")
    assert Outline(text).headings[1:4] == ["To know", "Plate plate.zarr", "Objects"]  # a pixel size of 0 is noted
    assert text.count('src="data:image/png;base64,') == 1
    objects = text[text.index("<h2>Objects") : text.index("<h2>Pictures")]
    known = {slide.path: slide for slide in report.slides}
    for row in re.findall(r"<tr><td>(.*?)</tr>", objects):
        path, count, density, median = re.findall(r"[^<>]+(?=</td>)", row)[:4]
        slide = known.pop(path)
        area = np.prod(slide.shape) * (slide.pixel_size_um or 1) ** 2 / 1e6
        assert (slide.objects, count) == (slide.objects, f"{slide.objects:,}")
        assert float(density.split()[0].replace(",", "")) == pytest.approx(slide.objects / area, rel=0.01)
        areas = np.array(pq.read_table(slide.table)["area_um2" if slide.pixel_size_um else "area"])
        assert float(median.split()[0]) == pytest.approx(np.median(areas), rel=0.01)
        assert (density.split()[1], median.split()[1]) == (("/mm²", "µm²") if slide.pixel_size_um else ("/Mpx", "px"))
    assert not known


def test_classes_have_their_shares_in_their_colours_by_image_and_by_well(tmp_path, segment, page):
    model = write_convolution(tmp_path, "classes", ("rgb",))
    write_plate(tmp_path / "in" / "plate.zarr")
    usual = {"model": str(model), "backend": "onnxruntime", "margin": 16}
    for name, objects in (("classes", False), ("objects", True)):
        report = segment(tmp_path / "in", **usual, objects=objects, name=name)
        text = page(tmp_path / "in", "--name", name)
        assert Outline(text).headings[1:3] == ["Plate plate.zarr", "Classes"]
        section = text[text.index("<h2>Classes") :].split("</section>")[0]
        rows = dict(re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", section))
        assert set(rows) == {"mean over images", *(slide.path for slide in report.slides)}
        for slide in report.slides:
            assert min(slide.classes.values()) > 0.01
            assert re.findall(r'"number">([^<]*)<', rows[slide.path]) == [
                f"{100 * s:.1f} %" for s in slide.classes.values()
            ]
        assert all(colour in section for colour in ("#ff4040", "#40ffff"))
        # Without a summary of the plate, a chart of the foreground and of each class.
        assert [f"% {kind}, the highest" in text for kind in ("foreground", "dim", "bright")] == [not objects] * 3


def test_messages_that_images_share_are_said_once_and_long_lists_are_cut(tmp_path, segment, page):
    for number in range(13):
        (tmp_path / f"{number}.tif").write_bytes(b"torn")
    segment(tmp_path)
    text = page(tmp_path)
    tasks = text[text.index("<h2>To do") : text.index("<h2>Images")]
    assert (tasks.count("<tr><td>"), tasks.count(".tif<br>"), "and 3 more" in tasks) == (1, 10, True)


def test_names_cannot_break_the_page(tmp_path, segment, page):
    write_ome_zarr(tmp_path / "in" / "<script>alert(1)<.zarr", blobs(64, 64))
    (tmp_path / "in" / "<b>.tif").write_bytes(b"torn")
    segment(tmp_path / "in")
    text = page(tmp_path / "in")
    outline = Outline(text)
    assert "script" not in outline.tags
    assert outline.tags.count("b") == text.count('class="card"><b>')


def test_before_anything_has_begun(tmp_path, page):
    write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64))
    text = page(tmp_path / "a.zarr")
    assert Outline(text).headings == ["cellseg-batch", "Images"]
    assert "1 waiting" in text


def test_labels_without_their_images_have_no_pictures(tmp_path, segment, page):
    write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64))
    segment(tmp_path / "a.zarr", output=tmp_path / "out")
    (tmp_path / "a.zarr").rename(tmp_path / "gone.zarr")
    assert "Pictures" not in Outline(page(tmp_path / "out")).headings


def test_charts_are_in_proportion():
    svg = ElementTree.fromstring(rate_chart([0.0, 2.0, 1.0], ["a", "b"], "Mpx/s"))
    points = [tuple(map(float, one.split(","))) for one in svg.find("polyline").get("points").split()]
    base, top, middle = (points[i][1] for i in (0, 2, 4))
    assert base - top == pytest.approx(2 * (base - middle), abs=0.2)
    assert [one.text for one in svg.iter("title")] == ["0.00 Mpx/s", "2.00 Mpx/s", "1.00 Mpx/s"]
    assert re.findall(r"width:([\d.]+)%", bars({"read": 1.0, "model": 4.0}, "s")) == ["100.0", "25.0"]


def test_histograms_are_as_tall_as_their_highest_bin():
    svg = ElementTree.fromstring(histogram([2, 0, 4], "1 px", "8 px"))
    heights = [-float(part) for part in re.findall(r"v(-[\d.]+)", svg.find("path").get("d"))]
    assert heights == [17, 34]
    assert [text.text for text in svg.iter("text")] == ["1 px", "8 px"]


def test_a_plate_is_in_order_and_shows_gaps():
    chart = plate_chart({("B", 3): 1.0, ("A", 1): 5.0, ("AA", 1): 3.0}, "objects")
    svg = ElementTree.fromstring(chart[: chart.index("</svg>") + 6])
    said = [one.text for one in svg.iter("title")]
    assert said[:3] == ["A1: 5 objects", "A2: no value", "A3: no value"]
    assert said[6] == "AA1: 3 objects"
    assert len(said) == 9


@pytest.mark.parametrize(("value", "top"), [(0, 0), (0.3, 0.4), (1, 1), (7, 10), (41, 50), (1e-3, 1e-3)])
def test_axes_end_at_round_numbers(value, top):
    assert nice_ceiling(value) == pytest.approx(top)
    assert np.isfinite(nice_ceiling(value))
