"""Fused operations inside other projects' networks, and back again.

    report = tcm_fast.accelerate(model)     # in place; print(report)
    ...
    tcm_fast.restore(model)

A supported module gets a sub-class of its own class, whose forward method uses the fused
operations. Parameters, buffers, names, hooks and `isinstance` stay as they are; so does what has been
built on them: optimizers, EMA, checkpoints.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.weak import WeakIdKeyDictionary

from tcm_fast.drop_in.known_blocks import (
    TORCH_PROCESSORS,
    AttentionProcessor,
    Block,
    attends_to_tokens,
    attention_obstacle,
    known_attention,
    known_block,
    sub_modules,
)
from tcm_fast.drop_in.norm_silu import (
    is_norm,
    sequential_forward,
    sequential_runs,
)
from tcm_fast.networks.layers import has_hooks

# What a fused block may differ from its original in the trial, relatively: fp32 rounding is a
# thousandth of it, a different formula is off by tens of percent.
TRIAL_TOLERANCE = 1e-3

_strides: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Strides that parameters had before `accelerate` moved them to channels_last."""


@dataclass(frozen=True)
class Entry:
    """One module: its path in the model, what it is, and what was replaced in it or why it was left."""

    path: str
    kind: str
    note: str


@dataclass
class Report:
    """What `accelerate` did. `print(report)` gives a summary, the lists every module."""

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    channels_last: int = 0
    """Parameters moved to channels_last."""

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        for title, entries in (("replaced", self.replaced), ("left", self.left)):
            counts = Counter((entry.kind, entry.note) for entry in entries)
            lines += [f"  {title} {n} x {kind}: {note}" for (kind, note), n in counts.items()]
        if self.channels_last:
            lines.append(f"  moved {self.channels_last} parameters to channels_last")
        return "\n".join(lines)


def accelerate(
    model: nn.Module, *, memory_format: torch.memory_format | str | None = "auto"
) -> Report:
    """Replace, in place, what the fused operations cover in any network.

    Supported are the blocks of the U-Nets of EDM, ECT, TCM, EDM2, FastGen and PhysicsNeMo, of diffusers
    `ResnetBlock2D` and `Attention` over pixels, and in any module GroupNorm, together with the SiLU that
    follows it in an `nn.Sequential`. A block is known by its class name and parts, and replaced only
    where it computes what the published one does: both are tried on random weights, on the CPU.

    State dicts keep their names and values, parameters stay the same objects. Use it before
    DistributedDataParallel and torch.compile. Masks of dropout come from torch's generator as before,
    but are others.

    Args:
        model: any module; one that was accelerated before is brought up to date.
        memory_format: of the weights of convolutions. "auto" is channels_last on CUDA, which the fused
            operations and convolutions in 16 bits are fastest in; None leaves them.

    Returns:
        What was replaced, what was left and why.

    Raises:
        TypeError: model is not an nn.Module. ValueError: an unknown memory_format.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    if memory_format not in ("auto", None, torch.channels_last):
        raise ValueError(
            "accelerate: memory_format must be 'auto', torch.channels_last or None, "
            f"got {memory_format}"
        )
    report = Report()
    done: set[nn.Module] = set()  # parts of blocks that were replaced as a whole
    tried: dict[Any, str] = {}
    for path, module in model.named_modules():
        if module in done:
            continue
        if type(module).__module__.startswith("tcm_fast."):
            done.update(module.children())
            continue
        block = known_block(module)
        if is_accelerated(module):
            report.replaced.append(Entry(path, _kind(module), "fused before"))
            done.update(child for _, child in sub_modules(module, block.inside if block else ()))
            continue
        if block is not None:
            why = _obstacle(module, block) or _trial(module, block, tried)
            if why:
                report.left.append(Entry(path, block.label, why))
            else:
                module.__class__ = _block_class(type(module), block)  # type: ignore[arg-type]
                done.update(child for _, child in sub_modules(module, block.inside))
                report.replaced.append(Entry(path, block.label, "forward"))
        elif known_attention(module):
            _replace_processor(path, module, report, done)
        else:
            _replace_patterns(path, module, report)
    if memory_format is not None:
        report.channels_last = _to_channels_last(model, only_cuda=memory_format == "auto")
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: classes, attention processors and memory formats are what they were.

    (The weights of a copy of an accelerated model stay in channels_last.)"""
    for module in model.modules():
        if is_accelerated(module):
            vars(module).pop("_tcm_fast_runs", None)
            module.__class__ = type(module)._tcm_fast_original  # type: ignore[attr-defined]
        processor = getattr(module, "processor", None)
        if isinstance(processor, AttentionProcessor):
            module.processor = processor.original  # type: ignore[assignment]
    for parameter in model.parameters():
        stride = _strides.pop(parameter, None)
        if stride is not None:
            _set_strides(parameter, stride)


