"""Operations, the host's time of a call, and optimizer steps: each is checked, then timed in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tcm_fast.benchmarks import optimizers
from tcm_fast.benchmarks.cases import (
    DIGITS,
    DTYPE_NAMES,
    NARROW,
    Case,
    available_networks,
    cases,
    work,
)
from tcm_fast.benchmarks.check import Provider, check, check_ends, make_call
from tcm_fast.benchmarks.measure import host_seconds, time_in_turn
from tcm_fast.benchmarks.peers import BASELINE, OURS, optimizer_providers, providers
from tcm_fast.benchmarks.results import Results, Row
from tcm_fast.benchmarks.settings import Say, Settings
from tcm_fast.benchmarks.steps import Step
from tcm_fast.runtime.arithmetic import tf32


def chosen_cases(settings: Settings) -> list[Case]:
    """Every site of the recipes' networks; quickly, the three of each operation with the most work."""
    if settings.is_cuda:
        dtypes = (torch.bfloat16,) if settings.quick else tuple(DTYPE_NAMES)
        found = cases(available_networks(), (64,), dtypes)
        if not settings.quick:  # large enough for the copy rate to be a fair ceiling
            found += largest(cases(available_networks(), (512,), dtypes), 3)
    else:
        networks = (NARROW,) if settings.quick else (DIGITS, NARROW)
        found = cases(networks, (8,), (torch.float32,))
    found = largest(found, 3) if settings.quick else found
    return [case for case in found if settings.wants(case)]


def largest(found: list[Case], number: int) -> list[Case]:
    groups: dict[Any, list[Case]] = defaultdict(list)
    for case in found:
        groups[case.operation, case.site.network, case.dtype].append(case)
    for group in groups.values():
        group.sort(key=lambda case: -case.site.count * work(case, case.directions[-1]).bytes)
    kept = {id(case) for group in groups.values() for case in group[:number]}
    return [case for case in found if id(case) in kept]


def time_operations(settings: Settings, results: Results, say: Say) -> Iterator[None]:
    before = len(results.rows)
    for case in chosen_cases(settings):
        time_operation(case, settings, results)
        yield
    if not settings.quick and not settings.only:
        results.rows += network_sums(results.rows[before:])
        yield


@tf32(False)
def time_operation(case: Case, settings: Settings, results: Results) -> None:
    candidates = providers(case, settings.device, compiled=settings.compiled)
    results.rows += operation_rows(case, candidates, settings, results.skipped)


def operation_rows(
    case: Case, candidates: Iterable[Provider], settings: Settings, skipped: list[Any]
) -> list[Row]:
    """Check, then time, in both directions."""
    good, rows = [], []
    torch.compiler.reset()  # or the sites before this one count against what it keeps
    for provider in candidates:
        if provider.gap:
            skipped.append((str(case), provider.name, provider.gap))
            continue
        problem = ""
        if not settings.dry_run:
            problem = check(case, provider, settings.device)
            if not problem and provider.is_ours:
                problem = check_ends(case, provider, settings.device)
        if not problem:
            good.append(provider)
        elif provider.is_ours or provider.name.startswith(BASELINE):
            rows += [
                _row(case, provider.name, direction, wrong=problem) for direction in case.directions
            ]
        else:  # a peer that cannot do this site
            skipped.append((str(case), provider.name, problem))
    for direction in case.directions:
        works = {
            p.name: make_call(p.make, case.inputs(settings.device, p.layout), direction)
            for p in good
        }
        timings = time_in_turn(works, settings.device, settings.pace)
        rows += [
            _row(case, name, direction, samples=timing.samples, how=timing.how)
            for name, timing in timings.items()
        ]
    return rows


def _row(case: Case, provider: str, direction: str, **values: Any) -> Row:
    need = work(case, direction)
    return Row(
        "ops", f"{case} {direction}", provider, values.pop("samples", []), bytes=need.bytes,
        flops=need.flops, precision=DTYPE_NAMES[case.dtype], network=case.site.network,
        operation=case.operation, direction=direction, count=case.site.count, batch=case.batch, **values,
    )  # fmt: skip


