"""Whole training steps and sampling calls, ours beside the official style: what the step benchmarks time.

Every provider trains the same network on the same images: it draws its noise levels, runs the networks,
the optimizer and one EMA. Equality of loss and gradients is tested in
tests/benchmarks/test_official_style.py, for what a run times here in `check_losses`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from tcm_fast.benchmarks.cases import CIFAR10, DIGITS, NARROW, NetworkShape
from tcm_fast.benchmarks.official_edm2 import OfficialStyleEdm2
from tcm_fast.benchmarks.official_style import OfficialStyleStep, OfficialStyleUNet, denoise
from tcm_fast.config import Config, PhaseConfig
from tcm_fast.data.dataset import ImageData
from tcm_fast.data.stream import ImageStream
from tcm_fast.kernels._backend import extension_gap, fast_layout
from tcm_fast.networks import Precond, build_network, force_rows
from tcm_fast.networks.precision import is_derived, make_copies
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.batch import Batch, make_batch, row_multiple_for
from tcm_fast.optim import build_optimizer
from tcm_fast.optim.ema import Ema
from tcm_fast.optim.schedules import learning_rate
from tcm_fast.runtime.arithmetic import PRECISIONS, splits_convolutions, tf32, training_settings
from tcm_fast.runtime.cuda_graphs import CudaPlace, GraphCache
from tcm_fast.sampling.sampler import Sampler
from tcm_fast.sampling.solvers import default_times, multistep

ITERATION = 10**6  # the schedule's end: r/t = 0.999
LOSS_SCALE = 16.0
Step = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A phase of training: network, images a step, precision of our step."""

    network: NetworkShape
    batch_size: int
    precision: str = "fp32"
    phase: str = "tcm"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.phase} {self.network.label} batch {self.batch_size} {self.precision}"

    @property
    def config(self) -> PhaseConfig:
        changes: dict[str, Any] = {"batch_size": self.batch_size}
        if self.phase != "edm":
            changes["huber_c"] = 0.01
        return dataclasses.replace(Config().phase(self.phase), **changes)

    def build(self) -> Precond:
        """Our network, of unconditional training unless the shape has classes."""
        shape, architecture = self.network, dict(self.network.architecture)
        architecture["dropout"] = self.config.dropout
        torch.manual_seed(0)
        return build_network(
            shape.name, img_resolution=shape.img_resolution, img_channels=shape.img_channels,
            label_dim=shape.label_dim, **architecture,
        )  # fmt: skip

    def images(self) -> np.ndarray:
        side = self.network.img_resolution
        shape = (4 * self.batch_size, side, side, self.network.img_channels)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def step_cases(device: torch.device | str, *, quick: bool = False) -> list[StepCase]:
    """What is timed on this device."""
    from tcm_fast.benchmarks.cases import available_networks

    device = torch.device(device).type
    if device == "cpu":
        small = [StepCase(DIGITS, 128, phase=phase) for phase in ("edm", "ect", "tcm")]
        sizes = (16,) if quick else (32, 128)
        return small + [StepCase(NARROW, size) for size in sizes]
    found = []
    for network in available_networks():
        is_cifar = network == CIFAR10
        precisions = ("fp32", "tf32", "fp16", "bf16") if is_cifar else ("fp16", "bf16")
        sizes = (16, 128, 512) if is_cifar else (16, 64, 128)
        if quick:
            precisions, sizes = precisions[-2:], (128,) if is_cifar else (16,)
        found += [
            StepCase(network, size, precision, phase, device)
            for phase in (("tcm",) if quick else ("edm", "ect", "tcm"))
            for size in sizes
            for precision in precisions
        ]
    return found


# ---- providers of a training step ---------------------------------------------------------------


HAVE_STYLE = ("ddpmpp", "edm2")  # networks that are written plainly here


def style_gap(shape: NetworkShape) -> str:
    """Why there is no plainly written network to compare with; empty where there is one."""
    if shape.name not in HAVE_STYLE or (shape.name == "ddpmpp" and shape.label_dim):
        return f"official_style has no {shape.name}{' with classes' if shape.label_dim else ''}"
    return ""


def published_precision(shape: NetworkShape) -> str:
    """DDPM++ is published in fp32 without TF32, EDM2 in fp16."""
    return "fp16" if shape.name == "edm2" else "fp32"


def official_network(case: StepCase, precision: str, dropout: float) -> torch.nn.Module:
    """The plainly written network with the weights of ours. EDM2's computes in its precision by itself,
    DDPM++'s under autocast."""
    shape = case.network
    if gap := style_gap(shape):
        raise ValueError(gap)
    options = dict(shape.architecture) | {"dropout": dropout}
    torch.manual_seed(0)
    net: torch.nn.Module
    if shape.name == "edm2":
        net = OfficialStyleEdm2(
            shape.img_resolution, shape.img_channels, shape.label_dim, dtype=PRECISIONS[precision],
            **options,
        )  # fmt: skip
    else:
        net = OfficialStyleUNet(shape.img_resolution, shape.img_channels, **options)
    net.load_state_dict(case.build().model.state_dict(), strict=True)
    return net.to(case.device)