def is_accelerated(module: nn.Module) -> bool:
    """Whether a module itself was replaced (its sub-modules aside)."""
    return "_tcm_fast_original" in vars(type(module))


# ---- which modules ------------------------------------------------------------------------------


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _obstacle(module: nn.Module, block: Block) -> str:
    """Why a known block cannot be replaced, "" where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript"
    hooked = [path for path, child in sub_modules(module, block.inside) if has_hooks(child)]
    if hooked:
        return f"has forward or backward hooks on {', '.join(hooked)}"
    return block.obstacle(module)


def _replace_processor(path: str, module: Any, report: Report, done: set[nn.Module]) -> None:
    """Give a diffusers `Attention` our processor."""
    name = type(module.processor).__name__
    norm = module.group_norm
    if isinstance(module.processor, AttentionProcessor):
        why = ""
    elif name not in TORCH_PROCESSORS:
        why = f"has the processor {name}"
    elif attends_to_tokens(module):
        why = "attends to tokens, for which torch's own attention is fused already"
    elif norm is not None and has_hooks(norm):
        why = "has forward or backward hooks on group_norm"
    else:
        why = attention_obstacle(module)
    if why:
        report.left.append(Entry(path, "diffusers Attention", why))
        return
    if not isinstance(module.processor, AttentionProcessor):
        module.processor = AttentionProcessor(module.processor)
    if norm is not None:
        done.add(norm)
    report.replaced.append(Entry(path, "diffusers Attention", "processor"))


def _replace_patterns(path: str, module: nn.Module, report: Report) -> None:
    """Give an `nn.Sequential` its GroupNorm-SiLU pairs fused; what any other module calls after its
    GroupNorm is not known."""
    if type(module) is nn.Sequential:
        runs = sequential_runs(module)
        if runs:
            module.__class__ = _sequential_class()
            module._tcm_fast_runs = runs  # type: ignore[assignment]
            at = ", ".join(map(str, runs))
            report.replaced.append(Entry(path, "nn.Sequential", f"GroupNorm and SiLU at {at}"))
        return
    norms = [name for name, child in module.named_children() if is_norm(child)]
    if norms and type(module).forward is not nn.Module.forward:
        note = f"is not a known block: {', '.join(norms)} alone, what follows is not known"
        report.left.append(Entry(path, _kind(module), note))


# ---- the trial ----------------------------------------------------------------------------------


def _trial(module: nn.Module, block: Block, tried: dict[Any, str]) -> str:
    """Why a block is not what its name says, "" where it is; modules of one make are tried once."""
    options = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool)}
    options.pop("training", None)
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    key = (type(module), shapes, tuple(sorted(options.items(), key=lambda kv: kv[0])))
    if key not in tried:
        tried[key] = _try(module, block)
    return tried[key]


class _Calling(nn.Module):
    """A module, called by another function than its own forward method."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any) -> Any:
        return self.function(self.module, *args)


