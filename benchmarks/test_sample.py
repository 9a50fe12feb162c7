"""Drawing images: throughput and the latency of one image, ours beside a plainly written sampler.

    pytest benchmarks/test_sample.py --benchmark-only --benchmark-json benchmarks/results/sample.json

On a CPU the digits network; on a GPU DDPM++ for CIFAR-10, one and two steps, by precision.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tcm_fast.benchmarks.test_step import FULL, SMALL
from tcm_fast.networks import Precond, build_network
from tcm_fast.sampler import PRECISIONS, Sampler, default_times, multistep

IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_CUDA else "cpu")
BATCHES = (1, 1024) if IS_CUDA else (1, 256)


def network() -> Precond:
    torch.manual_seed(0)
    shape, architecture = ((32, 3), FULL) if IS_CUDA else ((8, 1), SMALL)
    net = build_network(
        "ddpmpp", img_resolution=shape[0], img_channels=shape[1], **architecture.architecture()
    )
    return net.eval().to(DEVICE)


def plain(net: Precond, steps: int, precision: str, batch: int) -> Callable[[], torch.Tensor]:
    """x = T z, y = D(x, T), and so on, with torch's noise, and bytes on the host."""
    dtype = PRECISIONS[precision]

    @torch.no_grad()
    def draw() -> torch.Tensor:
        shape = (batch, net.img_channels, net.img_resolution, net.img_resolution)
        y = torch.zeros(shape, device=DEVICE)
        for t in default_times(steps):
            x = y + t * torch.randn(shape, device=DEVICE)
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                y = net(x, torch.full((batch,), t, device=DEVICE)).to(torch.float32)
        return (y * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()

    return draw


def tcm_fast(net: Precond, steps: int, precision: str, batch: int) -> Callable[[], torch.Tensor]:
    levels = default_times(steps)
    sampler = Sampler([net] * steps, multistep, levels, precision=precision)
    numbers = torch.arange(batch, device=DEVICE)
    return lambda: sampler.draw(numbers).cpu()


@pytest.mark.parametrize("provider", [plain, tcm_fast], ids=lambda f: f.__name__)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"] if IS_CUDA else ["fp32"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
def test_sampling(
    benchmark: Any, batch: int, steps: int, precision: str, provider: Callable[..., Any]
) -> None:
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    draw = provider(network(), steps, precision, batch)
    benchmark.pedantic(draw, rounds=15, iterations=1, warmup_rounds=5)
    benchmark.extra_info.update(
        images=batch, device=torch.cuda.get_device_name() if IS_CUDA else "cpu",
        threads=torch.get_num_threads(), torch=torch.__version__,
    )  # fmt: skip
