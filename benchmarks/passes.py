"""How often a training step goes over memory: operations and bytes by kind, counted on tensors without memory
with the GPU's kernels in their places; and on a GPU the launches of a captured step.

    python -m tcm_fast.benchmarks.passes --preset cifar10 --phase tcm [--precision bf16] [--json FILE]

The GPU may be a pretended one: where `fakegpu` can be imported, it is installed and its log is read. The
optimizer's passes are in the launches, not in the bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import re
import sys
import tempfile
from collections import Counter as Multiset
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from tcm_fast.benchmarks.accounting import Counting, Tally, category, footprint
from tcm_fast.config import PHASES, Config, load_preset, preset_names
from tcm_fast.kernels._common import layout_of
from tcm_fast.kernels._triton import assuming_kernels
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.construct import build_objective
from tcm_fast.planning.memory_estimate import ImageShape, build_on_meta, step_batches
from tcm_fast.runtime.arithmetic import PRECISIONS
from tcm_fast.training.trainer import Trainer

LAYOUT, COPY, BIAS, BIAS_GRADIENT = "layout conversion", "copy", "bias pass", "bias gradient"
# By substring of an operation's or kernel's name, first match wins; else by `accounting.category`.
KINDS = {
    LAYOUT: ("layoutcopy", "nchwtonhwc", "nhwctonchw"),
    COPY: ("copy_kernel", "aten::copy_", "aten::_to_copy", "clone", "memcpy"),
    "fill": (
        "memset", "fill", "aten::zero", "aten::new_zero", "aten::one", "aten::full", "scalar_tensor",
        "arange",
    ),
    "concatenation": ("catarray", "aten::cat"),
    "optimizer": ("ext sum_squares", "ext prepare_step", "ext update_tensors"),
    "reduction": ("reduce_kernel", "aten::sum", "aten::mean"),
    "addition": ("functor_add", "aten::add"),
    "fused operation": ("triton ", "tcm_fast::", "ext "),
}  # fmt: skip
KERNELS = ((1, 1), (3, 3))  # of convolutions; feature maps have other sizes
# whose kernels read slices of channels as they lie, of one tensor
BY_ROW = ("tcm_fast::residual_bwd", "tcm_fast::group_norm_silu_bwd")
CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
RESULT = re.compile(r"(RUN|CAP) (?:kernel )?(.+)")


def kind(name: str) -> str:
    """Which kind of pass an operation or a kernel is, by its name. Fused attention is attention."""
    lower, part = name.lower(), category(name)
    if "copy" in lower and ("_foreach" in lower or "multi_tensor" in lower):
        return COPY
    if part in ("attention", "convolution", "matrix product") and "layoutcopy" not in lower:
        return LAYOUT if any(mark in lower for mark in KINDS[LAYOUT]) else part
    found = (key for key, marks in KINDS.items() if any(mark in lower for mark in marks))
    return next(found, "pointwise" if part == "normalisation and pointwise" else part)


# ---- counted on the meta device ------------------------------------------------------------------


class Passes(Counting):
    """Counts the operations that run inside by kind, and with them what they hide: a convolution's bias,
    which is a pass of its own over its result, and its gradient, one over the result's; conversions where a
    library gets a layout that it does not compute in; copies where an operation of ours gets a tensor that
    is not dense.

    by_kind: kind -> Tally. moved: (kind, operation, shape, strides) of each conversion and each copy of an
    activation [N,C,H,W].
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: dict[str, Tally] = defaultdict(Tally)
        self.moved: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if (
            func._overloadpacket in CONVOLUTIONS and args[0].is_meta
        ):  # the meta device does not know cuDNN's layout
            is_backward = isinstance(out, tuple)
            layout = _cudnn_layout(*(args[1:3] if is_backward else args[:2]))
            laid = [
                x if x is None or x.ndim != 4 else torch.empty_like(x, memory_format=layout)
                for x in (out if is_backward else [out])
            ]
            return tuple(laid) if is_backward else laid[0]
        return out

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
        before = dataclasses.replace(self.by_name[name]) if name in self.by_name else Tally()
        super().note(func, args, kwargs, out, given, made)
        if name not in self.by_name or self.by_name[name] == before:
            return
        after, found = self.by_name[name], kind(name)
        if found == COPY:
            source = given[-1] if given else made[0]
            if made and made[0].ndim == 4 and made[0].dtype == source.dtype:
                is_weight = tuple(made[0].shape[2:]) in KERNELS
                self._moved(COPY, f"{name} weight" if is_weight else name, source)
        tally = self.by_kind[found]
        tally.bytes += after.bytes - before.bytes
        tally.flops += after.flops - before.flops
        tally.launches += after.launches - before.launches
        if name == "aten::convolution":
            x, weight, bias = args[:3]
            self._converted(name, input=x, weight=weight)
            if bias is not None:
                self._hidden(BIAS, 2 * footprint(made[0]))
        elif name == "aten::convolution_backward":
            grad, x, weight = args[:3]
            self._converted(name, input=x, weight=weight, gradient=grad)
            if args[-1][2]:
                self._hidden(BIAS_GRADIENT, footprint(grad))
        elif func.namespace == "tcm_fast":
            for x in given:
                if (
                    x.ndim != 4
                    or not x.is_floating_point()
                    or (name in BY_ROW and x.stride(1) == 1)
                ):
                    continue
                if not _is_dense(x, layout_of(x)):
                    self._moved(COPY, name, x)
                    self._hidden(COPY, 2 * x.numel() * x.element_size())

    def _converted(self, name: str, **operands: torch.Tensor) -> None:
        """What cuDNN gets in another layout than it computes in."""
        layout = _cudnn_layout(operands["input"], operands["weight"])
        for what, tensor in operands.items():
            if not _is_dense(tensor, layout):
                self._moved(LAYOUT, f"{name} {what}", tensor)
                self._hidden(LAYOUT, 2 * tensor.numel() * tensor.element_size())

    def _hidden(self, which: str, num_bytes: int) -> None:
        tally = self.by_kind[which]
        tally.bytes += num_bytes
        tally.launches += 1

    def _moved(self, which: str, name: str, x: torch.Tensor) -> None:
        self.moved.append((which, name, tuple(x.shape), x.stride()))


