"""A recipe within so many hours on the device that is there: measured, scaled, and scaled again before each
phase, so that the end comes when it was asked for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tcm_fast.config import Config, phase_name, require, save_config
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.planning.cards import Card
from tcm_fast.planning.memory_estimate import ImageShape
from tcm_fast.planning.memory_planner import Plan, choose_optimizations, mean_work, plan_run
from tcm_fast.planning.recipes import images_for, leaves_signal_to_tf32, scale_recipe, scale_width
from tcm_fast.sampling.sampler import HEUN_STEPS
from tcm_fast.training.phase import PhaseResult
from tcm_fast.training.trainer import Trainer

FEWEST_STEPS = 100  # of a phase
ROUNDS = 6  # of speed and length until one fits the other
RESERVE = 0.02  # of the time: loading, pictures, checkpoints
EVALUATED = 0.03  # of the time at most: samples drawn and compared at the phases' ends
FEWEST_EVALUATED = 256  # samples; a distance of fewer says nothing
CPU_ROWS = 32  # images of a step that is measured on a CPU


def fit_time_budget(
    config: Config,
    shape: ImageShape,
    card: Card,
    hours: float,
    *,
    gpus: int = 1,
    rates: Mapping[str, float] | None = None,
    width: int | None = None,
    auto: bool = False,
    fewest: int | None = None,
    precision: str | None = None,
) -> Plan:
    """The longest schedule of a recipe that fits in so many hours, on a network of suitable width.

    Args:
        config: the long recipe.
        shape: of the images.
        card: where it runs; rates are computed for it where they are not given.
        hours: of time, positive.
        rates: images per second, measured on the network of `width`.
        width: of the network; None is chosen by the operations that fit in the time.
        auto: choose the optimizations, too.
        fewest: steps of a phase; FEWEST_STEPS where it is not given.
        precision: decided already: the recipe's, or tf32 in the place of fp32. None takes tf32 where it is
            faster and the schedule leaves it enough signal.

    Raises:
        ValueError: no time, or too little for the phases' first steps.
    """
    fewest = FEWEST_STEPS if fewest is None else fewest
    require(hours > 0, f"time_budget: must be positive, got {hours:g}")
    seconds = hours * 3600 * (1 - RESERVE)
    if auto:
        config = replace(config, micro_batches=1)
    whole = plan_run(config, shape, card, gpus=gpus)
    if width is None and whole.seconds <= seconds and not rates:
        if auto:  # the recipe as it is
            return plan_run(
                choose_optimizations(config, shape, card, gpus=gpus), shape, card, gpus=gpus
            )
        return whole
    if width is None and config.network.model_channels is not None:
        width = scale_width(config.network.model_channels, seconds / whole.seconds)
    known = dict(rates or {})

    def fill(tf32: bool) -> Plan:
        """Width, batch and precision decide the speed, and the speed the length."""
        plan, fullest = whole, None
        for _ in range(ROUNDS):
            found = {p.name: known.get(p.name, p.rate) for p in plan.phases}
            images = images_for(seconds, found, config.phases)
            scaled = scale_recipe(
                config, images, width=width, count=shape.count or 50_000, tf32=tf32
            )
            plan = plan_run(scaled, shape, card, gpus=gpus, rates=known)
            if plan.seconds <= seconds and (fullest is None or plan.seconds > fullest.seconds):
                fullest = plan
            if 0.99 * seconds <= plan.seconds <= seconds:
                break
        return fullest or plan

    may_change = config.precision == "fp32" and card.on_gpu
    faster = card.flops("tf32") > card.flops("fp32")
    plan = fill(may_change and precision == "tf32")
    if may_change and faster and precision is None and leaves_signal_to_tf32(plan.config):
        plan = fill(True)
    if auto:
        chosen = choose_optimizations(plan.config, shape, card, gpus=gpus)
        plan = plan_run(chosen, shape, card, gpus=gpus, rates=known)
    steps = {p.name: p.images // p.batch_size for p in plan.phases}
    name = min(steps, key=lambda n: steps[n])
    require(
        steps[name] >= fewest,
        f"time_budget: {hours:g} h fit {steps[name]} steps of phase {name}, at least {fewest} are "
        f"needed: {hours * fewest / max(steps[name], 1) * 1.05:.2g} h, or a smaller network",
    )
    return plan


def calibrate(config: Config, name: str, *, seconds: float = 3.0) -> float:
    """Images per second of a phase on this device, averaged over its schedule; measured by steps that
    leave nothing behind."""
    phase = config.phase(name)
    rows = phase.batch_size // config.micro_batches
    if not torch.cuda.is_available() or config.device == "cpu":
        rows = min(rows, CPU_ROWS)
    small = replace(config, **{name: replace(phase, batch_size=rows)}, micro_batches=1)  # type: ignore[arg-type]
    small = replace(small, phases=(phase_name(name),), snapshot_every=0, memory="manual")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(small, folder)
        rate = trainer.measure(name, seconds=seconds)
        trainer.checkpoints.close()
    return rate / mean_work(config, name)


def _calls(name: str) -> int:
    """Calls of the network for a sample that is evaluated in all the phase's numbers of steps."""
    return sum(steps or 2 * HEUN_STEPS - 1 for steps in OBJECTIVES[name].sampling_steps)


