"""The table of memory optimizations."""

import pytest
import torch

from tcm_fast.benchmarks import memory_optimizations
from tcm_fast.kernels._backend import extension
from tcm_fast.planning.cards import this_device
from tcm_fast.planning.memory_estimate import ImageShape

needs_extension = pytest.mark.skipif(extension() is None, reason="needs the extension: not built")


@needs_extension
def test_a_lever_beside_none(tmp_path):
    config = memory_optimizations.narrow(tmp_path, 4, channels=32)
    chosen = {
        name: memory_optimizations.OPTIMIZATIONS[name]
        for name in ("none", "micro_batches 4", "moments 8bit")
    }
    card = this_device(torch.device("cpu"))
    rows = memory_optimizations.measure(
        config, "tcm", chosen, ImageShape(32, 3, 0, 8), card, seconds=0.01
    )
    none, cut, short = rows
    assert none.difference == 0
    assert 0 < cut.difference < 1e-4
    assert 1e-4 < short.difference < 0.1  # three bits of mantissa: a thirtieth
    assert cut.held < none.held
    assert short.held < none.held
    for row in rows:
        assert row.predicted == pytest.approx(row.held, rel=0.1)
        assert row.milliseconds > 0
    table = memory_optimizations.summarise(rows).splitlines()
    assert len(table) == 5
    assert table[2].startswith("| fp32 | none | ")
    assert "| 1.00 |" in table[2]


def test_a_second_precision_is_compared_with_its_own():
    rows = [
        memory_optimizations.Row("fp32", "none", 100, 100, 10.0, 0.0),
        memory_optimizations.Row("bf16", "none", 60, 50, 5.0, 0.0),
        memory_optimizations.Row("bf16", "offload", 60, 40, 6.0, 0.0),
    ]
    last = memory_optimizations.summarise(rows).splitlines()[-1]
    assert "| 0.80 |" in last
    assert "| 1.20 |" in last
