"""The least time of a training step on a GPU that is not here: its bytes and operations are counted on
tensors without memory, with the GPU's kernels in their places, and divided by rates that are given.

    python -m tcm_fast.benchmarks.limits --batch 128 --precision bf16 --copy 4.3e12 --matmul 7.9e14

Computed, not measured. A stage-1 step is counted; a stage-2 step, whose targets are split between two
networks, runs the same passes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tcm_fast.benchmarks.accounting import Counting, RooflineRow, Tally
from tcm_fast.benchmarks.cases import available_networks
from tcm_fast.benchmarks.optimizers import BYTES_PER_PARAMETER
from tcm_fast.benchmarks.sites import in_channels_last
from tcm_fast.benchmarks.steps import ITERATION, StepCase
from tcm_fast.kernels import _triton
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.ect import Ect
from tcm_fast.planning.throughput import Ceilings
from tcm_fast.runtime.arithmetic import PRECISIONS, splits_convolutions


@contextmanager
def _kernels_in_their_places() -> Iterator[None]:
    """The operations choose their kernels, as on a GPU. For tensors without memory, on which none runs."""
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "TCM_FAST_BACKEND")}
    os.environ |= {"TRITON_INTERPRET": "1"}
    os.environ.pop("TCM_FAST_BACKEND", None)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def count_step(case: StepCase) -> tuple[dict[str, Tally], int]:
    """What a stage-1 step reads, writes and computes by category, and the number of parameters."""
    if not _triton.AVAILABLE:
        raise ValueError("limits: needs Triton, whose kernels are counted")
    config, dtype = case.config, PRECISIONS[case.precision]
    plan = Ect.plan(config, seed=0, images_seen=0, iteration=ITERATION)
    (part,) = plan.parts(1)
    images = torch.from_numpy(case.images()[: case.batch_size]).permute(0, 3, 1, 2)
    classes = case.network.label_dim
    labels = torch.zeros(case.batch_size, classes) if classes else None
    batch = make_batch(plan, part, images, labels, seed=0, step=0)
    with _kernels_in_their_places(), FakeTensorMode(allow_non_fake_inputs=True):
        net = case.build().train()
        in_channels_last(net)
        objective = Ect(config, net, dtype=dtype, split=splits_convolutions(case.precision))
        with Counting() as counting:
            objective(batch)[0].backward()
    tallies = counting.by_category()
    parameters = sum(p.numel() for p in net.parameters())
    tallies["optimizer"] = Tally(BYTES_PER_PARAMETER * parameters, 0, 3)
    return tallies, parameters


def limits(case: StepCase, ceilings: Ceilings) -> list[RooflineRow]:
    """The parts of a step with their least times (`seconds` is left at 0), the longest first."""
    tallies, _ = count_step(case)
    rows = []
    for part, tally in tallies.items():
        products = tally.flops / ceilings.matmul.get(case.precision, max(ceilings.matmul.values()))
        bound = "matmul" if products > tally.bytes / ceilings.copy else "copy"
        least = ceilings.seconds(tally.bytes, tally.flops, case.precision)
        rows.append(RooflineRow(part, 0.0, least, tally.bytes, tally.flops, tally.launches, bound))
    rows.sort(key=lambda row: -row.limit)
    total = [
        sum(getattr(row, name) for row in rows) for name in ("limit", "bytes", "flops", "launches")
    ]
    return [*rows, RooflineRow("whole step", 0.0, *total)]


def table(case: StepCase, rows: Sequence[RooflineRow]) -> str:
    """As Markdown."""
    lines = [
        f"{case}, computed: at most {case.batch_size / rows[-1].limit:,.0f} images/s", "",
        "| part | least time | bound by | moved | computed |", "|---|---:|---|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        computed = f"{row.flops / 1e12:.2f} TFLOP" if row.flops > 1e9 else ""
        lines.append(
            f"| {row.part} | {1e3 * row.limit:.2f} ms | {row.bound} | {row.bytes / 1e9:.2f} GB | {computed} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    names = {network.name: network for network in available_networks()}
    parser = argparse.ArgumentParser(description="the least time of a training step, computed")
    parser.add_argument("--network", choices=names, default="ddpmpp")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument(
        "--copy", type=float, required=True, help="bytes read plus written a second"
    )
    parser.add_argument("--matmul", type=float, required=True, help="operations a second")
    given = parser.parse_args(argv)
    case = StepCase(names[given.network], given.batch, given.precision, "ect")
    ceilings = Ceilings(given.copy, {given.precision: given.matmul})
    print(table(case, limits(case, ceilings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
