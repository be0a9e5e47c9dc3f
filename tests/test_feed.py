"""The two ways into a network, bytes and normalised pixels, give the same logits."""

from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np
import pytest

from cellseg_batch.engine.artefacts import Artefacts
from cellseg_batch.engine.backends.choose import make_backend
from cellseg_batch.engine.backends.openvino_backend import supported_precisions
from cellseg_batch.engine.engines import Choice, Engines
from cellseg_batch.engine.feed import Feed
from cellseg_batch.engine.geometry import reflect
from cellseg_batch.engine.normalise import Bounds
from cellseg_batch.engine.settings import Settings
from tests.conftest import blobs


def logits_of(feed, pixels, bounds):
    """Logits of two tiles that lie over the edges of ``pixels``, copied."""
    rows, columns = (np.stack([reflect(-9, 55, n), reflect(n - 50, n + 14, n)]) for n in pixels.shape[1:])
    feed.fill(pixels, rows, columns, bounds)
    return feed.logits().copy()


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("precision", supported_precisions())
def test_bytes_and_normalised_pixels_give_the_same_bits(tiny_bundle, precision, shrink):
    backend = make_backend(tiny_bundle.shrunk(shrink), "openvino", precision, 1, Artefacts())
    shape = (2, 3, 64, 64)
    of_bytes, of_floats = Feed(backend, shape, "uint8"), Feed(backend, shape, "uint16")
    for channels in (1, 3):
        pixels = blobs(70, 90, channels)
        for bounds in (Bounds(0.0, 255.0), Bounds(17.3, 101.9), Bounds(40.0, 40.0)):
            logits = logits_of(of_bytes, pixels, bounds)
            np.testing.assert_array_equal(logits, logits_of(of_floats, pixels, bounds))
            assert logits.std() > 0


def test_a_library_that_wants_normalised_pixels_gets_them(tiny_bundle):
    backend = make_backend(tiny_bundle, "torch", "fp32", 1, Artefacts())
    assert backend.compile_bytes((2, 3, 64, 64)) is None
    pixels, bounds = blobs(70, 90), Bounds(10.0, 200.0)
    floats = [logits_of(Feed(backend, (2, 3, 64, 64), dtype), pixels.astype(dtype), bounds) for dtype in ("u1", "u2")]
    np.testing.assert_array_equal(*floats)


def test_a_twin_has_a_batch_and_logits_of_its_own(tiny_bundle):
    feed = Feed(make_backend(tiny_bundle, "openvino", "fp32", 1, Artefacts()), (2, 3, 64, 64), "uint8")
    twin = feed.twin()
    one, other, bounds = blobs(70, 90), 255 - blobs(70, 90), Bounds(0.0, 255.0)
    expected = logits_of(feed, one, bounds)
    assert (logits_of(feed, other, bounds) != expected).any()
    rows, columns = (np.stack([reflect(-9, 55, n), reflect(n - 50, n + 14, n)]) for n in one.shape[1:])
    feed.fill(one, rows, columns, bounds)
    twin.fill(other, rows, columns, bounds)
    kept = feed.logits()
    twin.logits()
    np.testing.assert_array_equal(kept, expected)


def test_a_library_that_computes_one_batch_at_a_time_has_no_twin(tiny_bundle):
    assert Feed(make_backend(tiny_bundle, "torch", "fp32", 1, Artefacts()), (1, 3, 64, 64), "uint8").twin() is None


def test_two_threads_feed_one_model_and_a_third_one_waits(tiny_bundle):
    settings = Settings(backend="openvino", precision="fp32", gate=False, threads=1)
    engines = Engines(tiny_bundle, settings, choice=Choice("openvino", "fp32", None))
    shape, given = (1, 3, 64, 64), SimpleQueue()

    def third():
        with engines.feed(engines.chosen, shape, "uint8") as feed:
            given.put(feed)

    with engines.feed(engines.chosen, shape, "uint8") as one:
        with engines.feed(engines.chosen, shape, "uint8") as other:
            assert one is not other
            assert one.model is not other.model
            thread = Thread(target=third)
            thread.start()
            with pytest.raises(Empty):
                given.get(timeout=0.1)
        assert given.get(timeout=10) is other
    thread.join()
