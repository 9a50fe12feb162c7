"""An optimizer step with all that goes with it, by provider: unscaling and looking for numbers that are
not finite, clipping, the update, one EMA, a 16-bit copy of the weights.

    python -m tcm_fast.benchmarks.optimizers [--threads 1 2] [--rounds 40] [--out FILE]

times a narrow network's on the CPU, all providers in turn, round by round, so that a busy machine disturbs
all alike, and writes medians and quartiles.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tcm_fast.benchmarks.measure import write_record
from tcm_fast.benchmarks.peers import OURS, TORCH_KINDS, make_optimizer, optimizer_providers
from tcm_fast.networks import build_network
from tcm_fast.optim.fused import FusedOptimizer

MAX_NORM = 1e9  # clipping is asked for and never bites
LR, BETA = 1e-4, 0.9999
# Bytes a parameter, everything read once and written once in fp32 with one fp32 EMA and a 16-bit copy:
# the gradient for its norm, then gradient, weight, moments, EMA in, all but the gradient out.
BYTES_PER_PARAMETER = 4 + 5 * 4 + 4 * 4 + 2


@functools.cache
def network_shapes(name: str, resolution: int, **architecture: Any) -> tuple[torch.Size, ...]:
    """The shapes of a network's parameters."""
    with torch.device("meta"):
        net = build_network(name, img_resolution=resolution, img_channels=3, **architecture)
    return tuple(parameter.shape for parameter in net.parameters())


def narrow_shapes() -> tuple[torch.Size, ...]:
    """Of the parameters of a DDPM++ of 5 million."""
    return network_shapes("ddpmpp", 32, model_channels=64, channel_mult=(1, 2, 2), num_blocks=1)


class Tensors:
    """Weights with gradients, one EMA and 16-bit copies."""

    def __init__(self, sizes: tuple[torch.Size, ...], device: torch.device | str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(size: torch.Size, scale: float) -> torch.Tensor:
            return (scale * torch.randn(size, generator=generator)).to(device)

        self.weights = [torch.nn.Parameter(draw(size, 0.02)) for size in sizes]
        for weight in self.weights:
            weight.grad = draw(weight.shape, 1e-3)
        self.values = [weight.detach() for weight in self.weights]
        self.average = [value.clone() for value in self.values]
        self.copies = [value.half() for value in self.values]


def make_step(kind: str, provider: str, tensors: Tensors) -> Callable[[], object]:
    """A step on these tensors; provider: ours, or how torch (or apex) is to do it."""
    weights, average, copies = tensors.weights, tensors.average, tensors.copies
    if provider == OURS:
        ours = FusedOptimizer(
            weights, kind, lr=LR, max_norm=MAX_NORM, emas=[average], copies=copies, scale=1.0
        )
        ours.ema_betas = [BETA]
        return ours.step
    device = weights[0].device
    optimizer = make_optimizer(kind, provider, weights)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.zeros((), device=device))

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        torch._foreach_lerp_(average, tensors.values, 1 - BETA)
        torch._foreach_copy_(copies, tensors.values)

    return step


def check_step(kind: str, provider: str, device: torch.device | str, steps: int = 7) -> str:
    """What is wrong with a provider's weights, EMA and copies after a few steps beside torch's in
    float64; empty where nothing is."""
    sizes = (torch.Size((33, 7)), torch.Size((129,)), torch.Size((5, 3, 3, 3)))
    tensors, exact = Tensors(sizes, device), Tensors(sizes, "cpu")
    weights = [torch.nn.Parameter(w.detach().double()) for w in exact.weights]
    for weight, w in zip(weights, exact.weights, strict=True):
        assert w.grad is not None
        weight.grad = w.grad.double()
    average = [w.detach().clone() for w in weights]
    optimizer = TORCH_KINDS[kind](weights, lr=LR, foreach=False)
    step = make_step(kind, provider, tensors)
    for _ in range(steps):
        grads = [w.grad for w in tensors.weights]
        step()
        for w, grad in zip(tensors.weights, grads, strict=True):
            w.grad = grad  # ours gives them back
        optimizer.step()
        for a, w in zip(average, weights, strict=True):
            a.lerp_(w.detach(), 1 - BETA)
    for i, weight in enumerate(weights):
        pairs = (
            ("weight", tensors.values[i], weight.detach(), 1e-6),
            ("average", tensors.average[i], average[i], 1e-6),
            ("copy", tensors.copies[i], weight.detach(), 1e-3),
        )
        for what, found, wanted, relative in pairs:
            error = (found.double().cpu() - wanted).abs().max().item()
            if not error <= relative * wanted.abs().max().item():
                return f"{what} {i} is off by {error:.2g} after {steps} steps"
    return ""


def measure(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each provider's step on the CPU."""
    steps = {
        (kind, provider): make_step(kind, provider, Tensors(narrow_shapes(), "cpu"))
        for kind in TORCH_KINDS
        for provider, gap in optimizer_providers(kind, "cpu").items()
        if not gap
    }
    times: dict[tuple[str, str], list[float]] = {case: [] for case in steps}
    for turn in range(rounds + 3):
        for case, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn >= 3:
                times[case].append(1e3 * (time.perf_counter() - begun))
    rows = []
    for (kind, provider), values in times.items():
        q1, median, q3 = (round(value, 2) for value in statistics.quantiles(values, n=4))
        least = round(min(values), 2)
        rows.append(
            {
                "kind": kind,
                "provider": provider,
                "median": median,
                "q1": q1,
                "q3": q3,
                "least": least,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rows = found[f"threads_{threads}"] = measure(arguments.rounds)
        for kind in TORCH_KINDS:
            of = {row["provider"]: row["median"] for row in rows if row["kind"] == kind}
            ours = of.pop(OURS)
            best = min(of, key=of.__getitem__)
            print(
                f"{kind}, {threads} threads: {ours:.2f} ms, torch's {best} {of[best]:.2f} ms, "
                f"{of[best] / ours:.2f} times"
            )
    if arguments.out:
        what = "an optimizer step with unscaling, clipping, one EMA and an fp16 copy, milliseconds"
        count = sum(size.numel() for size in narrow_shapes())
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        write_record(arguments.out, what, machine, parameters=count, **found)


if __name__ == "__main__":
    main()
