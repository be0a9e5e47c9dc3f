"""The class of each pixel: the first of the highest logits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cellseg_batch.kernels import classes_torch
from cellseg_batch.kernels.classes import write_classes


@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(2, 5), st.booleans())
def test_classes_are_those_of_argmax(seed, first, count, background):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 3, (3, first + count, 20, 24)).astype(np.float16)  # with many equal ones
    for value in (np.nan, np.inf, -np.inf):
        logits[rng.integers(3), rng.integers(first + count), rng.integers(20), rng.integers(24)] = value
    places = np.array([[3, 2, 0, 0, 15, 20], [3, 2, 0, 20, 15, 20]])
    core = np.concatenate(logits[:2, first:, 3:18, 2:22], axis=2)
    undefined = np.isnan(core).any(0)
    expected = np.where(undefined, 0, core.argmax(0) + (not background))
    out, in_torch = np.full((2, 15, 40), 9, np.uint8)
    assert write_classes(logits.astype(np.float32), places, first, background, out) == (0, undefined.sum())
    np.testing.assert_array_equal(out, expected)
    tensors = torch.from_numpy(logits), places, first, background, torch.from_numpy(in_torch)
    assert classes_torch.write_classes(*tensors).tolist() == [0, undefined.sum()]
    np.testing.assert_array_equal(in_torch, expected)


@pytest.mark.parametrize(("outputs", "found"), [(3, "0 classes"), (4, "0 classes"), (300, "296 classes")])
def test_a_map_without_classes_or_with_too_many_is_refused(outputs, found):
    out = np.empty((8, 8), np.uint8)
    with pytest.raises(ValueError, match=found):
        write_classes(np.zeros((1, outputs, 8, 8), np.float32), np.array([[0, 0, 0, 0, 8, 8]]), 3, outputs > 3, out)
