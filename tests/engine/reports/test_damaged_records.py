"""Records that are damaged, edited by hand or of another version are named, and hide no other image."""

import json

import pytest

from tests.support.images import blobs, write_ome_zarr


@pytest.fixture
def folder(tmp_path, segment):
    """Two finished images of several blocks."""
    for name in "ab":
        write_ome_zarr(tmp_path / "in" / f"{name}.zarr", blobs(200, 200))
    segment(tmp_path / "in")
    return tmp_path / "in"


def test_a_plan_that_cannot_be_is_named_with_its_file(folder, segment, command):
    manifest = folder / "b.zarr.cellseg" / "labels" / "cellseg" / "manifest.json"
    plan = json.loads(manifest.read_text())
    decisions = plan["decisions"]
    for changes, reason in (
        ({"passes": {}}, "no tasks of blocks for 4 blocks"),
        ({"passes": {**plan["passes"], "blocks": 3}}, "3 tasks of blocks for 4 blocks"),
        ({"passes": {**plan["passes"], "levels/1": -1}}, "Expected int >= 1"),
        ({"blocks": [9, 9]}, "4 tasks of blocks for 1 blocks"),
        ({"images": {}}, "Expected object of length >= 1"),
        ({"decisions": {**decisions, "input": {**decisions["input"], "axes": "yx"}}}, "axes yx of shape (3, 200, 200)"),
        ({"decisions": {**decisions, "colour": "red"}}, "the unknown field colour"),
    ):
        manifest.write_text(json.dumps(plan | changes))
        code, said = command("status", folder)
        assert (code, "1 done, 1 failed" in said) == (1, True), said
        assert f"{manifest}: expected a record of this version" in said
        assert reason in said
        code, said = command("verify", folder)
        assert (code, "0 damaged" in said) == (1, True), said
        assert f"unreadable {manifest}: expected a record of this version" in said
    assert [slide.status for slide in segment(folder).slides] == ["skipped", "failed"]


FOLDER = "a folder in place of the record"


def replace_record(record, content):
    record.unlink()
    if content == FOLDER:
        record.mkdir()
    else:
        record.write_text(content)


@pytest.mark.parametrize(
    ("part", "content", "found"),
    [
        ("manifest", FOLDER, "a folder"),
        ("finished", FOLDER, "a folder"),
        ("blocks/0/1", FOLDER, "a folder"),
        ("levels/1/0/0", "[" * 100_000, "maximum recursion depth"),
        ("blocks/0/1", '{"written": [], "result": {"seeds": "many"}}', "Expected object | null, got str"),
    ],
)
def test_a_record_that_is_none_is_unreadable_for_every_command(folder, segment, command, part, content, found):
    record = folder / "b.zarr.cellseg" / "labels" / "cellseg" / f"{part}.json"
    replace_record(record, content)
    code, said = command("verify", folder)
    assert (code, f"unreadable {record}: expected a record" in said, found in said) == (1, True, True), said
    assert command("status", folder)[0] == (part == "manifest")
    assert command("report", folder, "--out", folder.parent / "page.html")[0] == 0
    expected = {"manifest": "failed", "finished": "failed"}.get(part, "skipped")
    assert [slide.status for slide in segment(folder).slides] == ["skipped", expected]


def test_files_that_other_programs_leave_among_the_records_are_none(folder, command):
    (folder / "b.zarr.cellseg" / "labels" / "cellseg" / "blocks" / "0" / "._0.json").write_text("?")
    for name in ("verify", "status"):
        assert command(name, folder)[0] == 0


@pytest.mark.parametrize(
    ("part", "content"), [("manifest", "{}"), ("finished", '{"foreground": -5}'), ("blocks/0/1", '{"written": [')]
)
def test_the_page_of_a_run_shows_an_image_whose_journal_cannot_be_read(folder, command, tmp_path, part, content):
    record = folder / "b.zarr.cellseg" / "labels" / "cellseg" / f"{part}.json"
    record.write_text(content)
    assert command("report", folder, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert f"<td>{record}: expected a record of this version" in page
    assert "<title>cellseg-batch: 1 done, 1 failed</title>" in page


def test_a_note_on_a_failure_that_cannot_be_read_stands_for_its_image(folder, segment, command):
    (folder / "c.png").write_text("no picture")
    segment(folder)
    (note,) = folder.rglob("failed/cellseg/*.json")
    note.write_text("{")
    code, said = command("status", folder)
    assert (code, "2 done, 1 failed" in said) == (1, True), said
    assert f"failed {folder / 'c.png'}: {note}: expected a record" in said
