"""What a step takes, counted without taking it: the step of a phase runs on the meta device, where tensors
have a size and no memory, and every one of them is followed from its birth to its end.

So memory optimizations, precisions and networks need no formulas of their own: what autograd keeps, what
activation checkpointing frees and what a cast doubles is counted as it happens. What is on the device the
whole time (weights, moments, EMA, the frozen network) is added from its shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tcm_fast.config import Config
from tcm_fast.kernels._triton import assuming_kernels
from tcm_fast.networks import Precond
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.batch import Batch, make_batch, row_multiple_for
from tcm_fast.objectives.construct import build_objective, build_student
from tcm_fast.optim.fused import moment_size
from tcm_fast.optim.offload import SLOTS, piece_sizes
from tcm_fast.planning.counter import Counter

END = 1 << 20  # an iteration after every schedule's end
KINDS = (
    "weights", "gradients", "moments", "ema", "frozen", "activations", "workspace", "images",
)  # fmt: skip


@dataclass(frozen=True)
class ImageShape:
    """What a network has to know of the images."""

    resolution: int
    channels: int = 3
    classes: int = 0
    count: int = 0
    """Number of images, 0 where it is not known."""

    @property
    def bytes(self) -> int:
        """Of one image, uint8."""
        return self.channels * self.resolution**2


# ---- a step on the meta device ------------------------------------------------------------------


@dataclass(frozen=True)
class DryStep:
    """What one optimizer step allocates and computes besides what is there all the time.

    peak, peak_grads: bytes at the worst moment, and the gradients among them; work: (operations, bytes) of
    every operation of one micro-batch; rows: its images. weights, frozen: bytes of the student, with its
    16-bit copies, and of frozen networks; elements: of every parameter.
    """

    peak: int
    peak_grads: int
    work: tuple[tuple[float, int], ...]
    rows: int
    weights: int
    frozen: int
    elements: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return sum(self.elements)

    @property
    def flops(self) -> float:
        """Of one micro-batch."""
        return sum(flops for flops, _ in self.work)


def build_on_meta(config: Config, shape: ImageShape, name: str = "") -> Precond:
    """The network of a phase, without memory. ValueError for one that cannot be built."""
    with torch.device("meta"):
        return build_student(
            config, name or config.phases[0], resolution=shape.resolution, channels=shape.channels,
            classes=shape.classes,
        )  # fmt: skip


def dry_step(
    config: Config, name: str, shape: ImageShape, *, on_gpu: bool, last: bool = True
) -> DryStep:
    """Run a phase's step, or two micro-batches of it, on the meta device.

    Args:
        config: the run's, memory optimizations included.
        name: the phase.
        shape: of the images.
        on_gpu: with the kernels and layouts of a GPU, instead of a CPU's.
        last: at the end of the schedule t -> r, where most targets need a network; else at its start.
    """
    return _dry_step(_what_counts(config, name), name, shape, on_gpu, last)


def _what_counts(config: Config, name: str) -> Config:
    """The configuration without what makes no difference to the tensors of a phase's step, so that steps
    that are alike are counted once."""
    phase = OBJECTIVES[name].without_schedule(config.phase(name))
    plain = dataclasses.replace(
        phase, images=0, lr=1.0, decay_start=None, ema=("constant:0",), dropout=0.1 * (phase.dropout > 0),
    )  # fmt: skip
    optimizations = {
        key: getattr(config, key)
        for key in ("micro_batches", "recompute_norms", "recompute_blocks", "offload")
    }
    kept: dict[str, Any] = {name: plain, "precision": config.precision, **optimizations}
    return type(config)(network=config.network, phases=(name,), **kept)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _dry_step(config: Config, name: str, shape: ImageShape, on_gpu: bool, last: bool) -> DryStep:
    net = build_on_meta(config, shape, name)
    frozen = build_on_meta(config, shape, name) if OBJECTIVES[name].frozen_file else None
    for built in (net, frozen):
        if on_gpu and built is not None:
            built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = build_objective(config, name, net, frozen, has_copies=True)
    batches = step_batches(config, name, shape, on_gpu, last)

    own = [
        *net.parameters(),
        *net.buffers(),
        *(c for c in objective.copies or [] if c is not None),
    ]
    others = objective.held()
    work: tuple[tuple[float, int], ...] = ()
    with (
        assuming_kernels(on_gpu),
        Counter([*own, *others]) as counter,
        _tagged(net, counter),
    ):
        for batch in batches:
            before = len(counter.work)
            loss, _ = objective(batch)
            loss.backward()
            del loss
            work = tuple(counter.work[before:])
    return DryStep(
        counter.peak, counter.peak_grads, work, len(batches[0].t), _held(own), _held(others),
        tuple(p.numel() for p in net.parameters()),
    )  # fmt: skip


def _held(tensors: list[torch.Tensor]) -> int:
    """Bytes of all storages."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@contextmanager
