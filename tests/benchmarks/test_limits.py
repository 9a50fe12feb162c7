"""The least time of a step on a GPU that is not here."""

import os

import pytest

from tcm_fast.benchmarks.cases import CIFAR10
from tcm_fast.benchmarks.limits import count_step, limits, main, table
from tcm_fast.benchmarks.steps import StepCase
from tcm_fast.kernels import _triton
from tcm_fast.planning.throughput import Ceilings

pytest.importorskip("triton")


def test_a_steps_operations_are_four_forward_passes():
    """42.38 GFLOP a pass and image, which torch's counter gives for the published network."""
    before, launches = dict(os.environ), _triton.LAUNCHES.total()
    tallies, parameters = count_step(StepCase(CIFAR10, 8, "bf16", "ect"))
    assert parameters == 55_732_739
    flops = sum(tally.flops for tally in tallies.values()) / 8
    # The skips of upsampling blocks are computed before they are enlarged; the first convolution has no
    # gradient at the images.
    assert flops == pytest.approx(4 * 42.38e9, rel=0.015)
    assert dict(os.environ) == before
    assert _triton.LAUNCHES.total() == launches, "a kernel ran"


def test_16_bits_move_half():
    """And a little less: fp32 attention with heads of 256 is a library's, which wants copies."""
    wide, _ = count_step(StepCase(CIFAR10, 32, "fp32", "ect"))
    narrow, _ = count_step(StepCase(CIFAR10, 32, "bf16", "ect"))
    part = "normalisation and pointwise"
    assert narrow[part].bytes == pytest.approx(wide[part].bytes / 2, rel=0.1)


def test_the_table(capsys):
    case = StepCase(CIFAR10, 16, "bf16", "ect")
    rows = limits(case, Ceilings(4e12, {"bf16": 8e14}))
    *parts, whole = rows
    assert whole.limit == pytest.approx(sum(row.limit for row in parts))
    convolution = next(row for row in parts if row.part == "convolution")
    assert convolution.bound == "matmul"
    assert convolution.limit == pytest.approx(convolution.flops / 8e14)
    assert "computed: at most" in table(case, rows)
    assert main(["--batch", "16", "--copy", "4e12", "--matmul", "8e14"]) == 0
    assert capsys.readouterr().out.strip() == table(case, rows)
