"""Where a step's time goes, beside what it has to be: bytes and operations counted while it runs, time by
the profiler, limits from the measured ceilings.

Counting goes by dispatch: every operation that is no view is taken to read its arguments and to write
its results once. That is what the kernels' formulas (`cases.work`) promise for the fused operations, and
what plain PyTorch moves for the others.
"""

from __future__ import annotations

import json
import time
from collections import Counter as Multiset
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import flop_registry

from tcm_fast.benchmarks.optimizers import BYTES_PER_PARAMETER
from tcm_fast.benchmarks.steps import OurStep
from tcm_fast.kernels._backend import extension_gap
from tcm_fast.networks.layers import Conv2d
from tcm_fast.planning.counter import Counter
from tcm_fast.planning.throughput import Ceilings

# By substring of an operation's or kernel's name, first match wins.
MARKS = {
    "optimizer": (
        "optimizer", "fused_step", "_foreach", "adam", "multi_tensor", "multitensor", "sum_squares",
        "prepare_step", "update_tensors", "store_piece", "aten::lerp",
    ),
    "attention": ("attention", "fmha", "flash", "softmax", "bmm", "sdpa"),
    "convolution": (
        "conv", "cudnn", "implicit_gemm", "xmma_fprop", "xmma_dgrad", "xmma_wgrad", "winograd", "nchwtonhwc",
        "nhwctonchw", "fprop", "dgrad", "wgrad",
    ),
    "matrix product": ("addmm", "aten::mm", "aten.mm", "linear", "gemm", "gemv", "matmul", "cutlass"),
}  # fmt: skip
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "unique",
    "equal.default",
)


def category(name: str) -> str:
    """Which part of a step an operation or a kernel belongs to, by its name."""
    lower = name.lower()
    for found, marks in MARKS.items():
        if any(mark in lower for mark in marks):
            return found
    return "normalisation and pointwise"


# ---- counting -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over operations."""

    bytes: int = 0
    flops: int = 0
    launches: int = 0


class Counting(Counter):
    """Counts the operations that run inside, by name.

    by_name: operation -> Tally. `waits`: operations that make a host wait for a GPU (on a CPU nobody
    waits; they are counted all the same).
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, Tally] = defaultdict(Tally)
        self.waits: Multiset[str] = Multiset()
        self._in_optimizer = False
        self._hooks: list[Any] = []

    def __enter__(self) -> Counting:
        def entering(*_: Any) -> None:
            self._in_optimizer = True

        def leaving(*_: Any) -> None:
            self._in_optimizer = False

        self._hooks = [
            register_optimizer_step_pre_hook(entering), register_optimizer_step_post_hook(leaving)
        ]  # fmt: skip
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*raised)

    def note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        given: list[torch.Tensor],
        made: list[torch.Tensor],
    ) -> None:
        name = f"{func.namespace}::{func._overloadpacket.__name__}"
        if self._in_optimizer:  # whose step counts lie on the host
            name = f"optimizer {name}"
        elif any(mark in str(func) for mark in WAITING):
            self.waits[name] += 1
        if self._moves_nothing(func, given, made):
            return
        tally = self.by_name[name]
        tally.launches += 1
        tally.bytes += sum(map(footprint, _distinct(given))) + sum(map(footprint, made))
        if func._overloadpacket in flop_registry:
            tally.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)

    @staticmethod
    def _moves_nothing(func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
        """Views, empty buffers, questions about tensors."""
        is_question = func.namespace == "prim" or not (made or given)
        return func.is_view or is_question or func._overloadpacket.__name__ in UNTOUCHED

    @property
    def total(self) -> Tally:
        tallies = self.by_name.values()
        return Tally(
            sum(t.bytes for t in tallies), sum(t.flops for t in tallies), sum(t.launches for t in tallies)
        )  # fmt: skip

    def by_category(self) -> dict[str, Tally]:
        found: dict[str, Tally] = defaultdict(Tally)
        for name, tally in self.by_name.items():
            into = found[category(name)]
            into.bytes += tally.bytes
            into.flops += tally.flops
            into.launches += tally.launches
        return dict(found)


UNTOUCHED = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "set_", "resize_", "is_same_size",
}  # fmt: skip


def footprint(x: torch.Tensor) -> int:
    """Bytes of memory that a tensor's elements take; an expanded one counts once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(x): x for x in tensors}.values())


# ---- roofline -----------------------------------------------------------------------------------


@dataclass
class RooflineRow:
    """One part of a step. seconds: measured; limit: the least time for its bytes and operations at the
    measured ceilings; bound: which of the two it is, copy or matmul."""

    part: str
    seconds: float
    limit: float
    bytes: int = 0
    flops: int = 0
    launches: int = 0
    bound: str = ""


def _is_kernel(event: Any, is_cuda: bool) -> bool:
    """Whether a profile's row is of the kind that takes the time: kernels on a GPU (named ranges are
    reported for it too), operations on a CPU."""
    on_device = event.device_type == torch.autograd.DeviceType.CUDA
    is_range = on_device and getattr(event, "is_user_annotation", False)
    return (
        is_cuda == on_device and not is_range and not event.key.startswith(("ProfilerStep", "cuda"))
    )


