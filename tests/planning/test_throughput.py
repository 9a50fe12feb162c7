"""Measured ceilings."""

import torch

from tcm_fast.planning import throughput


def test_the_least_time_is_the_longer_of_two():
    ceilings = throughput.Ceilings(copy=100.0, matmul={"fp32": 10.0, "fp16": 1000.0})
    assert ceilings.seconds(200.0) == 2.0
    assert ceilings.seconds(200.0, 50.0) == 5.0
    assert ceilings.seconds(200.0, 50.0, "fp16") == 2.0
    assert ceilings.seconds(0.0, 1000.0, "unheard of") == 1.0  # the fastest there is


def test_rates_are_of_the_work_and_the_median(monkeypatch):
    sizes = []

    def clock(work, device, repeats):
        sizes.append(work.args[0].numel())
        work()
        return [1.0, 2.0, 9.0]

    monkeypatch.setattr(throughput, "_seconds", clock)
    found = throughput.measure_ceilings("cpu", quick=True)
    assert found.copy == 2 * sizes[0] / 2.0
    assert set(found.matmul) == {"fp32"}
    assert found.matmul["fp32"] == max(2.0 * 1024**3, 18.0 * 8 * 32 * 32 * 128**2) / 2.0
    assert set(found.samples) == {"copy", "fp32", "fp32 convolution"}


def test_every_repetition_is_timed():
    calls = []
    samples = throughput._seconds(lambda: calls.append(1), torch.device("cpu"), 5)
    assert len(samples) == 5
    assert len(calls) > 5  # warmed up
    assert all(sample >= 0 for sample in samples)