def evaluate_within(
    config: Config, rates: Mapping[str, float], seconds: float
) -> tuple[Config, str]:
    """The configuration with as many samples as can be evaluated in EVALUATED of the time, and a sentence on
    it. A training image counts as three calls of the network."""
    if not config.eval.features:
        return config, ""
    each = sum(_calls(name) / (3 * rates[name]) for name in config.phases)
    num = int(EVALUATED * seconds / each)
    if num < FEWEST_EVALUATED:
        text = "eval: no time for distances; tcm-fast eval measures them afterwards"
        return replace(config, eval=replace(config.eval, features="")), text
    num = min(num, config.eval.num or num)
    return (
        replace(config, eval=replace(config.eval, num=num)),
        f"eval: {num:,} samples at each phase's end",
    )


def train_within(
    config: Config,
    out: Path,
    hours: float,
    shape: ImageShape,
    card: Card,
    *,
    init: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[PhaseResult]:
    """Train a recipe's phases within so many hours.

    Each phase is scaled to what is left when it begins, by speeds measured just before and by how the
    phases so far kept to theirs.

    Raises:
        ValueError: too little time.
        Interrupted, TrainingError: as `Trainer.run`.
    """
    begun = time.monotonic()
    end = begun + hours * 3600 * (1 - RESERVE)
    auto = config.memory == "auto"
    plan = fit_time_budget(config, shape, card, hours, auto=auto)
    width, precision = plan.config.network.model_channels, plan.config.precision
    whole = plan.config
    rates: dict[str, float] = {name: calibrate(whole, name) for name in config.phases}
    config, text = evaluate_within(config, rates, hours * 3600)
    if text:
        end -= EVALUATED * hours * 3600
        say(text)
    slower = 1.0  # how much longer than planned the last phase took
    results: list[PhaseResult] = []
    done: dict[str, Config] = {}
    for name in config.phases:
        left = config.phases[config.phases.index(name) :]
        now = time.monotonic()
        hours_left = max(end - now, 0.0) / 3600 / (1 - RESERVE)
        rest = replace(config, phases=left)
        effective: dict[str, float] = {n: rates[n] / slower for n in left}
        plan = fit_time_budget(
            rest, shape, card, hours_left, rates=effective, width=width, auto=auto,
            fewest=1 if done else FEWEST_STEPS, precision=precision,
        )  # fmt: skip
        phase = plan.config.phase(name)
        before = {earlier: done[earlier].phase(earlier) for earlier in done}
        phase = OBJECTIVES[name].continued(phase, before)
        # The phases before are as they were: what they left is read by their own settings.
        own = before | {name: phase}
        settings = replace(plan.config, phases=(name,), **own)  # type: ignore[arg-type]
        planned = next(p.seconds for p in plan.phases if p.name == name)
        say(
            f"{name}: {phase.images:,} images in {planned / 60:.1f} min at "
            f"{effective[name]:,.0f} images/s, batch {phase.batch_size}"
        )
        trainer = Trainer(settings, out, init=init if not done else None, resume=bool(done))
        started = time.monotonic()
        results += trainer.run()
        slower *= max((time.monotonic() - started) / planned, 0.5)
        done[name] = settings
        whole = replace(whole, **{name: phase})  # type: ignore[arg-type]
    save_config(replace(whole, phases=config.phases), out / "config.json")
    say(f"{(time.monotonic() - begun) / 60:.1f} of {hours * 60:.1f} minutes taken")
    return results
