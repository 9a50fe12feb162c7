"""What `gpu_session.py` measures, in the order of its value. Each case runs in a process of its own; what it
needs is imported when it runs, so that a module that is missing costs that case alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcm_fast.benchmarks.results import Results
    from tcm_fast.benchmarks.settings import Settings

Measure = Callable[["Settings", "Results"], None]


def _network(name: str) -> Any:
    from tcm_fast.benchmarks import cases

    by_name = {"ddpmpp": cases.CIFAR10, "digits": cases.DIGITS, "narrow": cases.NARROW}
    return by_name.get(name) or next(n for n in cases.available_networks() if n.name == name)


def _step_case(settings: Settings, network: str, batch: int, precision: str, phase: str) -> Any:
    from tcm_fast.benchmarks.steps import StepCase

    return StepCase(_network(network), batch, precision, phase, settings.device)


def step(network: str, batch: int, precision: str, *names: str, phase: str = "tcm") -> Measure:
    """A training step by the providers of these names."""

    def measure(settings: Settings, results: Results) -> None:
        from tcm_fast.benchmarks import suite_steps

        case = _step_case(settings, network, batch, precision, phase)
        suite_steps.time_step(case, settings, results, names)

    return measure


def operation(name: str, batch: int = 128, most: int = 2) -> Measure:
    """An operation in bf16 at the sites of each network with the most work."""

    def measure(settings: Settings, results: Results) -> None:
        import torch

        from tcm_fast.benchmarks import cases, suite_operations

        dtype = torch.bfloat16 if settings.is_cuda else torch.float32
        networks = cases.available_networks() if settings.is_cuda else [cases.DIGITS]
        for case in suite_operations.largest(cases.cases(networks, [batch], [dtype]), most):
            if case.operation == name:
                suite_operations.time_operation(case, settings, results)

    return measure


def convolutions(settings: Settings, results: Results) -> None:
    """fp32 convolutions by three bf16 products beside cuDNN's."""
    from tcm_fast.benchmarks.convolutions import time_convolutions

    time_convolutions(settings, results, 128 if settings.is_cuda else 1)


def group(name: str, only: str = "") -> Measure:
    """A group of `tcm-fast bench`, its quick cases."""

    def measure(settings: Settings, results: Results) -> None:
        from dataclasses import replace

        from tcm_fast.benchmarks import suite

        for _ in suite.GROUP_FUNCTIONS[name](replace(settings, only=only), results, print):
            pass

    return measure


def sample(network: str, batch: int, steps: int, precision: str = "fp16") -> Measure:
    def measure(settings: Settings, results: Results) -> None:
        from tcm_fast.benchmarks import suite_steps
        from tcm_fast.benchmarks.steps import SampleCase

        case = SampleCase(_network(network), batch, steps, precision, settings.device)
        suite_steps.time_sample(case, settings, results)

    return measure


def ceilings(settings: Settings, results: Results) -> None:
    from tcm_fast.planning.throughput import measure_ceilings

    results.ceilings = measure_ceilings(settings.device, quick=settings.quick)


def roofline(network: str, batch: int, precision: str = "bf16") -> Measure:
    def measure(settings: Settings, results: Results) -> None:
        from tcm_fast.benchmarks import suite_steps

        ceilings(settings, results)
        suite_steps.account_for(_step_case(settings, network, batch, precision, "tcm"), results)

    return measure


def peaks(network: str, batch: int, precision: str = "bf16") -> Measure:
    def measure(settings: Settings, results: Results) -> None:
        from tcm_fast.benchmarks import suite_steps

        case = _step_case(settings, network, batch, precision, "tcm")
        suite_steps.measure_peaks(case, settings, results)

    return measure


def capped(preset: str, gib: int, **changes: Any) -> Measure:
    """A recipe's stage-2 step where torch may take `gib` GiB, with the memory settings that `plan` chooses
    for such a card: what it takes beside what was predicted."""

    def measure(settings: Settings, results: Results) -> None:
        from dataclasses import replace

        import numpy as np
        import torch

        from tcm_fast.benchmarks.memory_optimizations import held
        from tcm_fast.benchmarks.results import Row
        from tcm_fast.config import load_preset
        from tcm_fast.planning.cards import this_device, with_memory
        from tcm_fast.planning.memory_estimate import ImageShape, memory
        from tcm_fast.planning.memory_planner import choose_optimizations

        device = torch.device(settings.device)
        config = replace(load_preset(preset), phases=("tcm",), device=settings.device, **changes)
        side, classes = (64, 1000) if preset.startswith("imagenet64") else (32, 10)
        classes = classes if config.network.class_conditional else 0
        card = with_memory(this_device(device, measure=False), f"{gib}GiB")
        if settings.is_cuda:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, card.usable / total))
        with tempfile.TemporaryDirectory() as folder:
            count = 2 * config.tcm.batch_size
            images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
            labels = {"labels": np.arange(count) % classes} if classes else {}
            np.savez(f"{folder}/images.npz", images=images, **labels)
            data = replace(config.data, source=f"{folder}/images.npz")
            config = replace(config, data=data, eval=replace(config.eval, features=""))
            shape = ImageShape(side, 3, classes, count)
            chosen = choose_optimizations(config, shape, card)
            predicted = memory(chosen, "tcm", shape, on_gpu=card.on_gpu).total
            measured = held(chosen, "tcm", f"{folder}/run")
        name = f"{preset} tcm batch {config.tcm.batch_size} {config.precision} within {gib} GiB"
        for provider, value in (("plan", predicted), ("tcm_fast", measured)):
            results.rows.append(
                Row("memory", name, provider, [float(value)], unit="bytes", how="allocator",
                    images=config.tcm.batch_size, precision=config.precision, operation="tcm",
                    extra={"micro_batches": chosen.micro_batches, "offload": chosen.offload})
            )  # fmt: skip

    return measure