@torch.no_grad()
def _try(module: nn.Module, block: Block) -> str:
    """Compare a block's own forward method with ours, in train and in eval mode, without dropout."""
    with torch.random.fork_rng(devices=[]), _modes(module) as set_mode:
        torch.default_generator.manual_seed(0)
        state = {
            name: torch.randn(t.shape) / max(1, t[0].numel() if t.ndim > 1 else 1) ** 0.5
            for name, t in module.named_parameters()
        }
        state |= {
            name: b.detach().cpu().float() if b.is_floating_point() else b.cpu()
            for name, b in module.named_buffers()
        }
        state = {f"module.{name}": t for name, t in state.items()}
        inputs = block.example(module)
        for training in (True, False):
            set_mode(training)
            found = []
            for function in (type(module).forward, block.forward):
                arguments = tuple(None if x is None else x.clone() for x in inputs)
                weights = {name: t.clone() for name, t in state.items()}
                try:
                    result = functional_call(_Calling(module, function), weights, arguments)
                except Exception as error:
                    return f"could not be tried ({type(error).__name__}: {error})"
                found.append(result)
            own, ours = found
            if not isinstance(own, torch.Tensor) or own.shape != ours.shape:
                return "returns something else than the published one"
            difference = (own.float() - ours.float()).norm() / own.float().norm()
            if not difference <= TRIAL_TOLERANCE:
                return f"computes something else than the published one ({difference:.1%} apart)"
    return ""


class _modes:
    """Inside, modules are put into train or eval mode, dropout apart; afterwards they are as before."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> Callable[[bool], None]:
        self.flags = [(child, child.training) for child in self.module.modules()]
        p = vars(self.module).get("dropout")
        self.p = p if isinstance(p, int | float) else None
        if self.p is not None:
            self.module.dropout = 0.0  # type: ignore[assignment]
        return self.set

    def set(self, training: bool) -> None:
        for child, _ in self.flags:
            child.training = training and not isinstance(child, nn.Dropout)

    def __exit__(self, *_: Any) -> None:
        for child, training in self.flags:
            child.training = training
        if self.p is not None:
            self.module.dropout = self.p  # type: ignore[assignment]


# ---- classes ------------------------------------------------------------------------------------


@functools.cache
def _block_class(original: type, block: Block) -> type:
    @functools.wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return block.forward(self, *args, **kwargs)

    return _sub_class(original, {"forward": forward})


@functools.cache
def _sequential_class() -> type:
    return _sub_class(nn.Sequential, {"forward": sequential_forward})


def _sub_class(original: type, methods: dict[str, Any]) -> type:
    """A sub-class that looks like the original, is copied as itself and pickled as the original."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        # Who loads the pickle may not have this package, and the class has no name to be found by.
        reduced = super(made, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
        arguments = tuple(original if a is made else a for a in reduced[1])
        return (reduced[0], arguments, *reduced[2:])

    def deepcopy(self: Any, memo: dict) -> Any:
        copied: Any = object.__new__(made)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    own = {"_tcm_fast_original": original, "__reduce_ex__": reduce_ex}
    if not hasattr(original, "__deepcopy__"):
        own["__deepcopy__"] = deepcopy
    made: type = type(original)(original.__name__, (original,), {**names, **own, **methods})
    return made


# ---- memory formats -----------------------------------------------------------------------------


def _to_channels_last(model: nn.Module, *, only_cuda: bool) -> int:
    """Move the weights of convolutions; how many."""
    moved = 0
    for parameter in model.parameters():
        is_plain = type(parameter.data) is torch.Tensor and parameter.ndim == 4
        if not is_plain or (only_cuda and not parameter.is_cuda):
            continue
        if parameter.is_contiguous(memory_format=torch.channels_last):
            continue
        _strides[parameter] = parameter.stride()
        _set_strides(
            parameter, torch.empty_like(parameter, memory_format=torch.channels_last).stride()
        )
        moved += 1
    return moved


@torch.no_grad()
def _set_strides(parameter: nn.Parameter, stride: tuple[int, ...]) -> None:
    """Lay a parameter, and its gradient, out anew; both stay the same objects."""
    for tensor in (parameter, parameter.grad):
        if tensor is not None and tensor.stride() != stride:
            laid = torch.empty_strided(
                tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
            )
            tensor.data = laid.copy_(tensor)
