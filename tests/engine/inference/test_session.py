"""The two ways into a network, bytes and normalised pixels, give the same logits."""

import time
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Event, Thread

import numpy as np
import pytest

from cellseg_batch.engine.geometry import reflect
from cellseg_batch.engine.inference.backends.registry import make_backend, why_not
from cellseg_batch.engine.inference.choice import Choice
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.session import Session, compile_network
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.cache import Artefacts
from tests.support.images import blobs


def session_of(backend, shape, dtype):
    return Session(compile_network(backend, shape, dtype))


def fill(session, pixels, bounds):
    """Put two tiles that lie over the edges of ``pixels`` into the batch."""
    rows, columns = (np.stack([reflect(-9, 55, n), reflect(n - 50, n + 14, n)]) for n in pixels.shape[1:])
    session.fill(pixels, rows, columns, bounds)


def logits_of(session, pixels, bounds):
    """Logits of these tiles, copied."""
    fill(session, pixels, bounds)
    return session.logits().copy()


@pytest.mark.parametrize("downscale", [1, 2])
@pytest.mark.parametrize("precision", [name for name in ("fp32", "bf16") if not why_not("openvino", name)])
def test_bytes_and_normalised_pixels_give_the_same_bits(tiny_bundle, precision, downscale):
    backend = make_backend(tiny_bundle.downscaled(downscale), "openvino", precision, 1, Artefacts())
    shape = (2, 3, 64, 64)
    of_bytes, of_floats = session_of(backend, shape, "uint8"), session_of(backend, shape, "uint16")
    assert of_bytes.network.takes_bytes
    assert not of_floats.network.takes_bytes
    for channels in (1, 3):
        pixels = blobs(70, 90, channels)
        for bounds in (Bounds((0.0,), (255.0,)), Bounds((17.3,), (101.9,)), Bounds((40.0,), (40.0,))):
            logits = logits_of(of_bytes, pixels, bounds)
            np.testing.assert_array_equal(logits, logits_of(of_floats, pixels, bounds))
            assert logits.std() > 0


def test_a_library_that_wants_normalised_pixels_gets_them(tiny_bundle):
    backend = make_backend(tiny_bundle, "torch", "fp32", 1, Artefacts())
    assert backend.compile_bytes((2, 3, 64, 64)) is None
    pixels, bounds = blobs(70, 90), Bounds((10.0,), (200.0,))
    shape = (2, 3, 64, 64)
    floats = [logits_of(session_of(backend, shape, dtype), pixels.astype(dtype), bounds) for dtype in ("u1", "u2")]
    np.testing.assert_array_equal(*floats)


@pytest.mark.parametrize("library", ["openvino", "torch"])
def test_sessions_on_one_network_have_batches_and_logits_of_their_own(tiny_bundle, library):
    network = compile_network(make_backend(tiny_bundle, library, "fp32", 1, Artefacts()), (2, 3, 64, 64), "uint8")
    first, second = Session(network), Session(network)
    image, other, bounds = blobs(70, 90), 255 - blobs(70, 90), Bounds((0.0,), (255.0,))
    expected = logits_of(first, image, bounds)
    assert (logits_of(first, other, bounds) != expected).any()
    fill(first, image, bounds)
    fill(second, other, bounds)
    kept = first.logits()
    second.logits()
    np.testing.assert_array_equal(kept, expected)
    second.logits()
    np.testing.assert_array_equal(kept, expected)


def test_two_threads_have_sessions_on_one_network_and_a_third_one_waits(tiny_bundle):
    backend, model_pool = Counting(), pool_without_models(tiny_bundle)
    shape, given = (1, 3, 64, 64), SimpleQueue()

    def third():
        with model_pool.session(backend, shape, "uint8") as session:
            given.put(session)

    with model_pool.session(backend, shape, "uint8") as first:
        with model_pool.session(backend, shape, "uint8") as second:
            assert first is not second
            assert first.network is second.network
            thread = Thread(target=third)
            thread.start()
            with pytest.raises(Empty):
                given.get(timeout=0.1)
        assert given.get(timeout=10) is second
    thread.join()
    assert backend.compiled == [shape]


class Counting:
    """A backend that counts what it compiles and how many of its models ever ran at once."""

    def __init__(self):
        self.compiled, self.running, self.most = [], 0, 0

    def compile_bytes(self, shape):
        return None

    def compile(self, shape):
        self.compiled.append(shape)
        return CountingModel(self)


class CountingModel:
    def __init__(self, backend):
        self.backend = backend

    def __call__(self, batch, out=None):
        self.backend.running += 1
        self.backend.most = max(self.backend.most, self.backend.running)
        time.sleep(0.002)
        self.backend.running -= 1
        return batch


def pool_without_models(bundle):
    settings = Settings(backend="torch", precision="fp32", gate=False, threads=1)
    return ModelPool(bundle, settings, choice=Choice("torch", "fp32", None))


def test_models_of_all_shapes_run_one_at_a_time(tiny_bundle):
    backend, model_pool = Counting(), pool_without_models(tiny_bundle)

    def compute(side):
        for _ in range(10):
            with model_pool.session(backend, (1, 3, side, side), "uint8") as session:
                session.logits()

    threads = [Thread(target=compute, args=(side,)) for side in (32, 32, 64, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.most == 1
    assert sorted(backend.compiled) == [(1, 3, 32, 32), (1, 3, 64, 64)]


def test_networks_are_lent_and_run_while_another_compiles(tiny_bundle):
    begun, may_go_on = Event(), Event()

    class Slow(Counting):
        def compile(self, shape):
            begun.set()
            assert may_go_on.wait(60)
            return super().compile(shape)

    quick, slow, model_pool = Counting(), Slow(), pool_without_models(tiny_bundle)
    shape = (1, 3, 32, 32)

    def compute(backend):
        with model_pool.session(backend, shape, "uint8") as session:
            session.logits()
        return list(backend.compiled)

    compute(quick)
    with ThreadPoolExecutor(3) as threads:
        compiling = [threads.submit(compute, slow) for _ in range(2)]
        assert begun.wait(60)
        running = threads.submit(compute, quick)
        try:
            assert running.result(60) == [shape]
        finally:
            may_go_on.set()
        assert [one.result() for one in compiling] == [[shape]] * 2, "compiled once"


def test_a_model_in_use_is_kept_and_an_idle_one_makes_room(tiny_bundle):
    backend, model_pool = Counting(), pool_without_models(tiny_bundle)
    large, other = (1, 3, 2048, 2048), (1, 3, 2048, 1024)
    with model_pool.session(backend, large, "uint8") as session:
        with model_pool.session(backend, other, "uint8"):
            pass
        with model_pool.session(backend, large, "uint8") as second:
            assert second is not session
    with model_pool.session(backend, other, "uint8"):
        pass
    assert backend.compiled == [large, other]
    with model_pool.session(backend, (1, 3, 1024, 2048), "uint8"):
        pass
    with model_pool.session(backend, large, "uint8"):
        pass
    assert backend.compiled == [large, other, (1, 3, 1024, 2048), large]
