"""`tcm-fast plan`: arguments, tables and advice. torch is imported when it runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tcm_fast.cli.rank_cards import print_ranking
from tcm_fast.config import Config

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import arg

if TYPE_CHECKING:
    from rich.table import Table

    from tcm_fast.planning.cards import Card
    from tcm_fast.planning.memory_estimate import ImageShape
    from tcm_fast.planning.memory_planner import Plan as RunPlan

GIB = 2**30
FEW_IMAGES, MANY_EPOCHS = 100, 20_000
SHAPES = {"cifar10": (32, 3, 10, 50_000), "imagenet64": (64, 3, 1000, 1_281_167)}


@dataclass
class Plan:
    """What fits into a GPU's memory, how long a recipe takes, the longest schedule for a time budget."""

    preset: str | None = None
    """The recipe: see `tcm-fast plan --help` for the names."""
    data: str | None = None
    """Images, for their size and number; without them those of the preset are taken."""
    config: Path | None = None
    """Start from this TOML file, or from the config.json of a run."""
    gpu: str | None = None
    """A card by name, such as rtx4090 or h200; by default the device that is there."""
    gpu_memory: str | None = None
    """A card's memory, such as 8GiB, where the card is another."""
    gpus: int = 1
    """How many of them."""
    time_budget: float | None = None
    """Find the longest schedule that fits in so many hours."""
    price_per_hour: float | None = None
    """Of one GPU, in any currency."""
    prices: Path | None = None
    """Rank cards by training images for their price; a TOML file of prices, see docs/small_budgets.md."""
    calibrate: bool = False
    """Measure the speed on the device that is there, half a minute, instead of computing it."""
    resolution: int | None = None
    """Of the images, where there are none to look at."""
    settings: Annotated[Config, arg(name="")] = field(default_factory=Config)
    """Every field of the configuration."""


def run_plan(args: Plan) -> int:
    """Print the plan. ValueError where it makes no sense or does not fit."""
    from rich.console import Console

    from tcm_fast.config import load_preset, require
    from tcm_fast.planning.memory_planner import choose_optimizations, plan_run
    from tcm_fast.training.phase_builder import check_order
    from tcm_fast.training.time_budget import calibrate, fit_time_budget

    require(
        args.time_budget is None or args.time_budget > 0,
        f"time_budget: must be positive, got {args.time_budget or 0:g}",
    )
    require(args.gpus >= 1, f"gpus: must be at least 1, got {args.gpus}")
    price = args.price_per_hour
    require(
        price is None or price >= 0, f"price-per-hour: must not be negative, got {price or 0:g}"
    )
    for before, after in pairwise(args.settings.phases):
        check_order(before, after)
    shape = image_shape(args.settings, args.preset, args.resolution)
    if args.prices is not None:
        name = args.preset or args.settings.network.name
        print_ranking(args.settings, shape, args.prices, gpus=args.gpus, title=name)
        return 0
    card, console = pick_card(args), Console()
    if card.on_gpu and card.memory and not card.usable:
        raise ValueError(f"gpu-memory: {card.name} leaves nothing for tensors")
    settings = choose_optimizations(args.settings, shape, card, gpus=args.gpus)
    rates: dict[str, float] = {}
    if args.calibrate:
        require(bool(args.settings.data.source), "calibrate: needs images, give --data")
        rates = {name: calibrate(settings, name) for name in settings.phases}
    plan = plan_run(settings, shape, card, gpus=args.gpus, rates=rates)
    gpus = f"{args.gpus} x " if args.gpus > 1 else ""
    title = f"{args.preset or settings.network.name} on {gpus}{card.name}"
    console.print(memory_table(plan, title))
    console.print(_memory_optimizations(plan), soft_wrap=True, highlight=False)
    if card.has_rates:
        console.print(time_table(plan, price))
        basis = "measured here" if rates else card.basis
        here = args.gpu is None and not rates
        advice = " --calibrate measures instead (with --data)." if here else ""
        console.print(f"Speeds {basis}.{advice}", soft_wrap=True, highlight=False)
    else:
        console.print(
            "No times: of this card only the memory is known. Add --gpu NAME, or run plan on it.",
            soft_wrap=True,
            highlight=False,
        )
    for warning in warnings_for(plan, shape):
        console.print(warning, soft_wrap=True, highlight=False)
    if args.time_budget is not None:
        require(card.has_rates, "time_budget: need the card's speed, add --gpu NAME")
        fitted = fit_time_budget(
            args.settings, shape, card, args.time_budget, gpus=args.gpus, auto=True
        )
        console.print(
            schedule_table(
                fitted, f"Longest schedule that fits in {args.time_budget:g} h (computed, not run)"
            )
        )
        if fitted.seconds > 0 and plan.seconds <= args.time_budget * 3600:
            console.print("The whole recipe fits.")
        given = args.preset is None or args.settings != load_preset(args.preset)
        console.print(
            f"To run it: tcm-fast train --preset {args.preset or 'NAME'} --data IMAGES "
            f"--time-budget {args.time_budget:g} --memory auto"
            f"{', and the fields that were given here' if given else ''}",
            soft_wrap=True,
            highlight=False,
        )
    return 0


