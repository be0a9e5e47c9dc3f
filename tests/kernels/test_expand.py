"""Expanded labels against scikit-image, whole and cut to pieces."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from skimage.segmentation import expand_labels

from cellseg_batch.kernels import expand as kernel

DISTANCES = [0.5, 1.0, math.sqrt(2), 2.0, math.sqrt(5), 3.7, 5.0, 10.0, 40.0]


@st.composite
def images(draw):
    """Single pixels and squares with ids in no order: most pixels are equally near to several of them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    labels = np.zeros((height, width), draw(st.sampled_from(["uint32", "uint64"])))
    for label in rng.permutation(draw(st.integers(0, 30))) + 1:
        y, x, side = *rng.integers(0, (height, width)), draw(st.sampled_from([1, 1, 4]))
        labels[y : y + side, x : x + side] = label
    return labels


@given(images(), st.sampled_from(DISTANCES), st.sampled_from([1.0, 2.0, 0.5, 1.25]))
def test_labels_are_expanded_as_by_scikit_image(labels, distance, aspect):
    expected = expand_labels(labels, distance, spacing=(aspect, 1.0))
    np.testing.assert_array_equal(kernel.expand(labels, distance, aspect), expected)


@given(images(), st.sampled_from(DISTANCES), st.sampled_from([1.0, 2.0, 0.3]), st.integers(1, 20))
def test_pieces_with_their_surroundings_are_expanded_as_the_whole(labels, distance, aspect, side):
    whole, around = kernel.expand(labels, distance, aspect), kernel.reach(distance, aspect)
    for y in range(0, labels.shape[0], side):
        for x in range(0, labels.shape[1], side):
            top, left = max(0, y - around), max(0, x - around)
            window = labels[top : y + side + around, left : x + side + around]
            piece = kernel.expand(window, distance, aspect)[y - top :, x - left :][:side, :side]
            np.testing.assert_array_equal(piece, whole[y : y + side, x : x + side])
