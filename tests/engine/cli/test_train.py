"""What a recipe refuses is said of the flag."""

import pytest


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loss", "l1"], "error --loss: expected a sum of bce, dice, focal such as bce+dice, found 'l1'"),
        (["--batch", "0"], "error --batch: expected 1 or more, found 0"),
        (["--dropout", "1.5"], "error --dropout: expected 0 to 1, found 1.5"),
        (["--learning-rate", "nan"], "error --learning-rate: expected 0 or more, found nan"),
        (["--zoom-min", "3"], "error --zoom-min: expected a number above 0 and up to zoom_max, 2.5, found 3"),
        (["--preset", "s9"], "error --preset s9: expected a recipe"),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_its_flag(tmp_path, command, flags, words):
    code, output = command("train", tmp_path / "data", "--out", tmp_path / "b", *flags)
    assert code == 2
    assert words in output
