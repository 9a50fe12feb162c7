"""fp32 convolutions by three bf16 products beside cuDNN's in fp32 and TF32, at CIFAR-10's sites with the most
work: first whether the numbers are right, then how long they take. And what a card's data sheet says of them.

    python -m tcm_fast.benchmarks.convolutions [--batch 128]

prints the prediction, computed and not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from tcm_fast.benchmarks.measure import time_in_turn
from tcm_fast.benchmarks.results import Results, Row
from tcm_fast.benchmarks.settings import Settings
from tcm_fast.kernels.conv_bf16x3 import conv_bf16x3, split_weight
from tcm_fast.planning.cards import CARDS, Card
from tcm_fast.runtime.arithmetic import tf32

WORST = 2.0**-15  # of the sum of a result's products' magnitudes


@dataclass(frozen=True)
class Site:
    """A convolution: resolution, input and output channels, kernel size."""

    size: int
    c: int
    k: int
    kernel: int

    def __str__(self) -> str:
        return f"{self.size}x{self.size} {self.c}->{self.k} {self.kernel}x{self.kernel}"

    def flops(self, batch: int) -> int:
        return 2 * batch * self.size**2 * self.c * self.k * self.kernel**2

    def bytes(self, batch: int) -> int:
        """Input and output once, the weight's two parts once."""
        weight = self.c * self.k * self.kernel**2
        return 4 * (batch * self.size**2 * (self.c + self.k) + weight)


SITES = (
    Site(32, 256, 256, 3), Site(32, 512, 256, 3), Site(16, 256, 256, 3), Site(8, 256, 256, 3),
    Site(32, 512, 256, 1),
)  # fmt: skip


def _tensors(
    site: Site, batch: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = (
        (batch, site.c, site.size, site.size), (site.k, site.c, site.kernel, site.kernel),
        (batch, site.k, site.size, site.size),
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for shape in shapes
    )
    return x.requires_grad_(), weight.requires_grad_(), grad


def _run(
    convolve: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> list[torch.Tensor]:
    out = convolve(x, weight)
    return [out, *torch.autograd.grad(out, (x, weight), grad)]


def check(site: Site, device: str, batch: int = 4) -> str:
    """Why output or gradients are wrong at a site; empty where they are right."""
    given = _tensors(site, batch, device)
    wide = [v.detach().double() for v in given]
    exact, terms = (
        _run(
            partial(F.conv2d, padding=site.kernel // 2),
            *(v.requires_grad_(i < 2) for i, v in enumerate(tensors)),
        )
        for tensors in (wide, [v.detach().abs() for v in wide])
    )
    for name, a, b, most in zip(
        ("output", "grad_x", "grad_weight"), _run(conv_bf16x3, *given), exact, terms, strict=True
    ):
        worst = ((a.double() - b).abs() / most).max().item()
        if not worst <= WORST:
            return f"{name} is off by {worst:.2g} of its products' magnitudes, at most {WORST:.2g} is right"
    return ""


def time_convolutions(settings: Settings, results: Results, batch: int = 128) -> None:
    """A forward pass alone, and with both gradients, at each of SITES."""
    for site in SITES:
        problem = "" if settings.dry_run else check(site, settings.device)
        x, weight, grad = _tensors(site, batch, settings.device)
        cudnn = partial(F.conv2d, padding=site.kernel // 2)
        calls = {
            "cudnn fp32": tf32(False)(partial(_run, cudnn)),
            "cudnn tf32": tf32(True)(partial(_run, cudnn)),
            "tcm_fast": partial(_run, partial(conv_bf16x3, parts=split_weight(weight))),
        }
        forwards = {
            "cudnn fp32": tf32(False)(cudnn),
            "cudnn tf32": tf32(True)(cudnn),
            "tcm_fast": partial(conv_bf16x3, parts=split_weight(weight)),
        }
        works = {
            "forward": {n: partial(f, x.detach(), weight.detach()) for n, f in forwards.items()},
            "both": {n: partial(f, x, weight, grad) for n, f in calls.items()},
        }
        for direction, providers in works.items():
            passes = 1 if direction == "forward" else 3
            case = f"conv_bf16x3 {site} batch {batch} {direction}"
            if problem:
                results.rows.append(Row("ops", case, "tcm_fast", [], wrong=problem))
                del providers["tcm_fast"]
            for name, timing in time_in_turn(providers, settings.device, settings.pace).items():
                results.rows.append(
                    Row(
                        "ops", case, name, timing.samples, how=timing.how,
                        precision=name.removeprefix("cudnn ") if "cudnn" in name else "bf16x3",
                        bytes=passes * site.bytes(batch), flops=passes * site.flops(batch),
                        operation="conv_bf16x3", direction=direction, batch=batch,
                    )
                )  # fmt: skip


def predicted(site: Site, batch: int, card: Card) -> list[float]:
    """Seconds of a forward pass by a card's data sheet: bf16x3 at its full rate and at the share of it that
    plans expect, fp32 (without Winograd's fewer products) likewise. At least the time of the bytes."""
    flops, moved = site.flops(batch), site.bytes(batch) / card.bandwidth
    rates = (card.fp16 / 3, card.flops("bf16x3"), card.fp32, card.flops("fp32"))
    return [max(flops / rate, moved) for rate in rates]


def table(batch: int, names: tuple[str, ...] = ("a100-80gb", "h200", "b200")) -> str:
    """As Markdown, in microseconds."""
    lines = [
        f"| forward, batch {batch} | card | bf16x3, limit | expected | fp32, limit | expected |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for site in SITES:
        for name in names:
            times = (f"{1e6 * t:,.0f} µs" for t in predicted(site, batch, CARDS[name]))
            lines.append(f"| {site} | {name} | {' | '.join(times)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="computed times of fp32 convolutions")
    parser.add_argument("--batch", type=int, default=128)
    print(table(parser.parse_args().batch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
