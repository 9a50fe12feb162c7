"""One optimizer step on all tensors of a network: gradient norm, unscaling, skipping of non-finite
gradients, clipping, Adam, AdamW or RAdam, normalisation of rows (Karras et al. 2024), EMA
and 16-bit copies of the new weights, each element read and written once.

The formulas are torch.optim's (Kingma & Ba 2015; Loshchilov & Hutter 2019; Liu et al. 2020), clipping is
torch.nn.utils.clip_grad_norm_'s, the loss scale moves by torch.amp.GradScaler's rules.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tcm_fast.kernels._backend import extension_for
from tcm_fast.kernels.eight_bit import (
    TOP,
    can_be_packed,
    pack_8_bits_reference,
    packed_size,
    unpack_8_bits_reference,
)
from tcm_fast.kernels.normalized_copy import (
    normalized_copy,
    normalized_rows,
    projected_gradient,
    row_size,
)
from tcm_fast.kernels.philox import philox_words_reference

COPY_DTYPES = (torch.float16, torch.bfloat16)
KINDS = {"adam": 0, "radam": 1}
_DECOUPLED = 2
_NUMEL, _ROW = 6, 9  # csrc/fused_step.h: Field
_ALIGNED, _BFLOAT, _MOMENTS_16, _FLOAT_COPY, _MOMENTS_8 = 1, 2, 4, 8, 32
_MOMENTS_LAYER = 0x6D6F6D74
_CONTROL_DTYPES = {
    "norm": torch.float64,
    "skips": torch.int64,
    "scale": torch.float32,
    "tracker": torch.int32,
}


@dataclass(eq=False, slots=True)
class StepTensors:
    """A parameter and what a step changes with it: all of its shape, in its layout, on its device."""

    param: torch.Tensor
    grad: torch.Tensor | None = None
    """None: the parameter stays; its EMA and its copy follow all the same."""
    exp_avg: torch.Tensor | None = None
    """The moments: the parameter's dtype, or for both bf16 or 8 bits (uint8, see `eight_bit`)."""
    exp_avg_sq: torch.Tensor | None = None
    step: torch.Tensor | None = None
    """Steps taken, fp32 scalar. A skipped step is none."""
    emas: tuple[torch.Tensor, ...] = ()
    copy: torch.Tensor | None = None
    """fp16 or bf16; receives the new weights."""
    group: int = 0
    normalized: bool = False
    """Only the direction of each row of the parameter [out, ...] counts: the network computes with its
    `normalized_copy`, which is `copy` (or fp32), and `grad` is with respect to that. A step takes the
    gradient to the parameter and normalises the new rows in place; the EMA sees them before, as in EDM2,
    which normalises when the next step begins."""

    @property
    def row(self) -> int:
        """Elements of a row where rows are normalised, else 0."""
        return row_size(self.param) if self.normalized else 0

    @property
    def is_packed(self) -> bool:
        """Whether the moments are 8-bit."""
        return self.exp_avg is not None and self.exp_avg.dtype == torch.uint8

    def like_param(self) -> list[tuple[str, torch.Tensor | None]]:
        """What has the parameter's dtype and layout, by name."""
        named = [("grad", self.grad)]
        if not self.is_packed:
            named += [("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)]
        return named + [(f"emas[{k}]", average) for k, average in enumerate(self.emas)]


@dataclass(frozen=True)
class StepOptions:
    """What a group of parameters shares."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    kind: Literal["adam", "radam"] = "adam"
    decoupled: bool = False
    """Weight decay shrinks the weights (AdamW) instead of being added to the gradient (L2)."""

    def values(self) -> tuple[float, ...]:
        kind = KINDS[self.kind] | _DECOUPLED * self.decoupled
        return (self.lr, *self.betas, self.eps, self.weight_decay, kind)


@dataclass
class StepControl:
    """What a step decides and remembers, on the parameters' device."""

    norm: torch.Tensor
    """fp64 scalar: the last gradient's norm, unscaled; NaN where it was not finite."""
    skips: torch.Tensor
    """int64 scalar: steps skipped so far."""
    scale: torch.Tensor | None = None
    """fp32 scalar: the loss scale, or None without one."""
    tracker: torch.Tensor | None = None
    """int32 scalar: steps since the scale changed."""
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    seed: int = 0
    """Of the random rounding of moments in 16 or 8 bits, below 2**32."""

    @classmethod
    def on(cls, device: torch.device | str, scale: float | None = None, **rules) -> "StepControl":
        """A fresh one. `rules`: growth, backoff, interval, seed."""
        norm = torch.zeros((), dtype=torch.float64, device=device)
        skips = torch.zeros((), dtype=torch.int64, device=device)
        if scale is None:
            return cls(norm, skips, **rules)
        value = torch.full((), scale, dtype=torch.float32, device=device)
        return cls(norm, skips, value, torch.zeros((), dtype=torch.int32, device=device), **rules)


# -- reference ------------------------------------------------------------------------------------


def step_size_reference(options: StepOptions, step: float) -> tuple[float, float, bool]:
    """(step size, factor of the second moment's root, adapted) at step number `step`, from 1."""
    beta1, beta2 = options.betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    if options.kind == "adam":
        return options.lr / correction1, correction2**-0.5, True
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction2
    if length <= 5:
        return options.lr / correction1, 1.0, False
    rectified = (length - 4) * (length - 2) * longest
    rectified /= (longest - 4) * (longest - 2) * length
    return options.lr * math.sqrt(correction2 * rectified) / correction1, 1.0, True


@torch.no_grad()
def fused_step_reference(
    tensors: Sequence[StepTensors],
    groups: Sequence[StepOptions],
    control: StepControl,
    *,
    ema_decays: Sequence[float] = (),
    max_norm: float = math.inf,
) -> None:
    """Tensor by tensor in plain PyTorch, in the parameters' dtype; waits for the device."""
    moved: list[Any] = [t for t in tensors if t.grad is not None]
    finite = all(bool(t.grad.isfinite().all()) for t in moved)
    grads = [projected_gradient(t.grad, t.param) if t.normalized else t.grad for t in moved]
    squares = [grad.double().square().sum() for grad in grads]
    scale = 1.0 if control.scale is None else control.scale.item()
    norm = math.sqrt(sum(s.item() for s in squares)) / scale if finite else math.nan
    control.norm.fill_(norm)
    if control.scale is not None and control.tracker is not None:
        tracker = control.tracker.item() + 1 if finite else 0
        after = scale if finite else scale * control.backoff
        if tracker == control.interval:
            grown = torch.tensor(scale * control.growth, dtype=torch.float32).item()
            after, tracker = grown if math.isfinite(grown) else after, 0
        control.scale.fill_(after)
        control.tracker.fill_(tracker)
    if not finite:
        control.skips += 1
        return
    factor = min(max_norm / (norm + 1e-6), 1.0) / scale
    for index, t in enumerate(tensors):
        updated = t.param
        if t.grad is not None:
            _update_reference(t, groups[t.group], factor, control.seed, index)
            if t.normalized:
                updated = t.param.clone()
                t.param.copy_(normalized_rows(t.param))
        for average, beta in zip(t.emas, ema_decays, strict=True):
            average.lerp_(updated, 1 - beta)
        if t.copy is not None:
            t.copy.copy_(normalized_copy(t.param) if t.normalized else t.param)


def _update_reference(t: Any, options: StepOptions, factor: float, seed: int, index: int) -> None:
    t.step += 1
    step = int(t.step.item())
    size, root_scale, adapted = step_size_reference(options, step)
    beta1, beta2 = options.betas
    grad = (projected_gradient(t.grad, t.param) if t.normalized else t.grad) * factor
    if options.decoupled:
        t.param *= 1 - options.lr * options.weight_decay
    else:
        grad += options.weight_decay * t.param
    is_short = t.exp_avg.dtype != t.param.dtype
    if t.is_packed:
        first, second = (
            unpack_8_bits_reference(getattr(t, key), t.param, top, t.row).to(t.param.dtype)
            for key, top in TOP.items()
        )
    else:
        first, second = t.exp_avg.to(t.param.dtype), t.exp_avg_sq.to(t.param.dtype)
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if adapted:
        denominator = second.sqrt().mul_(root_scale).add_(options.eps)
        t.param.addcdiv_(first, denominator, value=-size)
    else:
        t.param.add_(first, alpha=-size)
    if is_short:
        words = random_words_reference(t.param, seed, step, index)
    if t.is_packed:
        bits = {"exp_avg": words & 0xFFFF, "exp_avg_sq": words >> 16}
        for (key, top), x in zip(TOP.items(), (first, second), strict=True):
            getattr(t, key).copy_(pack_8_bits_reference(x.float(), top, t.row, bits[key]))
    elif is_short:
        t.exp_avg.copy_(round_at_random_reference(first, words & 0xFFFF))
        t.exp_avg_sq.copy_(round_at_random_reference(second, words >> 16))


def random_words_reference(param: torch.Tensor, seed: int, step: int, index: int) -> torch.Tensor:
    """int64 below 2**32 in the layout of `param`: word e % 4 of Philox's block e / 4 for the element
    that is e-th in memory."""
    sample, *key = (torch.tensor(x, device=param.device) for x in ([index], seed, step))
    blocks = -(-param.numel() // 4)
    words = philox_words_reference(sample, *key, _MOMENTS_LAYER, blocks).flatten()
    return words[: param.numel()].as_strided(param.shape, param.stride())


def round_at_random_reference(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """fp32 to one of its two bf16 neighbours by 16 random bits, so that the mean stays."""
    bits = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    short = ((bits + words) >> 16) & 0xFFFF
    return torch.where(short > 0x7FFF, short - 0x10000, short).to(torch.int16).view(torch.bfloat16)


# -- launchers ------------------------------------------------------------------------------------


def in_layout(tensor: torch.Tensor, param: torch.Tensor) -> bool:
    """Same shape, and elements in the same places."""
    if tensor.stride() == param.stride():
        return tensor.shape == param.shape
    if tensor.shape != param.shape:
        return False
    pairs = zip(tensor.shape, tensor.stride(), param.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in pairs) or tensor.numel() == 0


def _is_dense(tensor: torch.Tensor) -> bool:
    """Elements fill a block of memory without gaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


@dataclass
class StepTable:
    """The addresses of a step's tensors where the kernels read them; written anew when one has moved.

    It holds on to every tensor whose address it has given away."""

    tensors: Sequence[StepTensors] = ()
    places: list[Any] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    host: torch.Tensor | None = None
    device: torch.Tensor | None = None
    """The table that the next launch reads: `eager`, or that of the graph being captured."""
    eager: torch.Tensor | None = None
    """Of the steps that are in no graph, at one address for good."""
    chunks: torch.Tensor | None = None
    rows: int = 0
    """How many of the chunks, the last ones, are rows that are normalised."""
    longest: int = 0
    """Elements of the longest such row."""
    eight: bool = False
    """Whether some of the moments are 8-bit."""
    options: torch.Tensor | None = None
    """fp64, on the device."""
    stored: tuple[float, ...] = ()
    """What the options were last filled with."""
    scratch: torch.Tensor | None = None
    reserved: tuple[torch.Tensor, torch.Tensor] | None = None
    """Pinned and device memory for the table of the graph that `capturing` is about to capture."""
    captured: list[Any] = field(default_factory=list)
    """What graphs read when they are replayed: kept for good."""

    def place(self, ext: Any, tensors: Sequence[StepTensors], groups: int) -> None:
        """Check the tensors and write their addresses down, unless all are where they were."""
        on_cuda = tensors[0].param.device.type == "cuda"
        capturing = on_cuda and torch.cuda.is_current_stream_capturing()
        places = [
            place
            for t in tensors
            for place in (
                t.param.data_ptr(),
                None if t.grad is None else (t.grad.data_ptr(), t.grad.stride()),
                None if t.exp_avg is None else t.exp_avg.data_ptr(),
                None if t.exp_avg_sq is None else t.exp_avg_sq.data_ptr(),
                None if t.step is None else t.step.data_ptr(),
                None if t.copy is None else t.copy.data_ptr(),
                t.group,
                t.normalized,
                *(average.data_ptr() for average in t.emas),
            )
        ]
        are_others, have_moved = tensors is not self.tensors, places != self.places
        if are_others or have_moved:
            _check_tensors(tensors, groups)
            rows = [_row(t) for t in tensors]
            # The device's copy of pinned memory waits for nothing; a capture must not allocate any.
            host = torch.tensor(rows, dtype=torch.int64, pin_memory=on_cuda and not capturing)
            ext.fused_step_check(host.data_ptr(), len(rows), len(tensors[0].emas), groups)
            self.tensors, self.places, self.host = tensors, places, host
            self.eight = any(t.is_packed for t in tensors)
            # Gradients come and go, and are known by their places; nothing else may be freed.
            self.held = [
                (t.param, t.exp_avg, t.exp_avg_sq, t.step, t.copy, *t.emas) for t in tensors
            ]
        if not on_cuda:
            return
        if capturing:
            self._place_in_graph(are_others)
            return
        if are_others:
            self._allocate(ext, tensors[0].param.device)
        if are_others or have_moved or self.device is not self.eager:
            assert self.eager is not None
            self.device = self.eager.copy_(self.host, non_blocking=True)

    def _allocate(self, ext, device: torch.device) -> None:
        """Device memory for the table, and the chunks of work, which depend on sizes alone."""
        assert self.host is not None
        numel, row = self.host[:, _NUMEL], self.host[:, _ROW]
        sizes = -(-numel // row.where(row > 0, torch.tensor(ext.FUSED_STEP_CHUNK)))
        self.rows, self.longest = int(sizes[row > 0].sum()), int(row.max())
        order = (row > 0).to(torch.int32).argsort(stable=True)  # rows come last
        sizes = sizes[order]
        number = order.repeat_interleave(sizes)
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        within = torch.arange(len(number)) - first
        self.chunks = torch.stack([number, within], 1).to(torch.int32).to(device)
        self.eager = torch.empty_like(self.host, device=device)
        size = ext.fused_step_scratch(len(self.host), len(self.chunks))
        if self.scratch is None or len(self.scratch) < size:
            self.scratch = torch.zeros(size, dtype=torch.float64, device=device)

    def _place_in_graph(self, are_others: bool) -> None:
        if self.reserved is None or are_others:
            raise ValueError(
                "fused_step: a graph must be captured inside `capturing()` of the optimizer (or of the "
                "StepTable), after a step with the same tensors"
            )
        pinned, self.device = self.reserved
        pinned.copy_(self.host)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Around the capture of a CUDA graph that contains one step. The graph reads a table of its own,
        which is written once, behind the capture in the current stream.

        Raises:
            ValueError: no step has been taken yet.
        """
        if self.eager is None:
            raise ValueError("fused_step: take a step before a graph is captured")
        pinned = torch.empty(self.eager.shape, dtype=self.eager.dtype, pin_memory=True)
        self.reserved = pinned, torch.empty_like(self.eager)
        try:
            yield
            if self.device is self.reserved[1]:
                self.device.copy_(pinned, non_blocking=True)
                self.captured.append((self.device, self.chunks, self.scratch, self.held))
        finally:
            self.reserved = None

    def store_options(self, ext: Any, values: tuple[float, ...], device: torch.device) -> None:
        """Put the options where the kernels read them, in the stream's order."""
        if self.options is None or len(self.options) != len(values):
            self.options, self.stored = torch.zeros(len(values), dtype=torch.float64), ()
            self.options = self.options.to(device)
        if values == self.stored:
            return
        if device.type == "cpu":
            self.options.copy_(torch.tensor(values, dtype=torch.float64))
        elif torch.cuda.is_current_stream_capturing():
            raise ValueError("fused_step: options must not change while a graph is captured")
        else:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream().cuda_stream
                ext.store_options_cuda(self.options.data_ptr(), values, stream)
        self.stored = values


def _row(t: StepTensors) -> list[int]:
    """csrc/fused_step.h: Field."""
    addresses = [
        0 if x is None else x.data_ptr()
        for x in (t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.step, t.copy)
    ]
    if t.grad is not None and not t.param.numel():
        addresses[1] = addresses[4]  # an empty gradient has no address, yet its step counts
    emas = [average.data_ptr() for average in t.emas]
    is_short = t.exp_avg is not None and t.exp_avg.dtype == torch.bfloat16
    moments = [address << (2 if t.is_packed else is_short) for address in addresses[2:4]]
    copy = torch.float16 if t.copy is None else t.copy.dtype
    row = t.row
    wide = [*addresses[:2], *moments, *emas, addresses[5] * 4 // copy.itemsize, 4 * row]
    flags = _ALIGNED * all(a % 16 == 0 for a in wide) | _MOMENTS_16 * is_short
    flags |= _MOMENTS_8 * t.is_packed
    flags |= _BFLOAT * (copy == torch.bfloat16) | _FLOAT_COPY * (copy == torch.float32)
    return [*addresses, t.param.numel(), t.group, flags, row, *emas]


def _options(groups, control: StepControl, ema_decays, max_norm: float) -> tuple[float, ...]:
    """csrc/fused_step.h: Option, the EMA decays, the groups' options."""
    rules = (max_norm, control.growth, control.backoff, float(control.interval), control.seed)
    return (*rules, *ema_decays, *(value for group in groups for value in group.values()))


def launch_fused_step(ext, tensors, groups, control, ema_decays, max_norm, table) -> None:
    """Through the extension, on the tensors' device."""
    device = tensors[0].param.device
    table.place(ext, tensors, len(groups))
    table.store_options(ext, _options(groups, control, ema_decays, max_norm), device)
    scale = 0 if control.scale is None else control.scale.data_ptr()
    tracker = 0 if control.tracker is None else control.tracker.data_ptr()
    decided = (control.norm.data_ptr(), control.skips.data_ptr(), scale, tracker)
    sizes = (len(tensors), len(ema_decays))
    options = (table.options.data_ptr(), len(groups))
    if device.type == "cpu":
        threads = torch.get_num_threads()
        ext.fused_step_cpu(table.host.data_ptr(), *sizes, *options, *decided, threads)
        return
    chunks, scratch = table.chunks, table.scratch
    with torch.cuda.device(device):
        ext.fused_step_cuda(
            *(table.device.data_ptr(), *sizes),
            *(chunks.data_ptr(), len(chunks), table.rows, table.longest, *options, *decided),
            *(
                scratch.data_ptr(),
                len(scratch),
                table.eight,
                torch.cuda.current_stream().cuda_stream,
            ),
        )


# -- public function ------------------------------------------------------------------------------
# No torch.library operation: it changes its arguments outside autograd, once per step, and is never
# part of a compiled graph.


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"fused_step: {rule}")


def _check_tensors(tensors: Sequence[StepTensors], groups: int) -> None:
    """ValueError unless every tensor fits its parameter."""
    first = tensors[0] if tensors else None
    for i, t in enumerate(tensors):
        assert first is not None
        p, where = t.param, f"of tensor {i}"
        _require(not p.is_sparse and _is_dense(p), f"param {where} must be dense")
        _require(p.device == first.param.device, f"param {where} must be on {first.param.device}")
        _require(0 <= t.group < groups, f"group {where} must be below {groups}, got {t.group}")
        same = len(t.emas) == len(first.emas)
        _require(same, f"emas {where} must be {len(first.emas)}, got {len(t.emas)}")
        if t.is_packed:
            _check_packed(t, where)
        for name, x in t.like_param():
            if x is None:
                continue
            dtype = p.dtype
            if name in ("exp_avg", "exp_avg_sq") and t.exp_avg is not None:
                dtype = torch.bfloat16 if t.exp_avg.dtype == torch.bfloat16 else p.dtype
            shape = f"{dtype} {list(p.shape)} on {p.device}"
            got = f"{x.dtype} {list(x.shape)} on {x.device}"
            fits = x.dtype == dtype and x.shape == p.shape and x.device == p.device
            _require(fits, f"{name} {where} must be {shape}, got {got}")
            _require(in_layout(x, p), f"{name} {where} must have the strides of the parameter")
        if t.grad is not None:
            given = t.exp_avg is not None and t.exp_avg_sq is not None and t.step is not None
            _require(given, f"exp_avg, exp_avg_sq and step {where} must come with a gradient")
        if t.step is not None:
            fits = t.step.dtype == torch.float32 and t.step.numel() == 1
            fits &= t.step.device == p.device
            got = f"{t.step.dtype} {list(t.step.shape)} on {t.step.device}"
            _require(fits, f"step {where} must be an fp32 scalar on {p.device}, got {got}")
        if t.copy is not None:
            wide = (torch.float32,) * t.normalized
            fits = t.copy.dtype in (*COPY_DTYPES, *wide) and t.copy.device == p.device
            kinds = "fp16, bf16 or fp32" if wide else "fp16 or bf16"
            _require(fits, f"copy {where} must be {kinds} on {p.device}, got {t.copy.dtype}")
            _require(in_layout(t.copy, p), f"copy {where} must have the shape of the parameter")
        if t.normalized:
            rows = p.ndim > 1 and (row_size(p) > 0 or p.shape[0] == 0)
            rule = f"param {where} must have rows, one after another in memory, to be normalised"
            apart = p.numel() == 0 or p.shape[0] == 1 or p.stride(0) == row_size(p)
            _require(rows and apart, f"{rule}, got {list(p.shape)} with strides {p.stride()}")


def _check_packed(t: StepTensors, where: str) -> None:
    p, size = t.param, packed_size(t.param.numel(), t.row)
    whole = can_be_packed(p.numel(), t.row) and p.dtype == torch.float32
    rule = f"8-bit moments {where} must be of fp32, in rows of a multiple of 4 elements"
    _require(whole, f"{rule}, got {p.dtype} {list(p.shape)}")
    for name, x in (("exp_avg", t.exp_avg), ("exp_avg_sq", t.exp_avg_sq)):
        fits = x is not None and x.dtype == torch.uint8 and x.shape == (size,)
        fits = fits and x is not None and x.is_contiguous() and x.device == p.device
        got = "none" if x is None else f"{x.dtype} {list(x.shape)} on {x.device}"
        _require(fits, f"{name} {where} must be uint8 [{size}] on {p.device}, got {got}")


def _check_options(tensors, groups, control: StepControl, ema_decays, max_norm) -> None:
    """ValueError where a number is out of range or the control does not fit the tensors."""
    device, emas = tensors[0].param.device, len(tensors[0].emas)
    for name, dtype in _CONTROL_DTYPES.items():
        x = getattr(control, name)
        if x is not None:
            fits = x.dtype == dtype and x.numel() == 1 and x.device == device
            rule = f"control.{name} must be a {dtype} scalar on {device}"
            _require(fits, f"{rule}, got {x.dtype} {list(x.shape)} on {x.device}")
    together = (control.scale is None) == (control.tracker is None)
    _require(together, "control.scale and control.tracker must come together")
    for group in groups:
        _require(group.kind in KINDS, f"kind must be adam or radam, got {group.kind}")
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(group, name)
            _require(0 <= value < math.inf, f"{name} must be finite and not negative, got {value}")
        good = all(0 <= beta < 1 for beta in group.betas)
        _require(good, f"betas must be in [0, 1), got {group.betas}")
    rule = f"ema_decays must be one for each of {emas} emas"
    _require(len(ema_decays) == emas, f"{rule}, got {len(ema_decays)}")
    good = all(0 <= beta <= 1 for beta in ema_decays)
    _require(good, f"ema_decays must be in [0, 1], got {tuple(ema_decays)}")
    _require(max_norm > 0, f"max_norm must be positive, got {max_norm}")
    _require(0 <= control.seed < 2**32, f"seed must be in [0, 2**32), got {control.seed}")


def store_step_options(
    tensors: Sequence[StepTensors],
    groups: Sequence[StepOptions],
    control: StepControl,
    *,
    ema_decays: Sequence[float] = (),
    max_norm: float = math.inf,
    table: StepTable,
) -> None:
    """Bring the options of the next `fused_step` with this table to the device, in the stream's order.

    `fused_step` itself does so, but must not while a graph is captured, and cannot when one is replayed.

    Raises:
        ValueError: as `fused_step`.
    """
    if not tensors:
        return
    _check_options(tensors, groups, control, ema_decays, max_norm)
    device = tensors[0].param.device
    ext = extension_for("fused_step", device)
    if ext is not None:
        table.store_options(ext, _options(groups, control, ema_decays, max_norm), device)


def fused_step(
    tensors: Sequence[StepTensors],
    groups: Sequence[StepOptions],
    control: StepControl,
    *,
    ema_decays: Sequence[float] = (),
    max_norm: float = math.inf,
    table: StepTable | None = None,
) -> None:
    """One optimizer step, in place.

    norm = ‖grad‖/scale over all tensors, factor = min(1, max_norm/(norm + 1e-6))/scale. Where an element
    of a gradient is infinite or NaN nothing changes but `control`: its `skips`, and its scale backs off.
    Otherwise each parameter with a gradient takes a step by `factor · grad`; then every parameter's
    EMAs move, ema = decay · ema + (1 - decay) · param, and its copy is written. Where rows are
    normalised, grad is the gradient taken to the parameter in all this, the norm included.

    The extension takes fp32 parameters (others go through the reference) in a constant number of passes
    and, on CUDA, without waiting for the device: step counts, options and scale are read from its
    memory, so that a captured call can be replayed.

    Args:
        tensors: parameters and what goes with them; all on one device.
        groups: what StepTensors.group selects.
        control: norm, skips and loss scale, on the same device.
        ema_decays: one for each of the tensors' EMAs.
        max_norm: the gradient's norm above which it is scaled down to it; infinity never does.
        table: keeps what does not change from one call to the next. Give the same one every step,
            with the same list of tensors.

    Raises:
        ValueError: a tensor's shape, dtype, device or layout does not fit its parameter, an option is
            out of range.
    """
    if not tensors:
        return
    _check_options(tensors, groups, control, ema_decays, max_norm)
    device = tensors[0].param.device
    ext = extension_for("fused_step", device)
    if ext is not None and all(t.param.dtype == torch.float32 for t in tensors):
        table = StepTable() if table is None else table
        launch_fused_step(ext, tensors, groups, control, ema_decays, max_norm, table)
        return
    _check_tensors(tensors, len(groups))
    fused_step_reference(tensors, groups, control, ema_decays=ema_decays, max_norm=max_norm)