def one_hot(case: StepCase, count: int) -> torch.Tensor | None:
    """Classes in turn, fp32 [count,K]; None for a network without."""
    classes = case.network.label_dim
    numbers = torch.arange(count, device=case.device)
    return torch.nn.functional.one_hot(numbers % classes, classes).float() if classes else None


def official_style_step(
    case: StepCase, *, precision: str = "", channels_last: bool = False, compiled: bool = False
) -> Step:
    """The step as published, or in another precision, in channels_last, compiled."""
    config = case.config
    precision = precision or published_precision(case.network)
    net = official_network(case, precision, config.dropout)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if case.network.label_dim:
        net.labels = one_hot(case, case.batch_size)  # type: ignore[assignment]
    stage1 = copy.deepcopy(net) if case.phase == "tcm" else None
    if compiled:
        net.compile()
        if stage1 is not None:
            stage1.compile()
    ratio = getattr(config, "max_ratio", 0.999)
    step = OfficialStyleStep(
        net.train(), stage1, phase=case.phase, ratio=ratio, c=getattr(config, "huber_c", 0.0),
        lr=config.lr, log_normal=(config.t_mean, config.t_std),
    )  # fmt: skip
    images = torch.from_numpy(case.images()[: case.batch_size]).permute(0, 3, 1, 2).contiguous()
    images = images.to(case.device)
    dtype = PRECISIONS[precision]
    casts = dtype != torch.float32 and case.network.name != "edm2"

    def run() -> None:
        with (
            training_settings(precision, deterministic=False),
            torch.autocast(case.device, dtype, enabled=casts),
        ):
            step(images)

    return run


def tcm_fast_step(
    case: StepCase, *, split: bool = True, graphs: bool = False, compiled: bool = False
) -> Step:
    """Our step, as the trainer takes it; without `split` both networks compute the target of every
    sample. The step's parts are attributes of what is returned."""
    return OurStep(case, split=split, graphs=graphs, compiled=compiled)


class OurStep:
    """One optimizer step after another. `prepare` is what the host does for a step, `work` what the
    device does."""

    def __init__(
        self, case: StepCase, *, split: bool = True, graphs: bool = False, compiled: bool = False
    ) -> None:
        config, device = case.config, torch.device(case.device)
        self.case, self.config = case, config
        self.net = net = case.build().to(device, memory_format=fast_layout(device))  # type: ignore[call-overload]
        dtype = PRECISIONS[case.precision]
        stage1 = copy.deepcopy(net) if case.phase == "tcm" else None
        self.objective = OBJECTIVES[case.phase](
            config, net.train(), stage1, dtype=dtype, split=splits_convolutions(case.precision)
        )  # fmt: skip
        if compiled:
            net.model.compile()
            if self.objective.frozen is not None:
                self.objective.frozen.model.compile()
        self.ema = Ema(config.ema[0] if config.ema else "constant:0.9999", net.parameters())
        if is_derived(net, dtype) and not extension_gap(device):
            self.objective.copies = make_copies(net, dtype, rows_too=False)
        scale = LOSS_SCALE if case.precision == "fp16" else None
        self.optimizer = build_optimizer(
            net.parameters(), config, emas=[self.ema], copies=self.objective.copies, scale=scale,
            capturable=graphs,
        )  # fmt: skip
        classes = case.network.label_dim
        images = case.images()
        labels = np.arange(len(images)) % classes if classes else None
        names = tuple(map(str, range(classes)))
        data = ImageData(images, labels, "noise", names)
        self.stream = ImageStream(data, seed=0, device=device)
        self.row_multiple = (
            row_multiple_for(config.batch_size, device) if split else config.batch_size
        )
        self.graphs: GraphCache | None = None
        if graphs:
            self.graphs = GraphCache(CudaPlace(device), self.optimizer.capturing)
        self.count = 0

    def prepare(self) -> Batch:
        seen = self.count * self.config.batch_size
        plan = self.objective.plan(
            self.config, seed=0, images_seen=seen, iteration=ITERATION + self.count
        )
        (part,) = plan.parts(1)
        return make_batch(
            plan, part, *self.stream.batch(seen + part), seed=0, step=self.count,
            row_multiple=self.row_multiple,
        )  # fmt: skip

    def work(self, batch: Batch) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        force_rows(self.net)
        with nullcontext() if self.graphs is None else self.graphs.memory():
            loss, stats = self.objective(batch)
            self.optimizer.loss_scale.scale(loss).backward()
            self.objective.forget_weights()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return stats

    def __call__(self) -> torch.Tensor:
        with training_settings(self.case.precision, deterministic=False):
            return self.step()

    def step(self) -> torch.Tensor:
        batch, size = self.prepare(), self.config.batch_size
        after = (ITERATION + self.count + 1, (self.count + 1) * size, size)
        rate = learning_rate(self.config, self.count * size, self.count)
        self.optimizer.prepare(rate, [self.ema.rule.beta(*after)])
        if self.graphs is None:
            stats = self.work(batch)
        else:
            tensors = [batch.packed, batch.images]
            tensors += [] if batch.labels is None else [batch.labels]
            stats = self.graphs(
                batch.kind, lambda p, i, y=None: self.work(batch.at(p, i, y)), *tensors
            )
            self.optimizer.after_replay()
        self.count += 1
        return stats


