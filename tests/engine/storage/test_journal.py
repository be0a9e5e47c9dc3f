"""The journal keeps what was recorded and nothing else."""

import resource
from dataclasses import dataclass

import pytest

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.storage.journal import Journal


@dataclass(frozen=True)
class Inner:
    side: int


@dataclass(frozen=True)
class Plan:
    STRICT = ("inner",)

    inner: Inner
    note: str = ""


@dataclass(frozen=True)
class Block:
    foreground: int
    seconds: float = 0.0


def test_records_survive_and_start_forgets(tmp_path):
    journal = Journal(tmp_path / "j")
    assert journal.manifest(Plan) is None
    assert not journal.is_begun
    assert journal.numbers("blocks") == set()
    journal.start(Plan(Inner(1)))
    for number in (0, 999, 1000, 123456):
        journal.record("blocks", number, Block(number))
    again = Journal(tmp_path / "j")
    assert again.manifest(Plan) == Plan(Inner(1))
    assert again.numbers("blocks") == {0, 999, 1000, 123456}
    assert dict(again.records("blocks", Block))[123456] == Block(123456)
    assert again.get("blocks", 999, Block) == Block(999)
    assert again.get("blocks", 998, Block) is None
    assert not again.is_finished
    again.finish(Block(7))
    assert journal.is_finished
    assert journal.finished(Block) == Block(7)
    journal.start(Plan(Inner(2)))
    assert (journal.finished(Block), journal.numbers("blocks")) == (None, set())


def test_a_record_that_was_not_renamed_does_not_count(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.record("blocks", 1, Block(1))
    half = tmp_path / "j" / "blocks" / "0" / "2.77.partial"
    half.write_text('{"foreg')
    assert journal.numbers("blocks") == {1}


def test_what_is_missing_is_named_in_order(tmp_path):
    journal = Journal(tmp_path / "j")
    for number in (3, 5, 1001, 2500):
        journal.record("blocks", number, Block(number))
    missing = list(journal.missing("blocks", 3000))
    assert missing == [n for n in range(3000) if n not in (3, 5, 1001, 2500)]


def test_figures_may_be_infinite(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.record("blocks", 1, Block(1, float("-inf")))
    assert journal.get("blocks", 1, Block) == Block(1, float("-inf"))


def test_a_figure_of_another_version_is_passed_over(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.start(Plan(Inner(1)))
    (tmp_path / "j" / "manifest.json").write_text('{"inner": {"side": 4}, "colour": "red"}')
    assert journal.manifest(Plan) == Plan(Inner(4))
    (tmp_path / "j" / "blocks" / "0").mkdir(parents=True)
    (tmp_path / "j" / "blocks" / "0" / "1.json").write_text('{"foreground": 2, "warmth": 0.5}')
    assert journal.get("blocks", 1, Block) == Block(2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"inner": {"side": 4, "depth": 2}}', "the unknown field depth"),
        ('{"inner": {}}', "missing required field side"),
        ('{"inner": {"side": "4"}}', "Expected int, got str"),
        ('{"inner": {"side"', "Expecting"),
    ],
)
def test_what_decides_pixels_must_be_there_and_be_known(tmp_path, content, said):
    journal = Journal(tmp_path / "j")
    journal.start(Plan(Inner(1)))
    (tmp_path / "j" / "manifest.json").write_text(content)
    with pytest.raises(OutputError, match=said):
        journal.manifest(Plan)


def test_a_record_for_which_there_is_no_room_is_named(tmp_path):
    journal = Journal(tmp_path / "journal")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))  # closing such a file fails like writing it
    try:
        with pytest.raises(OutputError, match="expected a journal that can be written"):
            journal.start(Plan(Inner(5), "a note that is longer than that"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not journal.is_begun
    assert list((tmp_path / "journal").iterdir()) == []