def image_shape(settings: Config, preset: str | None, resolution: int | None) -> ImageShape:
    """Of the images that the settings name, or of those that the preset is for."""
    from tcm_fast.data.dataset import load_images
    from tcm_fast.planning.memory_estimate import ImageShape

    if settings.data.source:
        data = settings.data
        images = load_images(
            data.source, **data.reading() | {"resolution": resolution or data.resolution}
        )
        return ImageShape(images.resolution, images.channels, images.num_classes, len(images))
    kind = (preset or "").partition("-")[0]
    side, channels, classes, count = SHAPES.get(kind, (32, 3, 0, 0))
    return ImageShape(resolution or settings.data.resolution or side, channels, classes, count)


def pick_card(args: Plan) -> Card:
    """The card that is asked for, or the device that is there."""
    from tcm_fast.planning.cards import card_of_memory, find_card, this_device, with_memory
    from tcm_fast.runtime.distributed import pick_device

    if args.gpu is not None:
        card = find_card(args.gpu)
        return card if args.gpu_memory is None else with_memory(card, args.gpu_memory)
    device = pick_device(args.settings.device)
    if device.type != "cuda" and args.gpu_memory is not None:
        return card_of_memory(args.gpu_memory)
    card = this_device(device, measure=not args.calibrate)
    return card if args.gpu_memory is None else with_memory(card, args.gpu_memory)


# ---- words --------------------------------------------------------------------------------------


def memory_table(plan: RunPlan, title: str) -> Table:
    """Bytes by kind at the worst moment of each phase."""
    from tcm_fast.planning.memory_estimate import KINDS
    from tcm_fast.planning.memory_planner import needed

    table = new_table(title)
    table.add_column("MiB")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    table.add_row("images at once", *(f"{p.rows}" for p in plan.phases))
    table.add_row("  of a batch of", *(f"{p.batch_size}" for p in plan.phases))
    for kind in KINDS:
        values = [getattr(p.memory, kind) for p in plan.phases]
        table.add_row(kind, *(f"{v / 2**20:,.0f}" for v in values))
    table.add_section()
    table.add_row(
        "needed, with 6 % for the allocator",
        *(f"{needed(p.memory) / 2**20:,.0f}" for p in plan.phases),
    )
    table.add_row("usable", *(f"{plan.card.usable / 2**20:,.0f}" for _ in plan.phases))
    if any(p.memory.host for p in plan.phases):
        table.add_row("host memory", *(f"{p.memory.host / 2**20:,.0f}" for p in plan.phases))
    return table


