"""Every operation at the networks' real sites, ours beside plain PyTorch and whoever else is installed.

    pytest benchmarks/test_operations.py --benchmark-only --benchmark-json ops.json

A provider is checked against a float64 oracle on the same device and dtype before it is timed. On a CPU
the cases are those of small networks, really timed; the GPU's kernels then run at tiny sizes in Triton's
interpreter for their answers, and nothing of them is timed. `tcm-fast bench ops` takes the providers in
turn, empties the L2 cache and uses CUDA graphs.
"""

from typing import Any

import pytest
import torch

from tcm_fast.benchmarks.cases import Case, Provider, check, make_call, work
from tcm_fast.benchmarks.measure import environment
from tcm_fast.benchmarks.peers import providers
from tcm_fast.benchmarks.suite import Settings, chosen_cases, validate_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(case, provider, id=f"{case}-{provider.name}".replace(" ", "_"))
    for case in chosen_cases(Settings(quick=True, device=DEVICE))
    for provider in providers(case, DEVICE)
]


@pytest.fixture(scope="module")
def machine() -> dict[str, Any]:
    return environment(DEVICE)


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(("case", "provider"), CASES)
def test_operation(
    benchmark: Any, machine: dict[str, Any], case: Case, provider: Provider, direction: str
) -> None:
    if provider.gap:
        pytest.skip(f"{provider.name}: {provider.gap}")
    if direction not in case.directions:
        pytest.skip(f"{case.operation} has no gradient here")
    assert not check(case, provider, DEVICE)
    call = make_call(provider.make, case.inputs(DEVICE, provider.layout), direction)

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    need = work(case, direction)
    benchmark.extra_info.update(machine, bytes=need.bytes, flops=need.flops)
    benchmark.pedantic(run, rounds=20, iterations=5, warmup_rounds=3)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the kernels themselves")
def test_kernels_without_a_gpu(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """For their answers: what is timed is the interpreter, of which nothing follows."""
    sentence = benchmark.pedantic(validate_interpreted, rounds=1, iterations=1)
    assert "right at tiny sizes" in sentence
    with capsys.disabled():
        print(f"\n{sentence}")
