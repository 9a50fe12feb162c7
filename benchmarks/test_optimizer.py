"""An optimizer step with all that goes with it, ours beside torch's own paths: unscaling and looking for
numbers that are not finite, clipping, the update, one average, a 16-bit copy of the weights.

    pytest benchmarks/test_optimizer.py --benchmark-only
    python -m tcm_fast.benchmarks.test_optimizer [--threads 1] [--rounds 40] [--out FILE]

The second takes the providers in turn, round by round, so that a busy machine disturbs all alike, and
writes medians and quartiles. Each is checked against float64 first.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time

import pytest
import torch

from tcm_fast.benchmarks.optimizers import Tensors, check_step, make_step, network_shapes
from tcm_fast.benchmarks.peers import TORCH_KINDS, optimizer_providers

ARCHITECTURE = {"model_channels": 64, "channel_mult": (1, 2, 2), "num_blocks": 1}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (kind, provider, gap)
    for kind in TORCH_KINDS
    for provider, gap in optimizer_providers(kind, DEVICE).items()
]


def shapes() -> tuple[torch.Size, ...]:
    """Of the parameters of a DDPM++ of 5 million."""
    return network_shapes("ddpmpp", 32, **ARCHITECTURE)


@pytest.mark.parametrize(("kind", "provider", "gap"), CASES, ids=lambda v: str(v).split(" ")[0])
def test_optimizer_step(benchmark, kind, provider, gap):
    if gap:
        pytest.skip(f"{provider}: {gap}")
    assert not check_step(kind, provider, DEVICE)
    step, is_cuda = make_step(kind, provider, Tensors(shapes(), DEVICE)), DEVICE == "cuda"

    def run() -> None:
        step()
        if is_cuda:
            torch.cuda.synchronize()

    parameters = sum(size.numel() for size in shapes())
    benchmark.extra_info.update(
        parameters=parameters, threads=torch.get_num_threads(), device=DEVICE
    )
    benchmark.pedantic(run, rounds=15, iterations=1, warmup_rounds=3)


def measure(rounds: int) -> list[dict[str, object]]:
    """Milliseconds of each provider's step, the providers in turn."""
    cases = [(kind, provider) for kind, provider, gap in CASES if not gap]
    steps = {case: make_step(*case, Tensors(shapes(), "cpu")) for case in cases}
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
        for kind in TORCH_KINDS:
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