def network_sums(rows: list[Row]) -> list[Row]:
    """For each provider that was timed at every site of a network, the sum over all calls of a pass; all
    sites must be among the rows."""
    groups: dict[Any, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row.operation, row.network, row.batch, row.precision, row.direction)
        groups[key][row.provider].append(row)
    sums = []
    for (operation, network, batch, precision, direction), by_provider in groups.items():
        sites = {row.case for found in by_provider.values() for row in found}
        if len(sites) < 2:
            continue
        for provider, found in by_provider.items():
            if len(found) < len(sites) or any(row.wrong for row in found):
                continue
            calls = sum(row.count for row in found)
            columns = zip(*([row.count * s for s in row.samples] for row in found), strict=True)
            sums.append(
                Row(
                    "ops", f"{operation} all {calls} calls of {network} batch {batch} {precision} "
                    f"{direction}", provider, [sum(column) for column in columns], how=found[0].how,
                    bytes=sum(row.count * row.bytes for row in found),
                    flops=sum(row.count * row.flops for row in found), precision=precision,
                    network=network, operation=operation, direction=direction, count=0, batch=batch,
                )
            )  # fmt: skip
    return sums


def time_host(settings: Settings, results: Results, say: Say) -> Iterator[None]:
    """Host time of a call, on tensors so small that the device does nothing to speak of: ours beside
    eager GroupNorm and SiLU."""
    sites = [
        c for c in cases((DIGITS,), (1,), (torch.float32,)) if c.operation == "group_norm_silu"
    ]
    case = next(c for c in sites if c.site["add"] is None and not c.site["with_x"])
    for direction in case.directions:
        found = {p.name: p for p in providers(case, settings.device, compiled=False)}
        name = f"host time of {case.operation} {case.site} {direction}"
        if not settings.wants(name):
            continue
        for provider in (found[BASELINE], found[OURS]):
            call = make_call(
                provider.make, case.inputs(settings.device, provider.layout), direction
            )
            samples = host_seconds(call, settings.device, settings.pace)
            results.rows.append(
                Row("host", name, provider.name, samples, direction=direction, network=case.site.network)
            )  # fmt: skip
        yield


def time_optimizers(settings: Settings, results: Results, say: Say) -> Iterator[None]:
    small = ("ddpmpp", 32, {"model_channels": 64, "channel_mult": (1, 2, 2), "num_blocks": 1})
    networks = [small]
    if settings.is_cuda:
        networks = [(n.name, n.img_resolution, dict(n.architecture)) for n in available_networks()]
    for network, resolution, architecture in networks:
        sizes = optimizers.network_shapes(network, resolution, **architecture)
        parameters = sum(size.numel() for size in sizes)
        for kind in optimizers.TORCH_KINDS:
            name = (
                f"{kind} step, clipping, average, 16-bit copy: {network} {parameters / 1e6:.1f} M"
            )
            if not settings.wants(name):
                continue
            steps: dict[str, Step] = {}
            for provider, gap in optimizer_providers(kind, settings.device).items():
                problem = gap
                if not (gap or settings.dry_run):
                    problem = optimizers.check_step(kind, provider, settings.device)
                if gap or (problem and provider != OURS):
                    results.skipped.append((name, provider, problem))
                elif problem:
                    results.rows.append(Row("optimizer", name, provider, [], wrong=problem))
                else:
                    tensors = optimizers.Tensors(sizes, settings.device)
                    steps[provider] = optimizers.make_step(kind, provider, tensors)
            timings = time_in_turn(steps, settings.device, settings.pace, capture=False)
            results.rows += [
                Row(
                    "optimizer", name, provider, timing.samples, how=timing.how, network=network,
                    bytes=optimizers.BYTES_PER_PARAMETER * parameters, operation="fused_step",
                )
                for provider, timing in timings.items()
            ]  # fmt: skip
            yield
