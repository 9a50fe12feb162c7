"""The whole suite: `tcm-fast bench`. Each group makes rows; nothing is timed before it was found right."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tcm_fast.benchmarks import official, optimizers
from tcm_fast.benchmarks.accounting import Counting, profile_step, roofline
from tcm_fast.benchmarks.cases import (
    CIFAR10,
    DIGITS,
    DTYPE_NAMES,
    NARROW,
    Case,
    Provider,
    available_networks,
    cases,
    check,
    check_ends,
    make_call,
    work,
)  # fmt: skip
from tcm_fast.benchmarks.measure import (
    Pace,
    environment,
    host_seconds,
    host_waits,
    peak_memory,
    time_in_turn,
)  # fmt: skip
from tcm_fast.benchmarks.peers import BASELINE, OURS, optimizer_providers, providers
from tcm_fast.benchmarks.results import GROUPS, Results, Row
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
from tcm_fast.planning.throughput import measure_ceilings
from tcm_fast.runtime.arithmetic import tf32

Say = Callable[[str], None]
Save = Callable[[Results], None]
COUNTED = (OURS, "official_style")  # whose operations, waits and memory are counted


@dataclass(frozen=True)
class Settings:
    """What is wanted. groups: of results.GROUPS, and roofline. compiled: torch.compile among the
    operations' providers, None on a GPU only. only: part of a case's name. official, fastgen: checkouts.
    dry_run: each call once and no answer looked at, to see that all runs on a device that computes nothing.
    """

    groups: tuple[str, ...] = (*GROUPS, "roofline")
    quick: bool = False
    device: str = "cpu"
    compiled: bool | None = None
    only: str = ""
    official: Path | None = None
    fastgen: Path | None = None
    dry_run: bool = False

    @property
    def is_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def pace(self) -> Pace:
        return Pace(0.0, 1) if self.dry_run else Pace.of(self.quick)


def begin(settings: Settings) -> Results:
    """Results without a row: where and what is measured."""
    configuration = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    return Results(environment(settings.device), configuration)


def run(settings: Settings, say: Say = print, save: Save = lambda _: None) -> Results:
    """Measure. A provider whose answer is wrong has a row that says so, and no samples. `save` is given
    what there is after every case, so that a run that is cut short loses one case."""
    begun = time.perf_counter()
    results = begin(settings)
    say(f"{results.environment['name']}: measuring ceilings")
    results.ceilings = measure_ceilings(settings.device, quick=settings.quick)
    for group in settings.groups:
        say(f"{group} ...")
        for _ in GROUP_FUNCTIONS[group](settings, results, say):
            save(results)
        _forget(settings.is_cuda)
    if not settings.is_cuda:
        say("kernels for a GPU, in Triton's interpreter ...")
        results.notes.append(validate_interpreted())
        say(results.notes[-1])
    results.configuration["seconds"] = round(time.perf_counter() - begun)
    return results


def _forget(is_cuda: bool) -> None:
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()


def _wanted(settings: Settings, case: Any) -> bool:
    return settings.only in str(case)


# ---- operations ---------------------------------------------------------------------------------


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
    return [case for case in found if _wanted(settings, case)]


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
        if not _wanted(settings, name):
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
            if not _wanted(settings, name):
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


# ---- whole steps --------------------------------------------------------------------------------


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
        if _wanted(settings, case):
            say(f"  {case}")
            time_step(case, settings, results)
            yield
            _forget(settings.is_cuda)


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
            _forget(settings.is_cuda)
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
        if _wanted(settings, case):
            time_sample(case, settings, results)
            yield
            _forget(settings.is_cuda)


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
        if _wanted(settings, case):
            measure_peaks(case, settings, results)
            yield


def measure_peaks(case: StepCase, settings: Settings, results: Results) -> None:
    """Most memory that a provider's steps take, alone on the device. On a CPU the bytes of all tensors
    made in a step and alive at once are counted, weights and optimizer state left out."""
    for name, (make, gap) in step_providers(case).items():
        if gap or name not in (*COUNTED, "tcm_fast graphs"):
            continue
        _forget(settings.is_cuda)
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
        if _wanted(settings, case):
            account_for(case, results)
            yield
            _forget(settings.is_cuda)


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


# Each makes rows and yields after every case.
GROUP_FUNCTIONS: dict[str, Callable[[Settings, Results, Say], Iterator[None]]] = {
    "ops": time_operations,
    "host": time_host,
    "optimizer": time_optimizers,
    "step": time_steps,
    "sample": time_sampling,
    "memory": measure_memory,
    "roofline": account,
}


# ---- kernels without a GPU ----------------------------------------------------------------------


def validate_interpreted() -> str:
    """Run the kernels' cases at tiny sizes in Triton's interpreter, in a process of their own (whether a
    kernel is interpreted is settled when it is defined). Returns a sentence; a failure raises."""
    command = [sys.executable, "-m", "tcm_fast.benchmarks.validate"]
    variables = {"TRITON_INTERPRET": "1", "TCM_FAST_BACKEND": "kernel", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    sentence = (ran.stdout.strip().splitlines() or [""])[-1]
    if ran.returncode == 0:
        return sentence
    raise RuntimeError(
        f"bench: kernels in the interpreter: {sentence or ran.stderr.strip()[-400:]}"
    )