def step_providers(case: StepCase) -> dict[str, tuple[Callable[[], Step], str]]:
    """Name -> (what builds the step, why it cannot run here)."""
    is_cuda = case.device == "cuda"
    no_official = style_gap(case.network)
    no_gpu = "" if is_cuda else "needs a GPU"
    published = published_precision(case.network)
    same = "" if case.precision != published else f"is official_style itself in {published}"
    cannot_graph = (
        "a graph cannot choose a loss scale without the extension"
        if case.precision == "fp16" and is_cuda and extension_gap(torch.device("cuda"))
        else ""
    )

    def official(**how: Any) -> Callable[[], Step]:
        return lambda: official_style_step(case, **how)

    own = {"precision": case.precision}
    return {
        "official_style": (official(), no_official),
        "official_style same precision": (official(**own), no_official or no_gpu or same),
        "official_style channels_last": (
            official(**own, channels_last=True), no_official or no_gpu,
        ),
        "official_style channels_last compiled": (
            official(**own, channels_last=True, compiled=True), no_official or no_gpu,
        ),
        "tcm_fast unsplit": (
            lambda: tcm_fast_step(case, split=False), "" if case.phase == "tcm" else "splits nothing",
        ),
        "tcm_fast": (lambda: tcm_fast_step(case), ""),
        "tcm_fast graphs": (lambda: tcm_fast_step(case, graphs=True), no_gpu or cannot_graph),
    }  # fmt: skip


@torch.no_grad()
@tf32(False)
def check_networks(case: StepCase) -> str:
    """Whether official_style's network and ours are the same function on this device; empty where they
    are. (Loss and gradients of whole steps: tests/benchmarks/test_official_style.py.)"""
    if style_gap(case.network):
        return ""
    ours, shape = case.build().to(case.device), case.network
    for parameter in ours.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    theirs = official_network(case, "fp32", 0.0)
    theirs.load_state_dict(ours.model.state_dict(), strict=True)
    labels = one_hot(case, 4)
    if labels is not None:
        theirs.labels = labels  # type: ignore[assignment]
    side = shape.img_resolution
    x = torch.randn(4, shape.img_channels, side, side, device=case.device)
    t = torch.tensor([0.01, 0.5, 2.0, 60.0], device=case.device)
    found = ours.eval()(x, t, labels)
    wanted = denoise(theirs.eval(), x, t, None)  # type: ignore[arg-type]
    error = ((found - wanted).norm() / wanted.norm()).item()
    return "" if error < 1e-3 else f"official_style's network differs by {error:.2g}"


# ---- sampling -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SampleCase:
    """Drawing `batch` images in so many steps."""

    network: NetworkShape
    batch: int
    steps: int
    precision: str = "fp32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.network.label} {self.steps}-step batch {self.batch} {self.precision}"


def sample_cases(device: torch.device | str, *, quick: bool = False) -> list[SampleCase]:
    from tcm_fast.benchmarks.cases import available_networks

    device = torch.device(device).type
    if device == "cpu":
        sizes = (1, 64) if quick else (1, 16, 256)
        return [SampleCase(DIGITS, batch, steps) for batch in sizes for steps in (1, 2)]
    precisions = ("fp16",) if quick else ("fp32", "tf32", "fp16")
    return [
        SampleCase(network, batch, steps, precision, device)
        for network in available_networks()
        for batch in ((1, 512) if quick else (1, 16, 128, 1024))
        for steps in (1, 2)
        for precision in precisions
    ]


def sample_providers(case: SampleCase) -> dict[str, Step]:
    """A plainly written sampler (x = T z, y = D(x, T), torch's noise, bytes on the host), and ours."""
    net = StepCase(case.network, 1).build().eval().to(case.device)
    device, dtype = case.device, PRECISIONS[case.precision]
    shape = (case.batch, net.img_channels, net.img_resolution, net.img_resolution)
    labels = None
    if net.label_dim:
        classes = torch.arange(case.batch, device=device) % net.label_dim
        labels = torch.nn.functional.one_hot(classes, net.label_dim).float()

    @torch.no_grad()
    @tf32(case.precision == "tf32")
    def plain() -> torch.Tensor:
        y = torch.zeros(shape, device=device)
        for t in default_times(case.steps):
            x = y + t * torch.randn(shape, device=device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                y = net(x, torch.full((case.batch,), t, device=device), labels).to(torch.float32)
        return (y * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()

    sampler = Sampler(
        [copy.deepcopy(net)] * case.steps, multistep, default_times(case.steps),
        precision=case.precision,
    )  # fmt: skip
    numbers = torch.arange(case.batch, device=device)
    given = [] if labels is None else [labels]
    return {"plain": plain, "tcm_fast": lambda: sampler.draw(numbers, *given).cpu()}