def time_table(plan: RunPlan, price: float | None) -> Table:
    """Speed, length, time and cost of each phase."""
    table = new_table("")
    for column in ("phase", "images/s", "images", "time", *(["cost"] if price is not None else [])):
        table.add_column(column, justify="left" if column == "phase" else "right")
    rows = [(p.name, f"{p.rate:,.0f}", f"{p.images:,}", p.seconds) for p in plan.phases]
    rows.append(("all", "", f"{sum(p.images for p in plan.phases):,}", plan.seconds))
    for *cells, seconds in rows:
        cost = [] if price is None else [f"{seconds / 3600 * price * plan.gpus:,.2f}"]
        table.add_row(*cells, duration(seconds), *cost)
    return table


def schedule_table(plan: RunPlan, title: str) -> Table:
    """A scaled recipe: what was changed."""
    from tcm_fast.objectives import OBJECTIVES

    table = new_table(title)
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    config = plan.config
    chosen = [config.phase(p.name) for p in plan.phases]
    width = config.network.model_channels
    table.add_row("width", *(str(width) for _ in chosen))
    table.add_row("precision", *(config.precision for _ in chosen))
    table.add_row("time", *(duration(p.seconds) for p in plan.phases))
    table.add_row("images/s", *(f"{p.rate:,.0f}" for p in plan.phases))
    table.add_row("images", *(f"{p.images:,}" for p in chosen))
    table.add_row("batch", *(str(p.batch_size) for p in chosen))
    table.add_row("steps", *(f"{p.images // p.batch_size:,}" for p in chosen))
    table.add_row("learning rate", *(f"{p.lr:.2g}" for p in chosen))
    table.add_row("dropout", *(f"{p.dropout:g}" for p in chosen))
    table.add_row("EMA", *(p.ema[0] for p in chosen))
    schedules = [OBJECTIVES[p.name].schedule(config.phase(p.name)) for p in plan.phases]
    for label in dict.fromkeys(label for schedule in schedules for label in schedule):
        values = [schedule.get(label) for schedule in schedules]
        table.add_row(label, *("" if v is None else f"{v:.4g}" for v in values))
    return table


def warnings_for(plan: RunPlan, shape: ImageShape) -> list[str]:
    """What somebody should know before the hours are spent."""
    found = []
    config, card = plan.config, plan.card
    if card.on_gpu and card.has_rates and config.precision in ("fp32", "bf16x3"):
        ratio = card.flops("bf16x3") / card.flops("fp32")
        untimed = "" if card.bf16x3 else ", computed: executed in emulation, not yet timed on a GPU"
        about = f"bf16x3 convolves {ratio:.1f} times as fast as fp32 on this card{untimed}."
        if config.precision == "fp32" and card.gains_by_bf16x3:
            found.append(f"--precision bf16x3 keeps the signal (docs/precision.md): {about}")
        elif config.precision == "bf16x3":
            found.append(about if card.gains_by_bf16x3 else f"{about} --precision fp32 is faster.")
    images = max((p.images for p in plan.phases), default=0)
    epochs = images / shape.count if shape.count else 0
    if 0 < shape.count < FEW_IMAGES or epochs > MANY_EPOCHS:
        found.append(
            f"{shape.count:,} images: each would be seen {epochs:,.0f} times in the longest phase. "
            "Expect copies of them, not new images; eval's 'memorised' says how many."
        )
    return found


def _memory_optimizations(plan: RunPlan) -> str:
    from tcm_fast.planning.memory_planner import chosen_optimizations

    found = chosen_optimizations(plan.config)
    if not found:
        return "Memory optimizations: none needed."
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in found.items()
    ]
    return f"Memory optimizations: {' '.join(flags)} (or --memory auto)"


def duration(seconds: float) -> str:
    """'45 s', '12 min', '7.5 h' or '12 days'."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if unit < 3600 else f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86400:.1f} days"


def new_table(title: str) -> Table:
    """An empty one, which fits a narrow terminal."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE)
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    return table