def _device_seconds(event: Any, is_cuda: bool) -> float:
    return (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e6


def _timed_by_category(step: Callable[[], object], is_cuda: bool) -> tuple[dict[str, float], float]:
    """Seconds of a step's operations (CPU) or kernels (GPU) by category, and of the whole step, all from
    one profiled run."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    with profile(activities=activities) as prof:
        begun = time.perf_counter()
        step()
        if is_cuda:
            torch.cuda.synchronize()
        whole = time.perf_counter() - begun
    found: dict[str, float] = defaultdict(float)
    for event in prof.key_averages():
        if _is_kernel(event, is_cuda):
            found[category(event.key)] += _device_seconds(event, is_cuda)
    return found, whole


def roofline(
    step: OurStep, ceilings: Ceilings, precision: str, repeats: int = 3
) -> list[RooflineRow]:
    """The parts of a training step, slowest first, beside their limits; gaps and the whole come last.

    Time is the median over `repeats` profiled runs; the profiler makes small operations look slower
    than they are, and the gaps with them."""
    is_cuda = step.case.device == "cuda"
    for _ in range(3):
        step()
    with Counting() as counting:
        step()
    tallies = counting.by_category()
    runs = [_timed_by_category(step, is_cuda) for _ in range(repeats)]
    times, whole = sorted(runs, key=lambda run: run[1])[repeats // 2]
    begun = time.perf_counter()
    for _ in range(repeats):
        step.prepare()
    data = (time.perf_counter() - begun) / repeats

    parameters = sum(p.numel() for p in step.net.parameters())
    rows = []
    for part in sorted(set(tallies) | set(times), key=lambda k: -times.get(k, 0)):
        tally = tallies.get(part, Tally())
        num_bytes = tally.bytes
        if part == "optimizer" and not extension_gap(torch.device(step.case.device)):
            num_bytes += (
                BYTES_PER_PARAMETER * parameters
            )  # dispatch does not see it: it gets addresses
        flops_bound = tally.flops / ceilings.matmul.get(precision, max(ceilings.matmul.values()))
        bound = "matmul" if flops_bound > num_bytes / ceilings.copy else "copy"
        limit = ceilings.seconds(num_bytes, tally.flops, precision)
        rows.append(
            RooflineRow(
                part, times.get(part, 0.0), limit, num_bytes, tally.flops, tally.launches, bound
            )
        )
    busy = sum(row.seconds for row in rows)
    rows.append(RooflineRow("data (on the host)", data, 0.0))
    rows.append(RooflineRow("gaps and Python", max(0.0, whole - busy), 0.0))
    total = Tally(sum(r.bytes for r in rows), sum(r.flops for r in rows), counting.total.launches)
    rows.append(
        RooflineRow(
            "whole step",
            whole,
            sum(r.limit for r in rows),
            total.bytes,
            total.flops,
            total.launches,
        )
    )
    return rows


# ---- profile ------------------------------------------------------------------------------------


@contextmanager
def named_ranges(net: torch.nn.Module, prefix: str = "") -> Iterator[None]:
    """Inside, every module's forward pass is a range of the profile under the module's name, and on a GPU
    an NVTX range too."""
    handles, open_ranges = [], list[Any]()
    on_gpu = torch.cuda.is_available()

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            found = record_function(name)
            found.__enter__()
            open_ranges.append(found)
            if on_gpu:
                torch.cuda.nvtx.range_push(name)

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)
        if on_gpu:
            torch.cuda.nvtx.range_pop()

    for path, module in net.named_modules():
        # Watched by a hook, a convolution would no longer carry out the sum that it ends.
        ends_sum = isinstance(module, Conv2d) and path.endswith((".skip", ".proj"))
        if path and not ends_sum:
            handles.append(module.register_forward_pre_hook(enter(prefix + path)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Profile:
    """kernels: (name, calls, seconds, category) of each kernel (on a CPU, operation), slowest first;
    modules: (name, calls, seconds) of each named range, children included; trace: the file written."""

    kernels: list[tuple[str, int, float, str]]
    modules: list[tuple[str, int, float]]
    trace: Path
    seconds: float = 0.0


def profile_step(step: OurStep, out: Path) -> Profile:
    """One step under the profiler: a Chrome trace (chrome://tracing, ui.perfetto.dev) and tables."""
    is_cuda = step.case.device == "cuda"
    for _ in range(3):
        step()
    frozen = step.objective.frozen
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    out.mkdir(parents=True, exist_ok=True)
    trace = out / "trace.json"
    inner = stage1_ranges(frozen)
    with named_ranges(step.net.model), inner, profile(activities=activities) as prof:
        begun = time.perf_counter()
        step()
        if is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    prof.export_chrome_trace(str(trace))
    names = {path for path, _ in step.net.model.named_modules() if path}
    names |= {f"stage1.{path}" for path in names}
    kernels, modules = [], []
    for event in prof.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if event.key in names:
            if not on_device:
                total = event.device_time_total if is_cuda else event.cpu_time_total
                modules.append((event.key, event.count, total / 1e6))
        elif _is_kernel(event, is_cuda):
            spent = _device_seconds(event, is_cuda)
            kernels.append((event.key, event.count, spent, category(event.key)))
    kernels.sort(key=lambda row: -row[2])
    modules.sort(key=lambda row: -row[2])
    table = {
        "seconds": seconds,
        "kernels": [dict(zip(("name", "calls", "seconds", "part"), k, strict=True)) for k in kernels],
        "modules": [dict(zip(("name", "calls", "seconds"), m, strict=True)) for m in modules],
    }  # fmt: skip
    (out / "profile.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return Profile(kernels, modules, trace, seconds)


@contextmanager
def stage1_ranges(frozen: torch.nn.Module | None) -> Iterator[None]:
    """The frozen network's modules as ranges stage1.NAME, where there is one."""
    if frozen is None:
        yield
        return
    with named_ranges(frozen.model, "stage1."):
        yield
