"""Training steps, sampling, memory and the roofline of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tcm_fast.benchmarks import official
from tcm_fast.benchmarks.accounting import Counting, profile_step, roofline
from tcm_fast.benchmarks.cases import CIFAR10, NARROW, available_networks
from tcm_fast.benchmarks.measure import host_waits, peak_memory, time_in_turn
from tcm_fast.benchmarks.peers import OURS
from tcm_fast.benchmarks.results import Results, Row
from tcm_fast.benchmarks.settings import Say, Settings, release_memory
from tcm_fast.benchmarks.steps import (
    OurStep,
    SampleCase,
    Step,
    StepCase,
    check_networks,
    sample_cases,
    sample_providers,
    step_cases,
    step_providers,
)  # fmt: skip

COUNTED = (OURS, "official_style")  # whose operations, waits and memory are counted


def _block(step: Step, steps: int, is_cuda: bool) -> Step:
    """Several steps and one wait at their end: the host may run ahead as it does in training."""

    def block() -> None:
        for _ in range(steps):
            step()
        if is_cuda:
            torch.cuda.synchronize()

    return block


def all_step_providers(
    case: StepCase, settings: Settings
) -> dict[str, tuple[Callable[[], Step], str]]:
    found = step_providers(case)
    for name, checkout, adapter in (
        ("published TCM", settings.official, official.official_tcm),
        ("FastGen", settings.fastgen, official.fastgen_tcm),
    ):
        why = official.gap(checkout, case)
        if checkout is not None:
            found[name] = (lambda a=adapter, c=checkout: a(c, case), why)
    return found


def time_steps(settings: Settings, results: Results, say: Say) -> Iterator[None]:
    for case in step_cases(settings.device, quick=settings.quick):
        if settings.wants(case):
            say(f"  {case}")
            time_step(case, settings, results)
            yield
            release_memory(settings.is_cuda)


def time_step(
    case: StepCase, settings: Settings, results: Results, names: Iterable[str] = ()
) -> None:
    """A training step by everybody who can take it, or by those of these names."""
    problem = "" if settings.dry_run else check_networks(case)
    if problem:
        results.rows.append(Row("step", str(case), "official_style", [], wrong=problem))
        return
    makers, wanted = {}, set(names)
    for name, (make, gap) in all_step_providers(case, settings).items():
        if wanted and name not in wanted:
            continue
        if gap:
            results.skipped.append((str(case), name, gap))
        else:
            makers[name] = make
    rows = _step_rows(case, makers, settings, results)
    results.rows += rows
    medians = {row.provider: row for row in rows}
    if {"published TCM", "official_style"} <= medians.keys():
        pair = medians["official_style"].samples, medians["published TCM"].samples
        results.notes.append(f"{case}: {official.nearness(*pair)[1]}")


def _step_rows(
    case: StepCase, makers: dict[str, Callable[[], Step]], settings: Settings, results: Results
) -> list[Row]:
    """All providers in turn; one after another where their networks do not fit together."""
    blocks = (4 if settings.quick else 10) if settings.is_cuda else 1
    pace = replace(settings.pace, rounds=min(settings.pace.rounds, 10 if settings.quick else 20))

    def timed(names: list[str]) -> dict[str, tuple[list[float], Step]]:
        steps = {name: makers[name]() for name in names}
        works = {name: _block(step, blocks, settings.is_cuda) for name, step in steps.items()}
        timings = time_in_turn(works, settings.device, pace, clock=True)
        return {n: ([s / blocks for s in t.samples], steps[n]) for n, t in timings.items()}

    found: dict[str, tuple[list[float], Step]] = {}
    together = True
    try:
        found = timed(list(makers))
    except Exception:  # out of memory, or one of them fails: which shows when each is alone
        together = False
    rows = []
    for name in makers:
        if not together:
            release_memory(settings.is_cuda)
            try:
                found = timed([name])
            except Exception as error:
                rows += _failed("step", case, name, error, results)
                continue
        samples, step = found[name]
        row = Row(
            "step", str(case), name, samples, images=case.batch_size, precision=case.precision,
            network=case.network.label, batch=case.batch_size, operation=case.phase,
            extra={"in turn": together},
        )  # fmt: skip
        if name in (*COUNTED, "tcm_fast graphs"):
            try:
                _count(step, row, settings.is_cuda)
            except Exception as error:  # the profiler's trouble costs no time that was taken
                row.extra["not counted"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
        found.pop(name)
        del step
    return rows


def _failed(group: str, case: StepCase, name: str, error: Exception, results: Results) -> list[Row]:
    """What is kept of a provider that cannot take its step: ours is wrong, another one skipped."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        why = "out of memory"
    else:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if name.startswith(OURS):
            return [Row(group, str(case), name, [], wrong=why)]
    results.skipped.append((str(case), name, why))
    return []


