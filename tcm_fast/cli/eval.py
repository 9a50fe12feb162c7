"""`tcm-fast eval`, `tcm-fast search-times`: arguments, tables and advice. torch is imported when they run."""

from __future__ import annotations

import shlex
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcm_fast.config import Config, Precision, load_config

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import Positional

if TYPE_CHECKING:
    from tcm_fast.evaluation.repeats import Repeats

SCALES = {"KID": 1000}
"""Metrics that are printed as a multiple, as is usual."""
BUILT_IN = ("digits", "random", "efficientnet")  # feature spaces and images that name no file
DIGITS = ("digits", "digits:train", "digits:test")
EVAL_ROWS = {
    "confidently classified": "confident",
    "... of uniform noise": "confident_noise",
    "distance to nearest training image, median": "nearest",
    "... 1st percentile": "nearest_1st",
    "nearer than 99 % of real images": "memorised",
    "copies of a training image": "copied",
}


@dataclass
class Eval:
    """Evaluate a network: kernel (KID) and Fréchet distance, recognisable samples, memorised samples."""

    source: Positional[Path]
    """A run, a checkpoint, a network file or hf:user/repo."""
    data: str | None = None
    """Images to compare with; by default those of the run."""
    features: str | None = None
    """Feature space: digits, random, efficientnet, inception:WEIGHTS, dinov2:WEIGHTS or a TorchScript file;
    by default that of the run, or random."""
    steps: tuple[int, ...] = (1, 2)
    num: int = 0
    """Samples of a set; 0 takes as many as there are images to compare with. More are compared with all."""
    seeds: int = 3
    """Sets of samples: mean and standard deviation of what they give."""
    seed: int = 0
    """Of the first set; the others' follow."""
    denoising: bool = False
    """Instead: the distance after one-call denoising over the noise level, as the run has logged it and now,
    and what it says of when stage 1 can stop and where t' can lie."""
    plot: Path | None = None
    """With --denoising: draw it into this file (the [plot] extra)."""
    device: str = "auto"
    precision: Precision | None = None
    """In which samples are drawn, as of sample; denoising is fp32's."""


@dataclass
class SearchTimes:
    """Find the second noise level of two-step sampling on a small sample."""

    source: Positional[Path]
    """A run, a checkpoint, a network file or hf:user/repo."""
    data: str | None = None
    """Images to compare with; by default those of the run."""
    features: str | None = None
    """Feature space, as of eval."""
    num: int = 512
    """Samples of each time."""
    lowest: float | None = None
    """Where to begin; by default 0.1, or t' of a truncated network."""
    seed: int = 0
    device: str = "auto"


def run_config(path: Path) -> Config:
    """The configuration of the run that a path lies in; the defaults where it lies in none. Beside a network
    that was downloaded it names files of somebody else's machine, so only what is built in is taken."""
    # A file of the Hub's cache is a link; its configuration lies beside the link.
    for folder in (path, path.parent, *path.resolve().parents[:3]):
        if (folder / "config.json").is_file():
            config = load_config(folder / "config.json")
            return config if (folder / "log.jsonl").is_file() else _without_files(config)
    return Config()


def _without_files(config: Config) -> Config:
    features, source = config.eval.features, config.data.source
    return replace(
        config,
        eval=replace(config.eval, features=features if features in BUILT_IN else ""),
        data=replace(config.data, source=source if source in DIGITS else ""),
    )


def run_eval(args: Eval) -> int:
    from rich.console import Console
    from rich.table import Table

    from tcm_fast.evaluation import metrics
    from tcm_fast.evaluation.repeats import Repeats, mean_and_deviation
    from tcm_fast.objectives import is_consistency
    from tcm_fast.runtime.distributed import join

    if args.num < 0 or args.num == 1:
        raise ValueError(
            f"num: must be at least 2, or 0 for as many as there are images to compare with, got {args.num}"
        )
    if args.seeds < 1:
        raise ValueError(f"seeds: must be at least 1, got {args.seeds}")
    if args.denoising and args.precision not in (None, "fp32"):
        raise ValueError(f"precision: --denoising denoises in fp32, got {args.precision}")
    workers = join(args.device)
    net, images, space = load_for_evaluation(args, "eval", workers.device)
    if args.denoising:
        return print_denoising(args, net, images, space) if workers.is_main else 0
    steps = args.steps if is_consistency(net.info["phase"]) else (None,)
    shared = workers if workers.world > 1 else None
    sets = {
        n: Repeats(
            tuple(
                metrics.evaluate_network(
                    net,
                    images,
                    space,
                    steps=n,
                    num=args.num,
                    seed=seed,
                    workers=shared,
                    precision=args.precision,
                )
                for seed in range(args.seed, args.seed + args.seeds)
            )
        )
        for n in steps
    }
    if not workers.is_main:
        return 0
    first = next(iter(sets.values())).reports[0]
    several = "" if args.seeds == 1 else f"{args.seeds} × "
    table = Table(title=f"{args.source}: {several}{first.num} samples, {space.name}")
    table.add_column("")
    for n in sets:
        table.add_column(step_name(n), justify="right")
    table.add_column("real", justify="right")
    decisive = metrics.decisive(first.num_reference)
    for name in sorted(first.metrics, key=lambda name: name != decisive):
        cells = [distance(name, r.mean(name), r.deviation(name)) for r in sets.values()]
        table.add_row(metric_label(name), *cells, distance(name, first.metrics_real[name]))
    for label, name in EVAL_ROWS.items():
        found = [mean_and_deviation(getattr(x, name) for x in r.reports) for r in sets.values()]
        real = getattr(first, f"{name}_real", None)
        table.add_row(label, *(with_error(*pair) for pair in found), with_error(real))
    Console().print(table)
    for n, repeats in sets.items():
        print(what_it_tells(step_name(n), decisive, repeats))
    if first.num > first.num_reference:
        print(
            f"{first.num:,} samples are compared with all {first.num_reference:,} images there are: the "
            "Fréchet distance depends on both numbers"
        )
    return 0


