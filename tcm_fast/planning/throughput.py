"""What a device can do: measured rates of copying and of multiplying matrices, the ceilings that every
other speed is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from tcm_fast.kernels.conv_bf16x3 import conv_bf16x3, split_weight
from tcm_fast.runtime.arithmetic import tf32

# ---- ceilings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured rates. copy: bytes read plus bytes written per second of a large copy; matmul: precision
    (fp32, tf32, fp16, bf16, bf16x3) -> floating-point operations per second (multiply-add is 2) of a large
    matrix product or a large 3x3 convolution, whichever is faster (on a CPU different libraries compute them;
    a GPU's fp32 convolution may use Winograd's fewer products), of bf16x3 the convolution; samples: seconds
    of every repetition, by name."""

    copy: float
    matmul: dict[str, float]
    samples: dict[str, list[float]] = field(default_factory=dict)

    def seconds(self, num_bytes: float, flops: float = 0, precision: str = "fp32") -> float:
        """The least time for so many bytes and operations: the longer of the two."""
        rate = self.matmul.get(precision, max(self.matmul.values()))
        return max(num_bytes / self.copy, flops / rate)


def measure_ceilings(device: torch.device | str = "cpu", *, quick: bool = False) -> Ceilings:
    """Measure copy and matrix-product rates on random data (zeros would flatter); medians.

    On a GPU a copy within its memory, and products in every precision; on a CPU fp32 with torch's
    current number of threads."""
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    repeats = 7 if quick else 25
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else 1 << 30
    size = min(1 << 30 if is_cuda else 1 << 27, free // 4)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = {"copy": _seconds(partial(target.copy_, source), device, repeats)}
    copy = 2 * size / statistics.median(samples["copy"])
    del source, target

    matmul: dict[str, float] = {}
    for precision in ("fp32", "tf32", "fp16", "bf16", "bf16x3") if is_cuda else ("fp32",):
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        n = 1024 if not is_cuda else 4096 if precision == "fp32" else 8192
        a, b = (torch.randn((n, n), device=device).to(dtype) for _ in range(2))
        images, channels = (256, 256) if is_cuda else (8, 128)
        x = torch.randn((images, channels, 32, 32), device=device).to(dtype)
        w = torch.randn((channels, channels, 3, 3), device=device).to(dtype)
        if is_cuda:
            x, w = (v.contiguous(memory_format=torch.channels_last) for v in (x, w))
        works: dict[str, tuple[Callable[[], object], float]] = {
            precision: (partial(torch.matmul, a, b), 2.0 * n**3),
            f"{precision} convolution": (
                partial(F.conv2d, x, w, padding=1), 18.0 * images * 32 * 32 * channels**2
            ),
        }  # fmt: skip
        if precision == "bf16x3":
            convolve = partial(conv_bf16x3, x, w, parts=split_weight(w))
            works = {precision: (convolve, works[f"{precision} convolution"][1])}
        with tf32(precision == "tf32"):
            for name, (work, flops) in works.items():
                samples[name] = _seconds(work, device, repeats)
                rate = flops / statistics.median(samples[name])
                matmul[precision] = max(rate, matmul.get(precision, 0.0))
    return Ceilings(copy, matmul, samples)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repetition, after a tenth of a second of warming up."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.1:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
        return found
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in marks]