def _count(step: Step, row: Row, is_cuda: bool) -> None:
    """Operations a step starts and, on a GPU, how often the host waits. On a CPU nobody waits: the
    operations that read a value back are counted, each of which would."""
    if is_cuda:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            step()
            torch.cuda.synchronize()
        events = prof.key_averages()
        starts = (
            "cudaLaunchKernel",
            "cuLaunchKernel",
            "cudaGraphLaunch",
            "cudaMemcpyAsync",
            "cudaMemsetAsync",
        )
        row.launches = sum(e.count for e in events if e.key.startswith(starts))
        row.waits = host_waits(step)
        return
    with Counting() as counting:
        step()
    row.launches, row.waits = counting.total.launches, sum(counting.waits.values())


def time_sampling(settings: Settings, results: Results, say: Say) -> Iterator[None]:
    for case in sample_cases(settings.device, quick=settings.quick):
        if settings.wants(case):
            time_sample(case, settings, results)
            yield
            release_memory(settings.is_cuda)


def time_sample(case: SampleCase, settings: Settings, results: Results) -> None:
    works = sample_providers(case)  # both end by copying to the host
    timings = time_in_turn(works, settings.device, settings.pace, clock=True)
    results.rows += [
        Row("sample", str(case), name, timing.samples, images=case.batch,
            precision=case.precision, network=case.network.label, batch=case.batch)
        for name, timing in timings.items()
    ]  # fmt: skip


def measure_memory(settings: Settings, results: Results, say: Say) -> Iterator[None]:
    for case in memory_cases(settings):
        if settings.wants(case):
            measure_peaks(case, settings, results)
            yield


def measure_peaks(case: StepCase, settings: Settings, results: Results) -> None:
    """Most memory that a provider's steps take, alone on the device. On a CPU the bytes of all tensors
    made in a step and alive at once are counted, weights and optimizer state left out."""
    for name, (make, gap) in step_providers(case).items():
        if gap or name not in (*COUNTED, "tcm_fast graphs"):
            continue
        release_memory(settings.is_cuda)
        step = make()
        if settings.is_cuda:
            try:
                peak, how = peak_memory(_block(step, 4, True), settings.device), "allocator"
            except Exception as error:
                results.rows += _failed("memory", case, name, error, results)
                continue
        else:
            for _ in range(2):
                step()
            with Counting() as counting:
                step()
            peak, how = counting.peak, "counted"
        results.rows.append(
            Row("memory", str(case), name, [float(peak)], how=how, unit="bytes",
                images=case.batch_size, network=case.network.label, batch=case.batch_size,
                precision=case.precision, operation=case.phase)
        )  # fmt: skip
        del step


def memory_cases(settings: Settings) -> list[StepCase]:
    if not settings.is_cuda:
        return [StepCase(NARROW, size) for size in ((4, 16) if settings.quick else (4, 8, 16, 32))]
    precisions = ("bf16",) if settings.quick else ("fp32", "bf16")
    sizes = (16, 128) if settings.quick else (16, 64, 128, 256, 512)
    return [
        StepCase(network, size, precision, device=settings.device)
        for network in available_networks()
        for size in (sizes if network == CIFAR10 else sizes[:3])
        for precision in precisions
    ]


def roofline_cases(settings: Settings) -> list[StepCase]:
    if not settings.is_cuda:
        return [StepCase(NARROW, 16)]
    return [
        StepCase(network, 128 if network == CIFAR10 else 64, "bf16", device=settings.device)
        for network in available_networks()
    ]


def account(settings: Settings, results: Results, say: Say) -> Iterator[None]:
    for case in roofline_cases(settings):
        if settings.wants(case):
            account_for(case, results)
            yield
            release_memory(settings.is_cuda)


def account_for(case: StepCase, results: Results) -> None:
    assert results.ceilings is not None
    rows = roofline(OurStep(case), results.ceilings, case.precision)
    results.roofline[str(case)] = [asdict(row) for row in rows]


def profile(settings: Settings, out: Path, say: Say = print) -> Path:
    """`tcm-fast bench profile`: a Chrome trace and tables of one training step."""
    (case, *_) = roofline_cases(settings)
    found = profile_step(OurStep(case), out)
    whole = found.seconds
    say(f"{case}: {1e3 * whole:.1f} ms under the profiler")
    say(f"{'ms':>9} {'calls':>6}  {'part':28} {'kernel' if settings.is_cuda else 'operation'}")
    for name, calls, seconds, part in found.kernels[:20]:
        say(f"{1e3 * seconds:9.2f} {calls:6}  {part:28} {name[:90]}")
    say(f"{'ms':>9} {'calls':>6}  module (forward, children included)")
    for name, calls, seconds in found.modules[:12]:
        say(f"{1e3 * seconds:9.2f} {calls:6}  {name}")
    return found.trace
