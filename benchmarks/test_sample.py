"""Drawing images: throughput and the latency of one image, ours beside a plainly written sampler.

    pytest benchmarks/test_sample.py --benchmark-only --benchmark-json benchmarks/results/sample.json

On a CPU the digits network; on a GPU DDPM++ for CIFAR-10 (and EDM2 where this version has it), one and
two steps, by precision. `tcm-fast bench sample` takes the two in turn.
"""

from typing import Any

import pytest
import torch

from tcm_fast.benchmarks.steps import SampleCase, sample_cases, sample_providers

IS_CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("provider", ["plain", "tcm_fast"])
@pytest.mark.parametrize("case", sample_cases("cuda" if IS_CUDA else "cpu"), ids=str)
def test_sampling(benchmark: Any, case: SampleCase, provider: str) -> None:
    draw = sample_providers(case)[provider]
    benchmark.pedantic(draw, rounds=15, iterations=1, warmup_rounds=5)
    benchmark.extra_info.update(
        images=case.batch, device=torch.cuda.get_device_name() if IS_CUDA else "cpu",
        threads=torch.get_num_threads(), torch=torch.__version__,
    )  # fmt: skip
