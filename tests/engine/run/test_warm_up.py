"""What one tile before a slide's blocks compiles, and what it does not wait for."""

import threading
from concurrent.futures import ThreadPoolExecutor

from cellseg_batch.engine.inference.backends.torch_cpu import TorchBackend
from cellseg_batch.engine.inference.choice import Choice
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.run.memory_model import MemoryBudget
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.run.slide_plan import plan_slide
from cellseg_batch.engine.run.warm_up import WarmUp
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from tests.support.images import blobs, write_ome_zarr


def test_a_slide_whose_network_is_there_waits_for_no_other(tmp_path, tiny_bundle, monkeypatch):
    settings = Settings(backend="torch", precision="fp32", gate=False, threads=1, tile=96, downscale=1)
    pool = ModelPool(tiny_bundle, settings, choice=Choice("torch", "fp32", None))
    warm_up = WarmUp(pool, MemoryBudget())
    real, compiled, begun, may_go_on = TorchBackend.compile, [], threading.Event(), threading.Event()

    def compile_model(self, shape):
        compiled.append(shape)
        if len(compiled) > 1:
            begun.set()
            assert may_go_on.wait(60)
        return real(self, shape)

    monkeypatch.setattr(TorchBackend, "compile", compile_model)

    def compile_for(name, dtype):
        (slide,) = find_images(write_ome_zarr(tmp_path / name, blobs(64, 64).astype(dtype), levels=1))
        plan = plan_slide(slide, output_paths(slide, "cellseg", None), settings, tiny_bundle.card, Bounds((0,), (255,)))
        with SlideReader(slide, 0, plan.channels.indices) as reader:
            warm_up.compile_for(plan, pool.chosen, reader)

    compile_for("a.zarr", "uint8")
    with ThreadPoolExecutor(2) as threads:
        other_kind = threads.submit(compile_for, "b.zarr", "uint16")
        assert begun.wait(60)
        same_kind = threads.submit(compile_for, "c.zarr", "uint8")
        try:
            same_kind.result(60)
        finally:
            may_go_on.set()
        other_kind.result()
    assert len(compiled) == 2
