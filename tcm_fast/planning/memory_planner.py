"""What fits, and how long it takes: memory optimizations, memory by kind and speed of each phase."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from tcm_fast.config import Config
from tcm_fast.objectives import OBJECTIVES, counts_on
from tcm_fast.objectives.noise_levels import IMAGE
from tcm_fast.planning.cards import BANDWIDTH_SHARE, GIB, LAUNCH, PCIE, Card
from tcm_fast.planning.memory_estimate import (
    DryStep,
    ImageShape,
    Memory,
    build_on_meta,
    dry_step,
    memory,
)
from tcm_fast.runtime.arithmetic import PRECISIONS

OVERHEAD = (
    1.06  # what an allocator loses between blocks, and what libraries take beside the tensors
)
OPTIMIZER_BYTES = 42  # per parameter, of one pass over weights, gradients, moments, EMA, copy
OPTIMIZATIONS = ("micro_batches", "recompute_norms", "recompute_blocks", "offload")


class DoesNotFitError(ValueError):
    """No choice of memory optimizations makes the run fit; the message says what would."""


@dataclass(frozen=True)
class PhasePlan:
    """A phase on a card. rate: images per second; images: the phase's length; rows: images of a
    micro-batch; memory: bytes by kind at the worst moment (without the allocator's loss)."""

    name: str
    batch_size: int
    rows: int
    memory: Memory
    rate: float
    images: int

    @property
    def seconds(self) -> float:
        return self.images / self.rate


@dataclass(frozen=True)
class Plan:
    """A run on a card: the configuration with its optimizations, and its phases."""

    config: Config
    card: Card
    phases: tuple[PhasePlan, ...]
    gpus: int = 1

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def peak(self) -> int:
        """Bytes that the device needs: the worst phase, with what allocator and libraries take."""
        return max(needed(phase.memory) for phase in self.phases)


def needs(held: float) -> float:
    """Bytes that a device must have for so many in tensors."""
    return held * OVERHEAD


def needed(held: Memory) -> int:
    return int(needs(held.total))


def plan_run(
    config: Config,
    shape: ImageShape,
    card: Card,
    *,
    gpus: int = 1,
    rates: Mapping[str, float] | None = None,
) -> Plan:
    """Memory and speed of a configuration's phases, as they are (see `choose_optimizations`).

    Args:
        config: of the run.
        shape: of its images.
        card: where it runs.
        gpus: how many of them; each takes its share of the batch.
        rates: images per second measured, by phase; the others are computed.
    """
    config = replace(config, micro_batches=config.micro_batches * gpus)  # rows of one of them
    found = []
    for name in config.phases:
        step = dry_step(config, name, shape, on_gpu=card.on_gpu)
        phase = config.phase(name)
        rate = (rates or {}).get(name) or gpus * computed_rate(
            config, name, shape, card, step, gpus
        )
        found.append(
            PhasePlan(
                name, phase.batch_size, step.rows,
                memory(config, name, shape, on_gpu=card.on_gpu, step=step),
                rate, config.steps(name) * phase.batch_size,
            )
        )  # fmt: skip
    return Plan(
        replace(config, micro_batches=config.micro_batches // gpus), card, tuple(found), gpus
    )


# ---- speed --------------------------------------------------------------------------------------


def computed_rate(
    config: Config, name: str, shape: ImageShape, card: Card, step: DryStep, gpus: int = 1
) -> float:
    """Images per second of one card, from operations and bytes: each operation takes the longest of its
    arithmetic, its memory traffic and a launch."""
    phase = config.phase(name)
    micro = phase.batch_size // step.rows // gpus
    at_end = _work_seconds(card, config.precision, step)
    network = micro * at_end * mean_work(config, name)
    update = OPTIMIZER_BYTES * step.parameters / (card.bandwidth * BANDWIDTH_SHARE)
    if config.offload and card.on_gpu:
        state = 4 * step.parameters * (2 + len(phase.ema))
        update = max(update, state / PCIE - 0.5 * network)  # half of the step hides copies
    return phase.batch_size / gpus / (network + update)


def _work_seconds(card: Card, precision: str, step: DryStep, scale: float = 1.0) -> float:
    """Of a micro-batch with `scale` times the images of the counted one."""
    flops, num_bytes = np.array(step.work, dtype=np.float64).reshape(-1, 2).T * scale
    arithmetic = flops / card.flops(precision)
    traffic = num_bytes / (card.bandwidth * BANDWIDTH_SHARE)
    return float(np.maximum(np.maximum(arithmetic, traffic), LAUNCH if card.on_gpu else 0).sum())


def mean_work(config: Config, name: str) -> float:
    """Work of a phase's average step over that of its last: targets that are images need no network,
    and at the start of the schedule most of them are."""
    kind, phase, steps = OBJECTIVES[name], config.phase(name), config.steps(name)
    if not kind.is_consistency or steps == 0:
        return 1.0
    start = _steps_before(config, name)

    def work(iteration: int) -> float:
        plan = kind.plan(
            phase, seed=0, images_seen=0, iteration=start + iteration, iterations=start + steps
        )
        return 3 + float((plan.source != IMAGE).mean())  # forward, backward twice as much, targets

    points = np.linspace(0, steps - 1, 16).round().astype(int)
    return float(np.mean([work(int(i)) for i in points])) / work(steps - 1)


def _steps_before(config: Config, name: str) -> int:
    """Steps of the run's phases just before one from which its iterations count on."""
    earlier = config.phases[: config.phases.index(name)] if name in config.phases else ()
    counted = takewhile(lambda before: counts_on(before, name), reversed(earlier))
    return sum(config.steps(before) for before in counted)


# ---- memory -------------------------------------------------------------------------------------


def choose_optimizations(config: Config, shape: ImageShape, card: Card, *, gpus: int = 1) -> Config:
    """The configuration with those memory optimizations with which it fits and is fastest. They
    change no number but by the order of sums; precisions and moments stay as they are.

    Raises:
        DoesNotFitError: it cannot fit; says how much it takes at least, and what would.
    """
    best = None
    for candidate in _candidates(config, shape, card, gpus):
        cut = replace(candidate, micro_batches=candidate.micro_batches * gpus)
        held = max(
            needed(memory(cut, name, shape, on_gpu=card.on_gpu))
            for name in dict.fromkeys(config.phases)
        )
        if held <= card.usable:
            return candidate
        best = min(best or held, held)
    raise _does_not_fit(config, shape, card, best)


def _candidates(config: Config, shape: ImageShape, card: Card, gpus: int) -> Iterator[Config]:
    """Choices that ought to fit by a first estimate, fastest first; after them the smallest."""
    batches = [config.phase(name).batch_size // gpus for name in config.phases]
    common = math.gcd(*batches)
    cuts = [m for m in range(1, common + 1) if common % m == 0]
    names = dict.fromkeys(config.phases)
    # The largest one; of equals that with a frozen network in train mode.
    name = max(names, key=lambda n: (config.phase(n).batch_size, OBJECTIVES[n].frozen_trains))
    batch = config.phase(name).batch_size // gpus
    found: list[tuple[float, Config]] = []
    smallest = config
    for recompute in _recomputations(shape):
        optimizations = replace(config, **recompute)
        few = max(m for m in cuts if batch // m >= min(8, batch))
        step = dry_step(
            replace(optimizations, micro_batches=gpus * few), name, shape, on_gpu=card.on_gpu
        )
        fixed, per_image = _activations(optimizations, name, shape, card, step, gpus)
        for offload in (False, True) if card.on_gpu else (False,):
            variant = replace(optimizations, offload=offload)
            held = memory(variant, name, shape, on_gpu=card.on_gpu, step=step)
            rest = held.total - held.activations - held.gradients + fixed
            smallest = replace(variant, micro_batches=cuts[-1])
            fitting = [
                m
                for m in cuts
                if needs(rest + per_image * (batch // m) + (m > 1) * 4 * step.parameters)
                <= 1.02 * card.usable
            ]
            for m in fitting[:2]:  # the estimate may be a little too low
                chosen = replace(variant, micro_batches=m)
                found.append((_step_seconds(chosen, name, card, step, batch // m), chosen))
    yield from (chosen for _, chosen in sorted(found, key=lambda pair: pair[0]))
    yield smallest


def _activations(
    config: Config, name: str, shape: ImageShape, card: Card, step: DryStep, gpus: int
) -> tuple[float, float]:
    """Bytes of a step whatever its images, and for each image of a micro-batch. In fp32 the former are
    hardly any; in 16 bits they are the casts of weights and gradients."""
    size = config.phase(name).batch_size // gpus
    micro = size // step.rows
    held = step.peak - step.peak_grads
    if PRECISIONS[config.precision].itemsize == 4 or step.rows % 2 or 2 * micro > size:
        return 0.0, held / step.rows
    half = dry_step(
        replace(config, micro_batches=2 * micro * gpus), name, shape, on_gpu=card.on_gpu
    )
    slope = max(2 * (held - (half.peak - half.peak_grads)) / step.rows, 0.0)
    return held - slope * step.rows, slope


def _step_seconds(config: Config, name: str, card: Card, step: DryStep, rows: int) -> float:
    """Of a step that is cut into micro-batches of so many images."""
    micro = config.phase(name).batch_size / rows
    network = micro * _work_seconds(card, config.precision, step, rows / step.rows)
    update = OPTIMIZER_BYTES * step.parameters / (card.bandwidth * BANDWIDTH_SHARE)
    if config.offload:
        state = 4 * step.parameters * (2 + len(config.phase(name).ema))
        update = max(update, state / PCIE - 0.5 * network)
        network *= 1.02  # of two that are equally fast, the one that leaves the bus alone
    return network + update


def _recomputations(shape: ImageShape) -> list[dict[str, Any]]:
    """From nothing to everything."""
    return [
        {"recompute_norms": False, "recompute_blocks": None},
        {"recompute_norms": True, "recompute_blocks": None},
        {"recompute_norms": True, "recompute_blocks": shape.resolution},
        {"recompute_norms": False, "recompute_blocks": 1},
    ]


def _does_not_fit(
    config: Config, shape: ImageShape, card: Card, least: int | None
) -> DoesNotFitError:
    """What the run takes at least, and what would fit."""
    width = build_on_meta(config, shape).spec["model_channels"]
    narrower = None
    for channels in range(width - 16, 31, -16):
        network = replace(config.network, model_channels=channels)
        tried = replace(config, network=network)
        try:
            check_smallest(tried, shape, card)
        except DoesNotFitError:
            continue
        except ValueError:
            continue  # a width that cannot be built
        narrower = channels
        break
    assert least is not None
    total = _card_size(least)
    advice = [f"a card of {total} GiB would do"]
    if narrower is not None:
        advice.append(f"--network.model-channels {narrower} fits")
    if PRECISIONS[config.precision].itemsize == 4 and card.on_gpu:
        advice.append("--precision fp16 takes about half of the activations")
    return DoesNotFitError(
        f"plan: {config.network.name} does not fit: with every memory optimization it takes "
        f"{least / GIB:.2f} GiB, and {card.name} has {card.usable / GIB:.2f} GiB for it; {', '.join(advice)}"
    )


def check_smallest(config: Config, shape: ImageShape, card: Card) -> None:
    """DoesNotFitError unless the run fits with all memory optimizations at their end."""
    common = math.gcd(*(config.phase(name).batch_size for name in config.phases))
    tried = replace(
        config, micro_batches=common, recompute_norms=False, recompute_blocks=1, offload=card.on_gpu
    )
    held = needed(memory(tried, config.phases[-1], shape, on_gpu=card.on_gpu))
    if held > card.usable:
        raise DoesNotFitError(f"plan: takes {held} bytes")


def _card_size(least: int) -> int:
    """GiB of the smallest usual card on which so many bytes are usable."""
    size = (least / GIB + 0.375) / (1 - 3 / 64)
    usual = (4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
    return next((gib for gib in usual if gib >= size), math.ceil(size))


def chosen_optimizations(config: Config) -> dict[str, Any]:
    """The memory optimizations that are in use, by field."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    given = {name: getattr(config, name) for name in OPTIMIZATIONS}
    return {name: value for name, value in given.items() if value != defaults[name]}
