"""What a step takes, counted without taking it: the step of a phase runs on the meta device, where tensors
have a size and no memory, and every one of them is followed from its birth to its end.

So levers, precisions and networks need no formulas of their own: what autograd keeps, what a recomputed
block sets free and what a cast doubles is seen as it happens. What lies on the device the whole time
(weights, moments, averages, the frozen network) is added from its shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tcm_fast.config import Config, RatioConfig, phase_name
from tcm_fast.kernels._triton import assuming_kernels
from tcm_fast.networks import LOGVAR_CHANNELS, Precond, build_network
from tcm_fast.networks.precision import is_derived, make_copies
from tcm_fast.networks.recompute import set_recompute
from tcm_fast.objectives.noise_levels import plan_times
from tcm_fast.objectives.objective import Batch, Objective, make_batch, row_granule
from tcm_fast.optim.fused import moment_size
from tcm_fast.optim.offload import SLOTS, piece_sizes
from tcm_fast.runtime.arithmetic import PRECISIONS

END = 1 << 20  # an iteration after every schedule's end
FROZEN = ("tcm", "cd")
KINDS = (
    "weights", "gradients", "moments", "averages", "frozen", "activations", "workspace", "images",
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


# ---- counting -----------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Follows every tensor that is made inside, by its storage.

    Attributes:
        live, peak: bytes now, and at most so far.
        grads, peak_grads: of these, in tensors handed to `is_gradient`.
        work: (floating-point operations, bytes read and written) of every operation.

    Args:
        known: tensors that were there before and do not count.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.grads = self.peak_grads = 0
        self.work: list[tuple[float, int]] = []
        self._sizes: dict[int, tuple[Any, int, bool]] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._sizes[storage._cdata] = storage, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for tensor in made:
            self._see(tensor)
        if func._schema.is_mutable or not _shares_storage(made, given):
            count = flop_registry.get(func._overloadpacket) or _attention_flops(func)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.work.append((flops, sum(_bytes(x) for x in (*made, *given))))
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = storage.nbytes()
            gone = functools.partial(_forget, weakref.ref(self), key)
            self._sizes[key] = weakref.ref(storage, gone), size, False
            self.live += size
            if self.live > self.peak:
                self.peak, self.peak_grads = self.live, self.grads

    def forget(self, key: int) -> None:
        """A storage's memory was given back."""
        _, size, is_gradient = self._sizes.pop(key)
        self.live -= size
        self.grads -= size * is_gradient

    def is_gradient(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made inside as a gradient from now on."""
        key = tensor.untyped_storage()._cdata
        ref, size, known = self._sizes.get(key, (None, 0, True))
        if not known:
            self._sizes[key] = ref, size, True
            self.grads += size


def _forget(counter: weakref.ref[Counter], key: int, _: Any) -> None:
    alive = counter()
    if alive is not None:
        alive.forget(key)


def _shares_storage(made: list[torch.Tensor], given: list[torch.Tensor]) -> bool:
    theirs = {x.untyped_storage()._cdata for x in given}
    return any(x.untyped_storage()._cdata in theirs for x in made)


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _attention_flops(func: Any) -> Any:
    """Of the attention operations: two products forward, five backward."""
    name = func._overloadpacket._qualified_op_name
    products = {"tcm_fast::qkv_attention_fwd": 2, "tcm_fast::qkv_attention_bwd": 5}.get(name)
    if products is None:
        return None

    def count(*args: Any, out_val: Any, **kwargs: Any) -> int:
        n, channels, height, width = (args[0] if products == 2 else args[1]).shape
        return 2 * products * n * (height * width) ** 2 * channels // 3

    return count


# ---- a step on the meta device ------------------------------------------------------------------


@dataclass(frozen=True)
class DryStep:
    """What one optimizer step allocates and computes besides what is there all the time.

    peak, peak_grads: bytes at the worst moment, and the gradients among them; work: (operations, bytes) of
    every operation of one micro-batch; rows: its images. weights, frozen: bytes of the student, with its
    16-bit copies, and of the frozen network; elements: of every parameter.
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
    phase = config.phase(name or config.phases[0])
    learns_variance = getattr(phase, "learned_variance", False)
    with torch.device("meta"):
        return build_network(
            config.network.name,
            img_resolution=shape.resolution,
            img_channels=shape.channels,
            label_dim=shape.classes if config.network.class_conditional else 0,
            dropout=phase.dropout,
            logvar_channels=LOGVAR_CHANNELS if learns_variance else 0,
            **config.network.architecture(),
        )


def dry_step(
    config: Config, name: str, shape: ImageShape, *, on_gpu: bool, last: bool = True
) -> DryStep:
    """Run a phase's step, or two micro-batches of it, on the meta device.

    Args:
        config: the run's, levers included.
        name: the phase.
        shape: of the images.
        on_gpu: with the kernels and layouts of a GPU, instead of a CPU's.
        last: at the end of the schedule t -> r, where most targets need a network; else at its start.
    """
    return _dry_step(_what_counts(config, name), name, shape, on_gpu, last)


def _what_counts(config: Config, name: str) -> Config:
    """The configuration without what makes no difference to the tensors of a phase's step, so that steps
    that are alike are counted once."""
    phase = config.phase(name)
    plain = dataclasses.replace(
        phase, images=0, lr=1.0, warmup_images=0, decay_start=None, ema=("constant:0",), moments="fp32",
        dropout=0.1 * (phase.dropout > 0), weight_decay=0.0,
    )  # fmt: skip
    if isinstance(plain, RatioConfig):
        plain = dataclasses.replace(plain, double=1)
    levers = {
        key: getattr(config, key)
        for key in ("micro_batches", "recompute_norms", "recompute_blocks", "offload")
    }
    kept: dict[str, Any] = {name: plain, "precision": config.precision, **levers}
    return Config(network=config.network, phases=(phase_name(name),), **kept)


@functools.lru_cache(maxsize=256)
def _dry_step(config: Config, name: str, shape: ImageShape, on_gpu: bool, last: bool) -> DryStep:
    phase, dtype = config.phase(name), PRECISIONS[config.precision]
    net = build_on_meta(config, shape, name)
    augmentation = net.model.augmentation
    if augmentation is not None:
        augmentation.requires_grad_(getattr(phase, "augment", 0.0) > 0)
    if on_gpu:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_recompute(net.model, norms=config.recompute_norms, blocks_from=config.recompute_blocks)
    frozen = build_on_meta(config, shape, name) if name in FROZEN else None
    objective = Objective(name, phase, net, frozen, dtype=dtype)
    objective.apart = config.is_lean
    if is_derived(net, dtype):
        objective.folded = config.folds_rows
        objective.copies = make_copies(net, dtype, rows_too=objective.folded)
    batches = _batches(config, name, shape, on_gpu, last)

    own = [
        *net.parameters(),
        *net.buffers(),
        *(c for c in objective.copies or [] if c is not None),
    ]
    kept = objective.frozen
    others = [] if kept is None else [*kept.parameters(), *kept.buffers()]
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


def _batches(config: Config, name: str, shape: ImageShape, on_gpu: bool, last: bool) -> list[Batch]:
    """The first of a step's micro-batches, and the second where there is one."""
    phase = config.phase(name)
    iteration = END if last else 0
    plan = plan_times(phase, seed=0, images_seen=0, iteration=iteration, iterations=END)
    batches = []
    for part in plan.parts(config.micro_batches)[:2]:
        size = (len(part), shape.channels, shape.resolution, shape.resolution)
        images = torch.empty(size, dtype=torch.uint8, device="meta")
        images = images.to(memory_format=torch.channels_last)
        labels = None
        if config.network.class_conditional and shape.classes:
            labels = torch.empty(len(part), shape.classes, device="meta")
        granule = row_granule(len(part), torch.device("cuda" if on_gpu else "cpu"))
        weight = getattr(phase, "boundary_weight", 0.0)
        batch = make_batch(
            plan, part, images, labels, seed=0, step=0, boundary_weight=weight, granule=granule
        )
        batches.append(batch)
    return batches


# ---- memory by kind -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at a phase's worst moment, by kind; `host`: in the host's memory instead."""

    weights: int
    gradients: int
    moments: int
    averages: int
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
    moments = 2 * sum(moment_size(count, phase.moments) for count in step.elements)
    averages = 4 * step.parameters * len(phase.ema)
    workspace, host = 0, 0
    if config.offload:
        pieces = piece_sizes(step.elements, len(phase.ema), phase.moments)
        workspace = max(grads for _, grads in pieces)  # gradients of a piece, scaled
        workspace += max(state for state, _ in pieces) * min(SLOTS, len(pieces))
        host = moments + averages
        moments = averages = 0
    batch = phase.batch_size * (shape.bytes + 4 * shape.classes)
    return Memory(
        weights=step.weights,
        gradients=step.peak_grads,
        moments=moments,
        averages=averages,
        frozen=step.frozen,
        activations=step.peak - step.peak_grads,
        workspace=workspace,
        images=2 * batch + (0 if on_gpu else shape.count * shape.bytes),
        host=host,
    )


def with_levers(config: Config, **changes: Any) -> Config:
    """The configuration with other levers; `moments` is that of every phase."""
    moments = changes.pop("moments", None)
    if moments is not None:
        for name in dict.fromkeys(config.phases):
            changes[name] = dataclasses.replace(config.phase(name), moments=moments)
    return dataclasses.replace(config, **changes)
