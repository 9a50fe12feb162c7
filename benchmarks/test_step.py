"""A stage-2 optimizer step, ours beside the official style.

    pytest benchmarks/test_step.py --benchmark-only --benchmark-json benchmarks/results/step.json

Both train the same network on the same images; each step draws its noise levels, runs the networks, the
optimizer and one average. Equality of loss and gradients is tested in
tests/benchmarks/test_official_style.py. On a CPU two small networks are timed; on a GPU DDPM++ for
CIFAR-10 in several batch sizes and precisions, the official style as published (fp32, no TF32), in the
same precision, in channels_last, and compiled.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tcm_fast.benchmarks.official_style import OfficialStyleStep, OfficialStyleUNet
from tcm_fast.config import Config, NetworkConfig, TcmConfig
from tcm_fast.data import ImageData, ImageStream
from tcm_fast.graphs import GraphCache
from tcm_fast.networks import build_network
from tcm_fast.objectives import Batch, Objective, make_batch, row_granule
from tcm_fast.optim import Ema, build_optimizer, learning_rate, set_rate
from tcm_fast.sampler import PRECISIONS
from tcm_fast.times import plan_times

SMALL = NetworkConfig(model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
NARROW = NetworkConfig(
    model_channels=32, channel_mult=(1, 2, 2), num_blocks=1, attn_resolutions=(16,)
)
FULL = NetworkConfig(
    model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,)
)
ITERATION = 10**6  # the schedule's end: r/t = 0.999


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a batch: name, resolution, channels, architecture, images a step, precision."""

    name: str
    resolution: int
    channels: int
    network: NetworkConfig
    batch_size: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.name}-{self.batch_size}-{self.precision}"

    @property
    def config(self) -> TcmConfig:
        return dataclasses.replace(Config().tcm, batch_size=self.batch_size, c=0.01)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases() -> list[Case]:
    if not torch.cuda.is_available():
        return [
            Case("digits", 8, 1, SMALL, 128),
            Case("narrow-cifar10", 32, 3, NARROW, 32),
            Case("narrow-cifar10", 32, 3, NARROW, 128),
        ]
    return [
        Case("cifar10", 32, 3, FULL, batch_size, precision)
        for batch_size in (16, 128, 512)
        for precision in ("fp32", "tf32", "fp16", "bf16")
    ]


def use_tf32(precision: str) -> None:
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def official_style(case: Case, images: np.ndarray, *, precision: str = "", **how: bool):
    """The step as published, or in the case's precision, in channels_last, compiled."""
    use_tf32(precision)
    config = case.config
    net = OfficialStyleUNet(
        case.resolution, case.channels, dropout=config.dropout, **case.network.architecture()
    ).to(case.device)
    if how.get("channels_last"):
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage1 = copy.deepcopy(net)
    if how.get("compiled"):
        net.compile()
        stage1.compile()
    step = OfficialStyleStep(net.train(), stage1, ratio=config.limit)
    batch = torch.from_numpy(images[: config.batch_size]).permute(0, 3, 1, 2).contiguous()
    batch = batch.to(case.device)
    dtype = PRECISIONS[precision or "fp32"]

    def run() -> None:
        with torch.autocast(case.device.type, dtype, enabled=dtype != torch.float32):
            step(batch)

    return run


def tcm_fast(case: Case, images: np.ndarray, *, split: bool = True, graphs: bool = False):
    """Our step; without `split` both networks compute the target of every sample."""
    use_tf32(case.precision)
    config, device = case.config, case.device
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    net = build_network(
        "ddpmpp", img_resolution=case.resolution, img_channels=case.channels,
        dropout=config.dropout, **case.network.architecture(),
    ).to(device, memory_format=layout)  # type: ignore[call-overload]  # fmt: skip
    dtype = PRECISIONS[case.precision]
    objective = Objective("tcm", config, net.train(), copy.deepcopy(net), dtype=dtype)
    optimizer = build_optimizer(net.parameters(), config, capturable=graphs)
    ema = Ema(config.ema[0], net.parameters())
    stream = ImageStream(ImageData(images, None, "noise", ()), seed=0, device=device)
    granule = row_granule(config.batch_size, device) if split else config.batch_size
    cache = GraphCache() if graphs else None
    count = 0

    def work(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss, stats = objective(batch)
        loss.backward()
        optimizer.step()
        return stats

    def step() -> None:
        nonlocal count
        seen = count * config.batch_size
        plan = plan_times(config, seed=0, images_seen=seen, iteration=ITERATION + count)
        (part,) = plan.parts(1)
        batch = make_batch(
            plan, part, *stream.batch(seen + part), seed=0, step=count,
            boundary_weight=config.boundary_weight, granule=granule,
        )  # fmt: skip
        set_rate(optimizer.param_groups[0], learning_rate(config, seen, count))
        if cache is None:
            work(batch)
        else:
            cache(batch.kind, lambda p, i: work(batch.at(p, i, None)), batch.packed, batch.images)
        count += 1
        ema.update(ITERATION + count, seen + config.batch_size, config.batch_size)

    return step


Provider = Callable[[Case, np.ndarray], Callable[[], object]]
PROVIDERS: dict[str, Provider] = {
    "official_style": official_style,
    "tcm_fast_unsplit": lambda case, images: tcm_fast(case, images, split=False),
    "tcm_fast": tcm_fast,
}
GPU_PROVIDERS: dict[str, Provider] = {
    "official_style_same_precision": lambda case, images: official_style(
        case, images, precision=case.precision
    ),
    "official_style_channels_last": lambda case, images: official_style(
        case, images, precision=case.precision, channels_last=True
    ),
    "official_style_compiled": lambda case, images: official_style(
        case, images, precision=case.precision, channels_last=True, compiled=True
    ),
    "tcm_fast_graphs": lambda case, images: tcm_fast(case, images, graphs=True),
}
if torch.cuda.is_available():
    PROVIDERS |= GPU_PROVIDERS


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_stage_2_step(benchmark: Any, case: Case, provider: str) -> None:
    if provider == "official_style" and case.precision != "fp32":
        pytest.skip("as published is fp32")
    if provider == "tcm_fast_graphs" and case.precision == "fp16":
        pytest.skip("a graph cannot choose a loss scale")
    images = np.random.default_rng(0).integers(
        0, 256, (4 * case.batch_size, case.resolution, case.resolution, case.channels), np.uint8
    )
    torch.manual_seed(0)
    step = PROVIDERS[provider](case, images)
    is_cuda = case.device.type == "cuda"

    def run() -> None:
        step()
        if is_cuda:
            torch.cuda.synchronize()

    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    warm_ups = 8 if is_cuda else 2
    benchmark.pedantic(run, rounds=15, iterations=1, warmup_rounds=warm_ups)
    benchmark.extra_info.update(
        batch_size=case.batch_size,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if is_cuda else "cpu",
        torch=torch.__version__,
        peak_memory=torch.cuda.max_memory_allocated() if is_cuda else None,
    )