def _tagged(net: Precond, counter: Counter) -> Iterator[None]:
    """Gradients are known as such from when they reach their parameters."""
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p: counter.is_gradient(p.grad))
        for parameter in net.parameters()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def step_batches(
    config: Config, name: str, shape: ImageShape, on_gpu: bool, last: bool
) -> list[Batch]:
    """The first of a step's micro-batches, and the second where there is one."""
    phase = config.phase(name)
    iteration = END if last else 0
    plan = OBJECTIVES[name].plan(phase, seed=0, images_seen=0, iteration=iteration, iterations=END)
    is_labelled = config.network.class_conditional and shape.classes

    def images_and_labels(count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = (count, shape.channels, shape.resolution, shape.resolution)
        images = torch.empty(size, dtype=torch.uint8, device="meta")
        labels = torch.empty(count, shape.classes, device="meta") if is_labelled else None
        return images.to(memory_format=torch.channels_last), labels

    bank = None
    if size := OBJECTIVES[name].bank_size(phase):
        images, labels = images_and_labels(min(size, shape.count or size))
        bank = images, None if labels is None else labels.argmax(1)
    batches = []
    for part in plan.parts(config.micro_batches)[:2]:
        row_multiple = row_multiple_for(len(part), torch.device("cuda" if on_gpu else "cpu"))
        batches.append(
            make_batch(
                plan, part, *images_and_labels(len(part)), seed=0, step=0, row_multiple=row_multiple,
                bank=bank,
            )
        )  # fmt: skip
    return batches


# ---- memory by kind -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at a phase's worst moment, by kind; `host`: in the host's memory instead."""

    weights: int
    gradients: int
    moments: int
    ema: int
    frozen: int
    activations: int
    workspace: int
    images: int
    host: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)


def memory(
    config: Config, name: str, shape: ImageShape, *, on_gpu: bool, step: DryStep | None = None
) -> Memory:
    """What a phase holds on the device at its worst moment.

    Args:
        step: what `dry_step` counted for this phase, if it is known.
    """
    phase = config.phase(name)
    step = step or dry_step(config, name, shape, on_gpu=on_gpu)
    moments = 2 * sum(moment_size(count, config.moments) for count in step.elements)
    ema = 4 * step.parameters * len(phase.ema)
    workspace, host = 0, 0
    if config.offload:
        pieces = piece_sizes(step.elements, len(phase.ema), config.moments)
        workspace = max(grads for _, grads in pieces)  # gradients of a piece, scaled
        workspace += max(state for state, _ in pieces) * min(SLOTS, len(pieces))
        host = moments + ema
        moments = ema = 0
    bank = OBJECTIVES[name].bank_size(phase)
    rows = phase.batch_size + min(bank, shape.count or bank)
    batch = rows * (shape.bytes + 4 * shape.classes)
    return Memory(
        weights=step.weights,
        gradients=step.peak_grads,
        moments=moments,
        ema=ema,
        frozen=step.frozen,
        activations=step.peak - step.peak_grads,
        workspace=workspace,
        images=2 * batch + (0 if on_gpu else shape.count * shape.bytes),
        host=host,
    )
