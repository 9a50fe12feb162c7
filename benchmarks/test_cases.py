"""The registry under pytest-benchmark: operations at the networks' real sites, optimizer steps, training
steps and sampling, ours beside plain PyTorch and whoever else is installed.

    pytest benchmarks --benchmark-only [-k "optimizer and adam"] [--benchmark-json FILE]

A provider is checked before it is timed. `tcm-fast bench` takes the providers in turn, empties the L2 cache
and uses CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from tcm_fast.benchmarks.check import check, make_call
from tcm_fast.benchmarks.measure import environment
from tcm_fast.benchmarks.optimizers import Tensors, check_step, make_step, narrow_shapes
from tcm_fast.benchmarks.peers import TORCH_KINDS, optimizer_providers, providers
from tcm_fast.benchmarks.settings import Settings
from tcm_fast.benchmarks.steps import (
    check_networks,
    sample_cases,
    sample_providers,
    step_cases,
    step_providers,
)
from tcm_fast.benchmarks.suite_operations import chosen_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Timed(NamedTuple):
    """What is timed. gap: why it cannot run here; check: what is wrong with its answer; make: the call."""

    name: str
    gap: str
    check: Callable[[], str]
    make: Callable[[], Callable[[], object]]


def operations() -> Iterator[Timed]:
    for case in chosen_cases(Settings(quick=True, device=DEVICE)):
        for who in providers(case, DEVICE):
            for direction in case.directions:
                yield Timed(
                    f"operation {case} {direction} {who.name}",
                    who.gap,
                    lambda case=case, who=who: check(case, who, DEVICE),  # type: ignore[misc]
                    lambda case=case, who=who, direction=direction: make_call(  # type: ignore[misc]
                        who.make, case.inputs(DEVICE, who.layout), direction
                    ),
                )


def optimizer_steps() -> Iterator[Timed]:
    for kind in TORCH_KINDS:
        for who, gap in optimizer_providers(kind, DEVICE).items():
            yield Timed(
                f"optimizer {kind} {who}",
                gap,
                lambda kind=kind, who=who: check_step(kind, who, DEVICE),  # type: ignore[misc]
                lambda kind=kind, who=who: make_step(  # type: ignore[misc]
                    kind, who, Tensors(narrow_shapes(), DEVICE)
                ),
            )


def training_steps() -> Iterator[Timed]:
    for case in step_cases(DEVICE, quick=True):
        for who, (make, gap) in step_providers(case).items():
            yield Timed(f"step {case} {who}", gap, lambda case=case: check_networks(case), make)  # type: ignore[misc]


def samplers() -> Iterator[Timed]:
    for case in sample_cases(DEVICE, quick=True):
        for who in ("plain", "tcm_fast"):
            yield Timed(
                f"sample {case} {who}",
                "",
                str,
                lambda case=case, who=who: sample_providers(case)[who],  # type: ignore[misc]
            )


ALL = [*operations(), *optimizer_steps(), *training_steps(), *samplers()]


@pytest.fixture(scope="module")
def machine() -> dict[str, Any]:
    return environment(DEVICE)


@pytest.mark.parametrize("timed", ALL, ids=lambda timed: timed.name.replace(" ", "_"))
def test_case(benchmark: Any, machine: dict[str, Any], timed: Timed) -> None:
    if timed.gap:
        pytest.skip(timed.gap)
    assert not timed.check()
    call = timed.make()

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(machine)
    benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=5)
