"""Race the backends: time all that load here, compare them with an fp32 reference on real tiles, keep the result.

The race runs in its own process, so that its memory (torch and every network) does not stay in the run.  It must not
know slides.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS, LIKELY_WINNERS
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.geometry import fit_squares
from cellseg_batch.engine.inference.backends.gate import (
    Parity,
    byte_bounds,
    limits_of,
    logits_of,
    measure_parity,
    tiles_for,
)
from cellseg_batch.engine.inference.backends.protocol import CONVERSION_VERSION, Backend, Shape
from cellseg_batch.engine.inference.backends.registry import REFERENCES, candidates, make_backend, packages, why_not
from cellseg_batch.engine.inference.decoders import DECODERS, Decoder
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.race_result import Candidate, RaceResult, Request, may_win
from cellseg_batch.engine.inference.session import Session, compile_network
from cellseg_batch.engine.machine import cores, gpus, package_version, processor, run_module, visible_gpus
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.settings import TILE, Settings, race_device
from cellseg_batch.engine.storage.cache import Artefacts, Key
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import Card

_log = logging.getLogger(__name__)

_FILE = "race_result.json"
# (height, width) in px of the slide whose tiles time a GPU: what is compiled for long for their shape serves all runs.
_LARGE_SLIDE = (8192, 8192)
# Tile that times a CPU, (height, width) in px: a CPU takes as long per pixel in tiles of any size.
_SMALL_TILE = (1024, 1024)
_ROUNDS = 5
# A candidate that is slower than the fastest by this factor is timed once; it will not win.
_HOPELESS = 3.0


def request_of(settings: Settings, card: Card) -> Request:
    """Return the race for a run with ``settings`` and the model of ``card``; tiles are large only if a GPU may win."""
    device = race_device(settings.device)
    fitting = candidates(card.format, settings.backend, settings.precision, device)
    on_gpu = any(KNOWN_BACKENDS[name].on_gpu for name, _ in fitting)
    is_large = on_gpu and (device != "auto" or (gpus() and visible_gpus()))
    tile = large_tile(card) if is_large else _SMALL_TILE
    return Request(settings.model, settings.backend, settings.precision, tile, 1, settings.threads or cores(), device)


def large_tile(card: Card) -> tuple[int, int]:
    """Return (height, width) in px of a large slide's tiles, with the default settings and the card's margin."""
    size = card.input.size
    if size.fixed:
        return size.fixed, size.fixed
    return fit_squares(_LARGE_SLIDE, TILE, card.margin, card.total_stride, size.min).tile


def likely_winner(request: Request, bundle: Bundle) -> tuple[str, str] | None:
    """The (backend, precision) that a short race tries; None where a GPU may win, or nothing likely can be had."""
    fitting = _candidates_to_race(request, bundle)
    if gpus() and any(KNOWN_BACKENDS[name].on_gpu for name, _ in fitting):
        return None
    return next((name for name in LIKELY_WINNERS if name in fitting and not why_not(*name)), None)


def load_or_race(
    request: Request, bundle: Bundle, artefacts: Artefacts, started: Callable[[], None], again: bool = False
) -> RaceResult:
    """Return the result of this race on this machine; race now, in a separate process, if none is on disk.

    The result of a complete race serves too, and for a short race that of a whole one.

    Args:
        request: candidates and conditions.
        bundle: the model that the request names.
        artefacts: cache of race results and compiled networks.
        started: called if a race is run.
        again: race even if a result of this race is on disk, and replace it.

    Raises:
        BackendError: the race's process died.
    """
    key = _key(request, bundle)
    if again:
        artefacts.drop(key)
    longer = () if again else (replace(request, complete=True, short=False), replace(request, short=False))
    found = (artefacts.find(known) for known in (*(_key(longer_request, bundle) for longer_request in longer), key))
    folder = next(filter(None, found), None)
    if folder is None:
        started()
        folder = artefacts.get(key, lambda partial: _race_elsewhere(request, artefacts, partial))
    return RaceResult.from_json(json.loads((folder / _FILE).read_text()))


def race(request: Request, bundle: Bundle, artefacts: Artefacts) -> RaceResult:
    """Run the race in this process: build, gate and time every candidate; the candidates take turns."""
    threshold, decoder = bundle.card.threshold, DECODERS[bundle.card.decoder]
    network = decoder.network(bundle, instances=False)
    tiles = tiles_for("gate", bundle.card)
    name_of_reference = REFERENCES[bundle.card.format]
    reference = make_backend(network, *name_of_reference, request.threads, artefacts)
    expected = logits_of(reference.compile((1, *tiles.shape[1:])), tiles)
    height, width = (bundle.card.input.size.below(side, bundle.card.total_stride) for side in request.tile)
    shape = (request.batch, bundle.card.input.count, height, width)
    rows: dict[tuple[str, str], Candidate] = {}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    parities: dict[tuple[str, str], Parity] = {}
    rule, channels = bundle.card.input.normalisation, bundle.card.input.count
    low, high = (tuple(map(float, ends)) for ends in byte_bounds(rule, channels))
    bounds = Bounds(low, high, rule.clip)
    pixels = _lay_out(shape, tiles, bounds)
    gpu = "cuda:0" if request.device in ("auto", "cpu") else request.device
    for name in _candidates_to_race(request, bundle):
        missing = why_not(*name)
        if not missing:
            try:
                if name == name_of_reference:
                    backend, parities[name] = reference, measure_parity(expected, expected, threshold, decoder)
                else:
                    backend = make_backend(network, *name, request.threads, artefacts, gpu)
                    parities[name] = worst_parity(backend, tiles, expected, threshold, decoder, bounds)
                calls[name] = _timed_call(backend, shape, pixels, bounds)
                continue
            except Exception as error:  # this library cannot take the network; another library may
                _log.debug("%s cannot run the model", name, exc_info=True)
                missing = f"cannot run the model ({type(error).__name__}: {error})"
        rows[name] = Candidate(*name, missing=missing)
    megapixels = request.batch * height * width / 1e6
    for name, seconds in time_in_turns(calls).items():
        rates = [megapixels / round_seconds for round_seconds in seconds]
        rows[name] = Candidate(*name, "", median(rates), min(rates), max(rates), parities[name])
    calls.clear()  # frees the memory of every network
    race_result = RaceResult(
        request=request,
        model_sha256=bundle.sha256,
        shape=shape,
        processor=processor(),
        gpus=tuple(gpus()),
        versions=_versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        candidates=tuple(sorted(rows.values(), key=lambda row: -row.mpx_per_s)),
    )
    if request.short:  # a run converts what it needs
        return race_result
    with suppress(BackendError):  # no candidate won; picking from the result will say why
        winner = race_result.pick(request.backend, request.precision)
        # Convert the winner's networks now, so that a run with a downscaled slide or instances need not load torch.
        for instances in (False, True):
            network = decoder.network(bundle, instances=instances)
            for factor in (1, *map(int, bundle.card.downscale)):
                make_backend(network.downscaled(factor), winner.backend, winner.precision, request.threads, artefacts)
    return race_result


def time_in_turns(calls: dict[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], list[float]]:
    """Return the seconds of each call in each round; much slower calls drop out after the first.

    Each call must have run before, so that no warm-up is timed.
    """
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS if len(calls) > 1 else 1):
        for name, call in calls.items():
            best = min((min(times) for times in seconds.values() if times), default=float("inf"))
            if seconds[name] and min(seconds[name]) > _HOPELESS * best:
                continue
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def worst_parity(
    backend: Backend,
    tiles: NDArray[np.float32],
    expected: NDArray[np.float32],
    threshold: float,
    decoder: Decoder,
    bounds: Bounds,
) -> Parity:
    """Return the worse parity of the backend's two networks: for normalised pixels, and for bytes if it has one.

    Args:
        backend: the backend.
        tiles: (N, C, H, W) float32, normalised by ``bounds``.
        expected: logits of the reference, (N, K, H, W).
        threshold: probability above which a pixel is foreground.
        decoder: decoder of the model.
        bounds: bytes that are 0 and 1 in the tiles, for each channel.
    """
    models = _models(backend, (1, *tiles.shape[1:]), bounds)
    parities = [measure_parity(logits_of(model, tiles), expected, threshold, decoder) for model in models]
    return min(parities, key=lambda parity: (parity.within(limits_of(backend.precision)), -parity.flipped))


def _models(
    backend: Backend, shape: Shape, bounds: Bounds
) -> Iterator[Callable[[NDArray[np.float32]], NDArray[np.float32]]]:
    """Yield the network for normalised pixels, and the network for bytes, adapted to take normalised pixels."""
    yield backend.compile(shape)
    if (of_bytes := backend.compile_bytes(shape)) is not None:
        low, scale = (np.array(numbers, np.float32) for numbers in (bounds.low, bounds.scale))
        yield lambda tile: of_bytes(np.ascontiguousarray(np.moveaxis(_as_bytes(tile, bounds), 1, -1)), low, scale)


def _timed_call(backend: Backend, shape: Shape, pixels: NDArray[np.uint8], bounds: Bounds) -> Callable[[], object]:
    """Return a call of the network on a batch of tiles that all show ``pixels`` (C, H, W), warmed up."""
    session = Session(compile_network(backend, shape, pixels.dtype))
    rows, columns = (np.tile(np.arange(side), (shape[0], 1)) for side in shape[2:])
    session.fill(pixels, rows, columns, bounds)
    session.logits()
    repeat: Callable[[], object] | None = getattr(session.network.model, "repeat", None)
    if repeat is None:
        return session.logits
    repeat()
    return repeat  # a GPU's copies overlap its work in a run


def _lay_out(shape: Shape, tiles: NDArray[np.float32], bounds: Bounds) -> NDArray[np.uint8]:
    """Return pixels (C, H, W) for batches of ``shape``, filled with real tiles."""
    pixels = np.empty(shape[1:], np.uint8)
    side = tiles.shape[-1]
    corners = [(y, x) for y in range(0, shape[2], side) for x in range(0, shape[3], side)]
    for number, (y, x) in enumerate(corners):
        target = pixels[:, y : y + side, x : x + side]
        target[...] = _as_bytes(tiles[number % len(tiles)], bounds)[:, : target.shape[1], : target.shape[2]]
    return pixels


def _as_bytes(tiles: NDArray[np.float32], bounds: Bounds) -> NDArray[np.uint8]:
    """The bytes that ``bounds`` make ``tiles`` (..., C, H, W) of."""
    low, high = (np.array(ends, np.float32)[:, None, None] for ends in (bounds.low, bounds.high))
    return np.clip(np.round(tiles * (high - low) + low), 0, 255).astype(np.uint8)


def _race_elsewhere(request: Request, artefacts: Artefacts, folder: Path) -> None:
    _, failure = run_module(__name__, json.dumps(asdict(request)), str(artefacts.folder), str(folder))
    if failure:
        raise BackendError(
            f"race of {request.model}",
            expected="a process that times every backend",
            found=failure,
            cause="too little memory, or a library that crashes when it is loaded",
            remedy="name a `backend` and `precision`; cellseg-batch compile --debug shows more",
        )


def _candidates_to_race(request: Request, bundle: Bundle) -> list[tuple[str, str]]:
    """Return (backend, precision) of each candidate."""
    fitting = candidates(bundle.card.format, request.backend, request.precision, request.device)
    if request.short:
        winner = likely_winner(replace(request, short=False), bundle)
        return [] if winner is None else [winner]
    return [name for name in fitting if request.complete or may_win(name[1], request.precision)]


def _key(request: Request, bundle: Bundle) -> Key:
    conditions = {name: value for name, value in asdict(request).items() if name not in ("model", "complete")}
    return {
        "what": "race",
        "conversion_version": CONVERSION_VERSION,
        "holds": list(RaceResult.__dataclass_fields__),
        "model": bundle.card.name,
        "sha256": bundle.sha256,
        "decoder": bundle.card.decoder,
        "threshold": bundle.card.threshold,
        "downscale": sorted(bundle.card.downscale),
        "processor": processor(),
        "gpus": gpus(),
        "versions": _versions(),
        "raced": [" ".join(name) for name in _candidates_to_race(request, bundle)],
        **conditions,
    }


def _versions() -> dict[str, str | None]:
    return {package: package_version(package) for package in ("cellseg-batch", *packages())}


def main() -> None:
    """Run a race from the command line: request as JSON, folder of the artefacts, folder for the result."""
    request_json, cache, folder = sys.argv[1:]
    request = Request.from_json(json.loads(request_json))
    race_result = race(request, load_model(request.model), Artefacts(Path(cache)))
    (Path(folder) / _FILE).write_text(json.dumps(race_result.to_json(), indent=2) + "\n")


if __name__ == "__main__":
    main()
