"""A training step, ours beside the official style.

    pytest benchmarks/test_step.py --benchmark-only --benchmark-json benchmarks/results/step.json

On a CPU small networks are timed; on a GPU DDPM++ for CIFAR-10 (and EDM2 where this version has it) in
several batch sizes and precisions, the official style as published (fp32, no TF32), in the same
precision, in channels_last, and compiled. `tcm-fast bench step` takes the providers in turn.
"""

from typing import Any

import pytest
import torch

from tcm_fast.benchmarks.steps import StepCase, check_networks, step_cases, step_providers

IS_CUDA = torch.cuda.is_available()
CASES = [
    (case, provider, gap)
    for case in step_cases("cuda" if IS_CUDA else "cpu")
    for provider, (_, gap) in step_providers(case).items()
]


@pytest.mark.parametrize(("case", "provider", "gap"), CASES, ids=lambda v: str(v)[:40])
def test_step(benchmark: Any, case: StepCase, provider: str, gap: str) -> None:
    if gap:
        pytest.skip(f"{provider}: {gap}")
    assert not check_networks(case)
    step = step_providers(case)[provider][0]()

    def run() -> None:
        step()
        if IS_CUDA:
            torch.cuda.synchronize()

    if IS_CUDA:
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(run, rounds=15, iterations=1, warmup_rounds=8 if IS_CUDA else 2)
    benchmark.extra_info.update(
        batch_size=case.batch_size,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if IS_CUDA else "cpu",
        torch=torch.__version__,
        peak_memory=torch.cuda.max_memory_allocated() if IS_CUDA else None,
    )