def step_name(steps: int | None) -> str:
    return "Heun" if steps is None else f"{steps} step{'s' if steps > 1 else ''}"


def metric_label(name: str) -> str:
    return f"{name} × {SCALES[name]}" if name in SCALES else name


def distance(name: str, value: float, deviation: float | None = None) -> str:
    """A metric for people to read, with its standard deviation where there is one."""
    scale = SCALES.get(name, 1)
    return with_error(scale * value, None if deviation is None else scale * deviation)


def with_error(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if deviation is None or isnan(deviation) else f" ± {deviation:.3f}")


def what_it_tells(label: str, name: str, repeats: Repeats) -> str:
    """Which runs so many samples tell apart, in a sentence."""
    num, sets = repeats.reports[0].num, len(repeats.reports)
    if sets == 1:
        return f"{label}: one set of samples has no error bar, --seeds 3 gives one"
    least = distance(name, repeats.least_difference(name))
    few = "too few images: " if repeats.is_rough(name) else ""
    more = ", take a larger --num or more --seeds" if few else ""
    return (
        f"{label}: {few}{sets} sets of {num:,} samples do not tell apart runs that differ by less than "
        f"{least} in {metric_label(name)}{more}"
    )


def load_for_evaluation(
    args: Eval | SearchTimes, command: str, device: Any
) -> tuple[Any, Any, Any]:
    """The network, the images to compare with and the feature space that a command names."""
    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.checkpoint.hub import local_path

    network = local_path(args.source)
    images, space = load_reference(args, args.source, run_config(network), command, device)
    return load_network(network, device=device), images, space


def load_reference(
    args: Any, name: Path, config: Config, command: str, device: Any
) -> tuple[Any, Any]:
    """The images to compare with and the feature space: `args.data` and `args.features`, or those of the
    configuration of the run that a message calls `name`."""
    from tcm_fast.data.dataset import load_images
    from tcm_fast.evaluation.features import feature_space
    from tcm_fast.evaluation.metrics import check_enough

    source = args.data or config.data.source
    if not source:
        raise ValueError(f"{command}: no images to compare with, give --data ({name} is not a run)")
    features = args.features or config.eval.features
    if not features:
        features = "random"
        warnings.warn(
            f"{command}: {name} names no feature space, so in random features, whose distances "
            "compare runs on the same images only; --features efficientnet sees more",
            stacklevel=2,
        )
    images = load_images(source, **config.data.reading())
    check_enough(images)
    return images, feature_space(features, device=device)


def print_denoising(args: Eval, net: Any, images: Any, space: Any) -> int:
    from rich.console import Console
    from rich.table import Table

    from tcm_fast.evaluation import denoising

    phase, seen = net.info["phase"] or "network", net.info["images"] or 0
    times = [t for t in denoising.TIMES if t >= (net.info["t_prime"] or 0.0)]
    num = args.num or denoising.FEW
    found = denoising.distances(net, images, space, times=times, num=num, seed=args.seed)
    logged = [r for r in denoising.read_log(args.source) if r.phase == phase and r.images < seen]
    comparable = logged if args.num in (0, denoising.FEW) and not args.data else []
    readings = [*comparable, denoising.Reading(phase, seen, found)]
    table = Table(title=f"{args.source}: one-call denoising, {space.name}")
    table.add_column("images", justify="right")
    for t in times:
        table.add_column(f"t = {t:g}", justify="right")
    for reading in denoising.thinned(readings, 12):
        cells = [f"{reading.distances[t]:.3g}" if t in reading.distances else "" for t in times]
        table.add_row(f"{reading.images:,}", *cells)
    Console().print(table)
    if net.info["t_prime"] is None:
        print(denoising.advise(readings))
    if args.plot is not None:
        denoising.plot(readings, args.plot)
        print(f"plot in {args.plot}")
    return 0


def run_search(args: SearchTimes) -> int:
    from tcm_fast.evaluation.second_time import search_second_time
    from tcm_fast.runtime.distributed import pick_device

    net, images, space = load_for_evaluation(args, "search-times", pick_device(args.device))
    found = search_second_time(
        net, images, space, num=args.num, seed=args.seed, lowest=args.lowest,
        tried=lambda t, distance: print(f"t = {t:<8.3g} {distance:.4g}", flush=True),
    )  # fmt: skip
    best = min(found, key=found.__getitem__)
    source = shlex.quote(str(args.source))
    print(f"best: tcm-fast sample {source} --times {best:.3g} (of {args.num} samples each)")
    return 0
