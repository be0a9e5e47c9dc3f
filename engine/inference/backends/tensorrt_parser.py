"""Build a TensorRT plan of an ONNX graph, by TensorRT's own parser.

Written against TensorRT 10.15 and 11.0.  A strongly typed network computes in the graph's own dtypes; 11.0 makes no
other.  It must not know bundles, devices or caches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellseg_batch.engine.inference.backends.tensorrt_errors import RefusedError, demand, demand_result


def build_plan(tensorrt: Any, logger: Any, graph: bytes, timings: Path) -> bytes:
    """Build the plan of a graph for the current GPU.

    Args:
        tensorrt: the module.
        logger: TensorRT's logger.
        graph: serialised graph whose input has one shape, so that it needs no optimisation profile.
        timings: file of the timings of earlier builds, b"" without any; those of this build are added.

    Raises:
        RefusedError: TensorRT cannot take the graph, or cannot build it.
        Exception: TensorRT cannot be used on this machine.
    """
    builder = tensorrt.Builder(logger)
    # The flag's number is another one in each version.
    typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = demand_result(builder.create_network(typed), "create_network")
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        raise RefusedError(
            "; ".join(f"{error.node_operator()}: {error.desc()}" for error in errors) or "parse returned False"
        )
    config = demand_result(builder.create_builder_config(), "create_builder_config")
    cache = demand_result(config.create_timing_cache(timings.read_bytes()), "create_timing_cache")
    demand(config.set_timing_cache(cache, False), "set_timing_cache")
    plan = demand_result(builder.build_serialized_network(network, config), "build_serialized_network")
    timings.write_bytes(config.get_timing_cache().serialize())
    return bytes(plan)
