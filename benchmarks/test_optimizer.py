"""An optimizer step with all that goes with it, ours beside torch's own paths: unscaling and looking for
numbers that are not finite, clipping, the update, one average, a 16-bit copy of the weights.

    pytest benchmarks/test_optimizer.py --benchmark-only
    python -m tcm_fast.benchmarks.test_optimizer [--threads 1] [--rounds 40] [--out FILE]

The second takes the providers in turn, round by round, so that a busy machine disturbs all alike, and
writes medians and quartiles. Equality of the results is tested in tests/kernels/test_fused_step.py.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import pytest
import torch

from tcm_fast.networks import build_network
from tcm_fast.optim import FusedOptimizer

ARCHITECTURE = {"model_channels": 64, "channel_mult": [1, 2, 2], "num_blocks": 1}
KINDS = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}
PROVIDERS = {
    "radam": ("tcm_fast", "foreach", "loop"),
    "adam": ("tcm_fast", "foreach", "loop", "fused"),
}
MAX_NORM = 1e9  # clipping is asked for and never bites


def shapes() -> list[torch.Size]:
    """Of the parameters of a DDPM++ of 5 million."""
    net = build_network("ddpmpp", img_resolution=32, img_channels=3, **ARCHITECTURE)
    return [parameter.shape for parameter in net.parameters()]


def make_step(kind: str, provider: str, sizes: list[torch.Size]) -> Callable[[], object]:
    """A step on weights and gradients of these shapes; provider: ours, or how torch is to do it."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(0.02 * torch.randn(s, generator=generator)) for s in sizes]
    for weight in weights:
        weight.grad = 1e-3 * torch.randn(weight.shape, generator=generator)
    values = [weight.detach() for weight in weights]
    average = [value.clone() for value in values]
    copies = [value.half() for value in values]
    if provider == "tcm_fast":
        ours = FusedOptimizer(
            weights, kind, lr=1e-4, max_norm=MAX_NORM, averages=[average], copies=copies, scale=1.0
        )
        ours.average_betas = [0.9999]
        return ours.step
    options = {"foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}
    optimizer = KINDS[kind](weights, lr=1e-4, **options[provider])  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.zeros(()))

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        torch._foreach_lerp_(average, values, 1e-4)
        torch._foreach_copy_(copies, values)

    return step


@pytest.mark.parametrize(
    ("kind", "provider"), [(kind, name) for kind in KINDS for name in PROVIDERS[kind]]
)
def test_optimizer_step(benchmark, kind, provider):
    sizes = shapes()
    parameters = sum(size.numel() for size in sizes)
    benchmark.extra_info.update(parameters=parameters, threads=torch.get_num_threads())
    benchmark.pedantic(make_step(kind, provider, sizes), rounds=15, iterations=1, warmup_rounds=3)


def measure(rounds: int) -> list[dict[str, object]]:
    """Milliseconds of each provider's step, the providers in turn."""
    sizes = shapes()
    cases = [(kind, provider) for kind in KINDS for provider in PROVIDERS[kind]]
    steps = {case: make_step(*case, sizes) for case in cases}
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 3):
        for case, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn >= 3:
                times[case].append(1e3 * (time.perf_counter() - begun))
    rows: list[dict[str, object]] = []
    for (kind, provider), values in times.items():
        q1, median, q3 = statistics.quantiles(values, n=4)
        quartiles = {"median": round(median, 2), "q1": round(q1, 2), "q3": round(q3, 2)}
        rows.append(
            {"kind": kind, "provider": provider, **quartiles, "least": round(min(values), 2)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    report: dict[str, object] = {
        "what": "an optimizer step with unscaling, clipping, one average and an fp16 copy",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "parameters": sum(size.numel() for size in shapes()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "unit": "milliseconds",
    }
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rows = measure(arguments.rounds)
        report[f"threads_{threads}"] = rows
        for kind in KINDS:
            of = {row["provider"]: row["median"] for row in rows if row["kind"] == kind}
            ours = float(str(of.pop("tcm_fast")))
            name, best = min(of.items(), key=lambda item: float(str(item[1])))
            ratio = float(str(best)) / ours
            print(
                f"{kind}, {threads} threads: {ours:.2f} ms, torch's {name} {best} ms, {ratio:.2f} times"
            )
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
