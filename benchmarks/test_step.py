"""A stage-2 optimizer step, ours beside the official style, on networks that a CPU can train.

    pytest benchmarks/test_step.py --benchmark-only --benchmark-json benchmarks/results/step.json

Both providers train the same network on the same images at the same precision; each step draws its
noise levels, runs the networks, the optimizer and one average. Equality of loss and gradients is
tested in tests/benchmarks/test_official_style.py.
"""

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tcm_fast.benchmarks.official_style import OfficialStyleStep, OfficialStyleUNet
from tcm_fast.config import Config, NetworkConfig, TcmConfig
from tcm_fast.data import ImageData, ImageStream
from tcm_fast.networks import build_network
from tcm_fast.objectives import Objective, make_batch
from tcm_fast.optim import Ema, build_optimizer, learning_rate
from tcm_fast.times import plan_times

SMALL = NetworkConfig(model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
NARROW = NetworkConfig(
    model_channels=32, channel_mult=(1, 2, 2), num_blocks=1, attn_resolutions=(16,)
)
NETWORKS = {"digits": ((8, 1), SMALL, 128), "narrow-cifar10": ((32, 3), NARROW, 32)}
Shape = tuple[int, int]  # resolution, channels
ITERATION = 10**6  # the schedule's end: r/t = 0.999


def official_style(
    shape: Shape, network: NetworkConfig, config: TcmConfig, images: np.ndarray
) -> Callable[[], object]:
    resolution, channels = shape
    net = OfficialStyleUNet(resolution, channels, dropout=config.dropout, **network.architecture())
    step = OfficialStyleStep(net.train(), copy.deepcopy(net), ratio=config.limit)
    batch = torch.from_numpy(images[: config.batch_size]).permute(0, 3, 1, 2).contiguous()
    return lambda: step(batch)


def tcm_fast(
    shape: Shape, network: NetworkConfig, config: TcmConfig, images: np.ndarray
) -> Callable[[], object]:
    resolution, channels = shape
    net = build_network(
        "ddpmpp", img_resolution=resolution, img_channels=channels, dropout=config.dropout,
        **network.architecture(),
    )  # fmt: skip
    objective = Objective("tcm", config, net.train(), copy.deepcopy(net))
    optimizer = build_optimizer(net.parameters(), config)
    ema = Ema(config.ema[0], net.parameters())
    stream = ImageStream(ImageData(images, None, "noise", ()), seed=0, device=torch.device("cpu"))
    count = 0

    def step() -> None:
        nonlocal count
        seen = count * config.batch_size
        plan = plan_times(config, seed=0, images_seen=seen, iteration=ITERATION + count)
        (part,) = plan.parts(1)
        batch = make_batch(
            plan, part, *stream.batch(seen + part), seed=0, step=count,
            boundary_weight=config.boundary_weight,
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        objective(batch)[0].backward()
        optimizer.param_groups[0]["lr"] = learning_rate(config, seen, count)
        optimizer.step()
        count += 1
        ema.update(ITERATION + count, seen + config.batch_size, config.batch_size)

    return step


@pytest.mark.parametrize("provider", [official_style, tcm_fast], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_stage_2_step(benchmark, name, provider):
    shape, network, batch_size = NETWORKS[name]
    config = dataclasses.replace(Config().tcm, batch_size=batch_size, c=0.01)
    resolution, channels = shape
    images = np.random.default_rng(0).integers(
        0, 256, (4 * batch_size, resolution, resolution, channels), np.uint8
    )
    torch.manual_seed(0)
    step = provider(shape, network, config, images)
    benchmark.extra_info.update(batch_size=batch_size, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=15, iterations=1, warmup_rounds=3)
