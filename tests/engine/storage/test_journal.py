"""The journal keeps what was recorded and nothing else."""

import json

from cellseg_batch.engine.storage.journal import Journal


def test_records_survive_and_start_forgets(tmp_path):
    journal = Journal(tmp_path / "j")
    assert journal.manifest() is None
    assert journal.numbers("blocks") == set()
    journal.start({"a": 1})
    for number in (0, 999, 1000, 123456):
        journal.record("blocks", number, {"foreground": number})
    again = Journal(tmp_path / "j")
    assert again.manifest() == {"a": 1}
    assert again.numbers("blocks") == {0, 999, 1000, 123456}
    assert dict(again.records("blocks"))[123456] == {"foreground": 123456}
    assert again.finished() is None
    again.finish({"done": True})
    assert journal.finished() == {"done": True}
    journal.start({"b": 2})
    assert (journal.finished(), journal.numbers("blocks")) == (None, set())


def test_a_record_that_was_not_renamed_does_not_count(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.record("blocks", 1, {})
    half = tmp_path / "j" / "blocks" / "0" / "2.77.partial"
    half.write_text(json.dumps({"foreground": 3})[:5])
    assert journal.numbers("blocks") == {1}


def test_what_is_missing_is_named_in_order(tmp_path):
    journal = Journal(tmp_path / "j")
    for number in (3, 5, 1001, 2500):
        journal.record("blocks", number, {})
    missing = list(journal.missing("blocks", 3000))
    assert missing == [n for n in range(3000) if n not in (3, 5, 1001, 2500)]
