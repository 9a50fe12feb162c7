"""`tcm-fast compare`: which of several runs is better. torch is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tcm_fast.cli.eval import distance, load_reference, metric_label, run_config

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import Positional

COLUMNS, BLOCKS = 16, 3  # of the grid: images of a run in a row, rows of each run


@dataclass
class Compare:
    """Tell whether one of several runs is better: distances of samples from the same noise."""

    sources: Positional[tuple[Path, ...]]
    """Runs, checkpoints, network files or hf:user/repo, at least two."""
    data: str | None = None
    """Images to compare with; by default those of the runs."""
    features: str | None = None
    """Feature space, as of eval; by default that of the runs."""
    steps: int | None = None
    """Network evaluations per image; by default 1 (a pre-trained edm network takes 18 Heun steps)."""
    num: int = 0
    """Samples of a set; 0 takes as many as there are images to compare with."""
    seeds: int = 5
    """Sets of samples of each run, of the same noise in all."""
    seed: int = 0
    """Of the first set."""
    training_spread: float = 0.2
    """Relative standard deviation of the distance over seeds of a training: what no recipe is credited with.
    0 asks about these networks alone."""
    out: Path = Path("comparison.png")
    """Grid of samples of the same noise, a row of each run in turn."""
    overwrite: bool = False
    device: str = "auto"


def run_compare(args: Compare) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.checkpoint.hub import local_path
    from tcm_fast.evaluation import metrics
    from tcm_fast.evaluation.repeats import Repeats, difference
    from tcm_fast.objectives import is_consistency
    from tcm_fast.runtime.distributed import pick_device
    from tcm_fast.sampling.image_io import save_grid
    from tcm_fast.sampling.sampler import sample

    if len(args.sources) < 2:
        raise ValueError(f"compare: needs at least two runs, got {len(args.sources)}")
    if args.seeds < 2:
        raise ValueError(f"seeds: must be at least 2, got {args.seeds}")
    if args.num < 0 or args.num == 1:
        raise ValueError(f"num: must be at least 2, or 0, got {args.num}")
    if not args.training_spread >= 0:
        raise ValueError(f"training_spread: must not be negative, got {args.training_spread}")
    if args.out.exists() and not args.overwrite:
        raise FileExistsError(f"out: {args.out} exists, give --overwrite or another --out")
    device = pick_device(args.device)
    networks = [local_path(source) for source in args.sources]
    configs = [run_config(network) for network in networks]
    for what, given, of_runs in (
        ("data", args.data, [c.data.source for c in configs]),
        ("features", args.features, [c.eval.features for c in configs]),
    ):
        named = sorted({value for value in of_runs if value})
        if given is None and len(named) > 1:
            raise ValueError(
                f"compare: the runs need the same {what}, got {', '.join(named)}; give --{what}"
            )
    config = next((c for c in configs if c.data.source), configs[0])
    features = args.features or next((c.eval.features for c in configs if c.eval.features), None)
    images, space = load_reference(
        replace(args, features=features), args.sources[0], config, "compare", device
    )
    names = names_of(args.sources)
    found: dict[str, Repeats] = {}
    drawn: list[Any] = []
    for name, network in zip(names, networks, strict=True):
        net = load_network(network, device=device)
        steps = args.steps or (1 if is_consistency(net.info["phase"]) else None)
        found[name] = Repeats(
            tuple(
                metrics.evaluate_network(net, images, space, steps=steps, num=args.num, seed=seed)
                for seed in range(args.seed, args.seed + args.seeds)
            )
        )
        drawn.append(sample(net, COLUMNS * BLOCKS, steps=steps, seed=args.seed))
    first = next(iter(found.values())).reports[0]
    decisive = metrics.decisive(first.num_reference)
    ranked = sorted(found, key=lambda name: found[name].mean(decisive))
    best = ranked[0]
    table = Table(title=f"{args.seeds} × {first.num:,} samples of the same noise, {space.name}")
    table.add_column("")
    shown = sorted(first.metrics, key=lambda name: name != decisive)
    for metric in shown:
        table.add_column(metric_label(metric), justify="right")
    table.add_column(f"above {best}", justify="right")
    above = {
        name: difference(found[name], found[best], decisive, spread=args.training_spread)
        for name in ranked[1:]
    }
    for name in ranked:
        cells = [distance(m, found[name].mean(m), found[name].deviation(m)) for m in shown]
        over = above.get(name)
        table.add_row(name, *cells, distance(decisive, over.value, over.of_samples) if over else "")
    table.add_row("real", *(distance(m, first.metrics_real[m]) for m in shown), "")
    Console().print(table)
    print(
        "± standard deviation of a set; of the last column half of the 95 % interval, seeds paired"
    )
    for name, over in above.items():
        opposed = [
            m
            for m in (metrics.FRECHET, metrics.KERNEL)
            if (d := difference(found[name], found[best], m)).value < 0 and d.is_of_networks
        ]
        print(verdict(name, best, over, decisive, opposed))
    rows = [d[COLUMNS * i : COLUMNS * (i + 1)] for i in range(BLOCKS) for d in drawn]
    save_grid(torch.cat(rows), args.out, COLUMNS, overwrite=args.overwrite)
    print(f"{args.out}: rows of {', '.join(names)} in turn, of the same noise")
    return 0


def names_of(sources: tuple[Path, ...]) -> list[str]:
    """What to call them: the last parts of their paths, as many as tell them apart."""
    if len({*sources}) < len(sources):
        raise ValueError(f"compare: needs different runs, got {', '.join(map(str, sources))}")
    most = max(len(source.parts) for source in sources)
    for count in range(1, most + 1):
        names = [str(Path(*source.parts[-count:])) for source in sources]
        if len({*names}) == len(names):
            return names
    return [str(source) for source in sources]


def verdict(name: str, best: str, over: Any, metric: str, opposed: Sequence[str] = ()) -> str:
    """A sentence on a run and the one that looks best; `opposed` are metrics in which it looks better."""
    by = f"{distance(metric, over.value)} in {metric_label(metric)}"
    if opposed and over.is_of_networks:
        return (
            f"{name} and {best} are not told apart: {best} is better by {by}, {name} in "
            f"{' and '.join(map(metric_label, opposed))}; look at the samples"
        )
    if over.is_of_recipes:
        return (
            f"{name} is worse than {best}: by {by}, more than samples and seeds of a training make"
        )
    if over.is_of_networks:
        most = distance(metric, over.of_training)
        return (
            f"{name} and {best} are not told apart as recipes: these networks differ by {by}, but two "
            f"trainings of one recipe may by {most}; train more seeds of both"
        )
    return (
        f"{name} and {best} are not told apart: they differ by {by}, which other samples may undo"
    )