def _cudnn_layout(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """In which cuDNN convolves: channels_last where the images or the weight are."""
    is_last = any(_is_dense(t, torch.channels_last) and not t.is_contiguous() for t in (x, weight))
    return torch.channels_last if is_last else torch.contiguous_format


def _is_dense(x: torch.Tensor, layout: torch.memory_format) -> bool:
    return x.is_contiguous(memory_format=layout)


def count_passes(config: Config, name: str, shape: ImageShape) -> Passes:
    """Forward and backward pass of a phase's last step, as a GPU carries it out."""
    net = build_on_meta(config, shape, name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = None
    if OBJECTIVES[name].frozen_file:
        frozen = build_on_meta(config, shape, name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = build_objective(config, name, net, frozen, has_copies=True)
    batches = step_batches(config, name, shape, on_gpu=True, last=True)
    with assuming_kernels(True), Passes() as passes:
        for batch in batches:
            objective(batch)[0].backward()
    return passes


# ---- launched on a GPU ---------------------------------------------------------------------------


@dataclasses.dataclass
class Launched:
    """A captured step on a GPU. nodes: of its graph, by kind; outside: launches beside the graph's, by kind;
    waits: of the host."""

    nodes: Multiset[str]
    outside: Multiset[str]
    waits: int


def captured_step(config: Config, name: str, shape: ImageShape) -> Launched:
    """The third step of a phase on the GPU, which captures a graph, and the fourth, which replays it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "images.npz"
        size = (256, shape.resolution, shape.resolution, shape.channels)
        images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        np.savez(source, images=images, labels=np.arange(256) % max(shape.classes, 1))
        data = dataclasses.replace(config.data, source=str(source), resolution=None)
        quiet = dataclasses.replace(config.eval, features="")
        config = dataclasses.replace(
            config, device="cuda", cuda_graph="on", memory="manual", keep_best="", data=data, eval=quiet
        )  # fmt: skip
        trainer = Trainer(config, Path(folder) / "run")
        with trainer.settings():
            phase = trainer.begin(name, trainer.builder.build(name))
            phase.step = max(phase.steps - 1, 0)
            assert trainer.loader is not None
            trainer.runner.warm_up(phase, trainer.loader)

            def step() -> None:
                assert trainer.loader is not None
                trainer.runner.run(phase, trainer.loader)

            for _ in range(2):
                step()
            return _logged(step) if _pretended() else _profiled(step)


def _pretended() -> Any:
    """The module of a pretended GPU, None where there is none."""
    return importlib.import_module("fakegpu") if importlib.util.find_spec("fakegpu") else None


def _logged(step: Callable[[], None]) -> Launched:
    texts = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            _pretended().log(str(path))
            step()
            _pretended().log("")
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return read_logs(*texts)


def read_logs(capture: str, replay: str) -> Launched:
    """From the pretended GPU's logs of the step that captures and of one that replays."""
    nodes = Multiset(
        kind(m[2]) for m in map(RESULT.match, capture.splitlines()) if m and m[1] == "CAP"
    )
    outside = Multiset(
        kind(m[2])
        for m in map(RESULT.match, replay.splitlines())
        if m and m[1] == "RUN" and not m[2].startswith("graphLaunch")
    )
    waits = sum(line.startswith("SYNC") for line in replay.splitlines())
    return Launched(nodes, outside, waits)


def _profiled(step: Callable[[], None]) -> Launched:
    """On a real GPU the profiler sees the graph's kernels like any others: all are counted as nodes."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        step()
    nodes: Multiset[str] = Multiset()
    waits = 0
    for event in prof.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not getattr(event, "is_user_annotation", False):
                nodes[kind(event.key)] += event.count
        elif event.key in ("cudaStreamSynchronize", "cudaEventSynchronize"):
            waits += event.count
    return Launched(nodes, Multiset(), waits)


# ---- the command ---------------------------------------------------------------------------------


def table(passes: Passes, launched: Launched | None) -> str:
    """As Markdown, the kinds that move most first."""
    tallies = dict(passes.by_kind)
    names = sorted(tallies, key=lambda key: -tallies[key].bytes)
    if launched is not None:
        names += sorted((launched.nodes.keys() | launched.outside.keys()) - tallies.keys())
    lines = ["| kind | operations | moved | graph nodes | outside |", "|---|---:|---:|---:|---:|"]
    for name in names:
        tally = tallies.get(name, Tally())
        counts = ("", "") if launched is None else (launched.nodes[name], launched.outside[name])
        lines.append(
            f"| {name} | {tally.launches} | {tally.bytes / 1e9:.2f} GB | {counts[0]} | {counts[1]} |"
        )
    sums = sum(t.launches for t in tallies.values()), sum(t.bytes for t in tallies.values())
    counts = ("", "")
    if launched is not None:
        counts = (launched.nodes.total(), launched.outside.total())
    lines.append(f"| whole step | {sums[0]} | {sums[1] / 1e9:.2f} GB | {counts[0]} | {counts[1]} |")
    if launched is not None:
        lines += ["", f"host waits: {launched.waits}"]
    return "\n".join(lines)


def as_json(passes: Passes, launched: Launched | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kinds": {name: dataclasses.asdict(tally) for name, tally in passes.by_kind.items()},
        "moved": [dict(zip(("kind", "operation", "shape", "strides"), m, strict=True)) for m in passes.moved],
    }  # fmt: skip
    return found | ({} if launched is None else vars(launched))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a training step's passes over memory, by kind")
    parser.add_argument("--preset", choices=preset_names(), default="cifar10")
    parser.add_argument("--phase", choices=PHASES, default="tcm")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--json", type=Path, help="a file for the same numbers")
    given = parser.parse_args(argv)
    config = load_preset(given.preset)
    sized = dataclasses.replace(
        config.phase(given.phase), batch_size=given.batch, images=given.batch * 100_000
    )
    chosen = given.precision or config.precision
    config = dataclasses.replace(config, precision=chosen, **{given.phase: sized})
    resolution = config.data.resolution or {"digits": 8}.get(given.preset, 32)
    classes = 1000 if config.network.class_conditional else 0
    shape = ImageShape(resolution, 1 if given.preset == "digits" else 3, classes)
    launched = None
    if pretended := _pretended():
        pretended.install()
        torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.cuda.is_available():
        launched = captured_step(config, given.phase, shape)
    passes = count_passes(config, given.phase, shape)
    print(f"{given.preset} {given.phase} batch {given.batch} {chosen}\n")
    print(table(passes, launched))
    for moved, count in Multiset(passes.moved).items():
        print(f"{count} x {moved[0]} in {moved[1]}: {list(moved[2])}, strides {list(moved[3])}")
    if given.json:
        text = json.dumps(as_json(passes, launched), indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
