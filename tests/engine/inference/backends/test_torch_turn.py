"""Networks run in torch while other threads trace theirs."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np

from cellseg_batch.engine.inference.backends.protocol import BackendRequest
from cellseg_batch.engine.inference.backends.torch_cpu import TorchBackend, make
from cellseg_batch.engine.storage.cache import Artefacts


def test_a_network_runs_while_others_are_made(tiny_bundle):
    request = BackendRequest("torch", "fp32", 1, Artefacts(), "cuda:0")
    batch = np.zeros((1, 3, 32, 32), np.float32)
    model = make(tiny_bundle, request).compile(batch.shape)
    expected, enough = model(batch), Event()

    def runs_alike() -> bool:
        alike = True
        while alike and not enough.is_set():
            alike = np.array_equal(model(batch), expected)
        return alike

    with ThreadPoolExecutor() as pool:
        running = pool.submit(runs_alike)
        try:
            made = list(pool.map(lambda _: make(tiny_bundle, request), range(40)))
        finally:
            enough.set()
    assert running.result()
    assert all(isinstance(backend, TorchBackend) for backend in made)