def digits(images: int) -> Measure:
    """The digits recipe from beginning to end, shortened: that a whole run works, and what it learns."""

    def measure(settings: Settings, results: Results) -> None:
        from dataclasses import replace

        from tcm_fast.config import load_preset
        from tcm_fast.training.trainer import Trainer

        config = replace(load_preset("digits"), device=settings.device, grid_every=10**9)
        for name in config.phases:
            phase = replace(config.phase(name), images=images)
            config = replace(config, **{name: phase})
        with tempfile.TemporaryDirectory() as folder:
            for done in Trainer(config, folder).run():
                distances = ", ".join(
                    f"{'Heun' if steps is None else f'{steps}-step'} {report.frechet:.2f}"
                    for steps, report in done.reports.items()
                )
                results.notes.append(
                    f"digits {done.phase}: {done.images:,} images in {done.seconds:.1f} s, Fréchet "
                    f"distances {distances or 'not measured'}"
                )

    return measure


@dataclass(frozen=True)
class Case:
    """What is measured, and the most seconds that it may take, the process's start included."""

    measure: Measure
    seconds: float


STYLE = ("official_style", "official_style same precision", "official_style channels_last")
OURS = ("tcm_fast", "tcm_fast graphs")
COMPILED = ("official_style channels_last compiled", "tcm_fast graphs")
# In the order of their value.
FIRST_CASES: dict[str, Case] = {
    "ceilings": Case(ceilings, 60),
    "digits, a whole run": Case(digits(32_000), 120),
    "step CIFAR-10 bf16": Case(step("ddpmpp", 128, "bf16", *STYLE, *OURS), 120),
    "step EDM2-S fp16": Case(step("edm2", 64, "fp16", *STYLE, *OURS), 120),
    "conv_bf16x3": Case(convolutions, 90),
    "step CIFAR-10 bf16x3": Case(step("ddpmpp", 128, "bf16x3", *OURS), 120),
    "group_norm_silu": Case(operation("group_norm_silu"), 120),
    "qkv_attention": Case(operation("qkv_attention"), 120),
    "residual_conv1x1": Case(operation("residual_conv1x1"), 90),
    "step CIFAR-10 bf16 compiled": Case(step("ddpmpp", 128, "bf16", *COMPILED), 240),
    "optimizer": Case(group("optimizer"), 90),
    "sample CIFAR-10, 1": Case(sample("ddpmpp", 1, 1), 45),
    "sample CIFAR-10, 512": Case(sample("ddpmpp", 512, 1), 45),
    "CIFAR-10 within 24 GiB": Case(capped("cifar10", 24), 120),
    "CIFAR-10 within 8 GiB": Case(capped("cifar10", 8), 120),
    "step CIFAR-10 fp32": Case(step("ddpmpp", 128, "fp32", STYLE[0], *OURS), 90),
}
LATER_CASES: dict[str, Case] = {
    "step EDM2-S fp16 compiled": Case(step("edm2", 64, "fp16", *COMPILED), 300),
    "where time goes, CIFAR-10": Case(roofline("ddpmpp", 128), 90),
    "where time goes, EDM2-S": Case(roofline("edm2", 64, "fp16"), 90),
    "ImageNet-64 S within 24 GiB": Case(capped("imagenet64-s", 24), 150),
    "peaks CIFAR-10": Case(peaks("ddpmpp", 128), 60),
    "peaks EDM2-S": Case(peaks("edm2", 64, "fp16"), 60),
    "host": Case(group("host"), 45),
    "step CIFAR-10 bf16, stage 1": Case(step("ddpmpp", 128, "bf16", *STYLE, *OURS, phase="ect"), 90),
    "step CIFAR-10 fp16": Case(step("ddpmpp", 128, "fp16", *STYLE, *OURS), 90),
    "step CIFAR-10 tf32": Case(step("ddpmpp", 128, "tf32", *STYLE, *OURS), 90),
    "step CIFAR-10 bf16, 512": Case(step("ddpmpp", 512, "bf16", *STYLE, *OURS), 120),
    "step CIFAR-10 bf16, 16": Case(step("ddpmpp", 16, "bf16", *STYLE, *OURS), 60),
    "step ADM bf16": Case(step("adm", 64, "bf16", *OURS), 120),
    **{
        name: Case(operation(name, most=1), 90)
        for name in (
            "consistency_loss", "noise_pair", "denoise_to_uint8", "mp_sum",
            "mp_cat_mp_silu", "modulate_mp_silu", "pixel_norm_mp_silu", "resample", "posterior_mean",
        )
    },
    "sample EDM2-S, 512": Case(sample("edm2", 512, 1), 60),
    "sample CIFAR-10, 512, 2 steps": Case(sample("ddpmpp", 512, 2), 45),
}  # fmt: skip
CASES = FIRST_CASES | LATER_CASES


def run_case(name: str, out: Path, device: str, dry_run: bool) -> None:
    """A case's results into a file, also where it fails half-way."""
    from tcm_fast.benchmarks import suite
    from tcm_fast.benchmarks.settings import Settings

    settings = Settings(quick=True, device=device, dry_run=dry_run)
    results = suite.begin(settings)
    try:
        CASES[name].measure(settings, results)
    finally:
        results.save(out)
