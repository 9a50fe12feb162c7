"""The page of `recipe_study` from its results: tables with error bars, what they tell apart, curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tcm_fast.benchmarks.recipe_arms import ARMS, SETTINGS, TABLES, Arm, Table
from tcm_fast.benchmarks.recipe_study import RESULT, folder_of
from tcm_fast.benchmarks.report import with_table
from tcm_fast.checkpoint.format import load_network
from tcm_fast.evaluation.metrics import FRECHET, KERNEL
from tcm_fast.evaluation.repeats import interval
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.sampling.image_io import save_grid
from tcm_fast.sampling.sampler import sample

BEGIN, END = "<!-- recipe_study:begin -->", "<!-- recipe_study:end -->"
SCALE = {KERNEL: 1000, FRECHET: 1}
NAMES = {KERNEL: "KID × 1000", FRECHET: FRECHET}
STEPS = {"1": "1 step", "2": "2 steps"}
SHOWN = 16  # samples of a row of the picture


class Results:
    """The rows of a study's JSON."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.rows = {(r["setting"], r["arm"], r["seed"]): r for r in record["rows"]}

    def seeds(self, setting: str, arm: str) -> list[int]:
        return sorted(seed for s, a, seed in self.rows if (s, a) == (setting, arm))

    def sets(self, setting: str, arm: str, steps: str, metric: str = KERNEL) -> np.ndarray:
        """Distances as they are printed, [seeds,sets]; the Heun solver's where none are of such steps."""
        rows = [self.rows[setting, arm, seed]["distances"] for seed in self.seeds(setting, arm)]
        return SCALE[metric] * np.array([r[steps if steps in r else "heun"][metric] for r in rows])

    def means(self, setting: str, arm: str, steps: str, metric: str = KERNEL) -> dict[int, float]:
        """The mean over the sets of samples, by the seed of the training."""
        found = self.sets(setting, arm, steps, metric).mean(1)
        return dict(zip(self.seeds(setting, arm), found.tolist(), strict=True))

    def done(self, setting: str) -> list[Arm]:
        return [a for a in ARMS if a.setting == setting and self.seeds(setting, a.name)]


def with_spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation, to three digits of the mean."""
    known = np.array(list(values))
    digits = _digits(known.mean())
    deviation = f" ± {known.std(ddof=1):,.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():,.{digits}f}{deviation}"


def _digits(value: float) -> int:
    """Behind the point, of three in all."""
    return max(2 - math.floor(math.log10(abs(value))), 0) if value else 0


def table(results: Results, setting: str, arms: Sequence[Arm]) -> list[str]:
    """A row for each arm."""
    lines = [
        "| | arithmetic | KID × 1000, 1 step | 2 steps | Fréchet, 1 step | 2 steps |",
        "|---|---|---|---|---|---|",
    ]
    for arm in arms:
        seeds = results.seeds(setting, arm.name)
        one = results.rows[setting, arm.name, seeds[0]]
        cells = []
        for metric in (KERNEL, FRECHET):
            for steps in STEPS:
                is_there = steps in one["distances"] or steps == "1"
                values = results.means(setting, arm.name, steps, metric).values()
                cells.append(with_spread(values) if is_there else "")
        few = "" if len(seeds) > 2 else f" ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        work = f"{one['passes'] / 1e6:.2f} M"
        lines.append(f"| {arm.label}{few} | {work} | {' | '.join(cells)} |")
    if real := results.record["real"].get(setting):
        cells = [with_spread([SCALE[metric] * real[metric]]) for metric in (KERNEL, FRECHET)]
        lines.append(f"| training images | | {cells[0]} | | {cells[1]} | |")
    return lines


def of_samples(results: Results, setting: str, arms: Sequence[Arm]) -> str:
    """What other samples of the same network change, in a sentence."""
    metric = SETTINGS[setting].metric
    spreads = [
        np.square(results.sets(setting, a.name, "1", metric).std(1, ddof=1)).mean()
        for a in arms
        if "1" in results.rows[setting, a.name, results.seeds(setting, a.name)[0]]["distances"]
    ]
    if not spreads:
        return ""
    return (
        "± is the standard deviation over the seeds of the training. That over sets of samples of one "
        f"network is {with_spread([math.sqrt(np.mean(spreads))])} ({NAMES[metric]}, 1 step)."
    )


def compared(results: Results, setting: str, arms: Sequence[Arm]) -> list[str]:
    """Each arm that has an arm of equal arithmetic beside it, seed by seed."""
    metric = SETTINGS[setting].metric
    lines = [
        f"| | against | steps | {metric} | 95 % interval | lower in | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    labels = {arm.name: arm.label for arm in ARMS if arm.setting == setting}
    for arm in arms:
        if not arm.against:
            continue
        for steps, name in STEPS.items():
            ours, theirs = (
                results.means(setting, a, steps, metric) for a in (arm.name, arm.against)
            )
            seeds = sorted(ours.keys() & theirs.keys())
            if len(seeds) < 2:
                continue
            size = np.mean([theirs[seed] for seed in seeds])
            found = np.array([100 * (ours[seed] - theirs[seed]) / size for seed in seeds])
            half = interval(found)
            cells = [
                arm.label, labels[arm.against], name, f"{found.mean():+.0f} %",
                f"{found.mean() - half:+.0f} to {found.mean() + half:+.0f} %",
                f"{(found < 0).sum()} of {len(seeds)} seeds", verdict(found.mean(), half),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def verdict(difference: float, half: float) -> str:
    if abs(difference) <= half:
        return "not told apart"
    return "better" if difference < 0 else "worse"


# ---- the page -----------------------------------------------------------------------------------


def block(record: dict[str, Any], out: Path, page: Path) -> str:
    """All that the page has from the results, which lie at `out`, between its marks."""
    results = Results(record)
    lines = [BEGIN]
    lines += [f"(commit {record['commit'][:7]}, torch {record['torch']}; {record['machine']}.)", ""]
    for setting, what in SETTINGS.items():
        done = results.done(setting)
        if not done:
            continue
        lines += [f"### {what.title}", "", f"Features `{what.features}`.", ""]
        for key, head in {"": "", **TABLES}.items():
            arms = [arm for arm in done if arm.table == key]
            if not arms:
                continue
            beside = {arm.against for arm in arms} - {arm.name for arm in arms}
            shown = [arm for arm in done if arm.name in beside] + arms
            lines += [head, ""] if head else []
            lines += [*table(results, setting, shown), ""]
            lines += [] if key else [of_samples(results, setting, arms), ""]
            if of_pairs := compared(results, setting, arms):
                lines += [*of_pairs, ""]
            if not key and (drawn := record["pictures"].get(setting)):
                lines += [
                    "One row each, of the same noise, from the top: " + "; ".join(drawn) + "."
                ]
                lines += ["", _link("samples", named(out, setting), page), ""]
    if any("denoising" in row for row in record["rows"]):
        lines += ["### One-call denoising", ""]
        lines += [
            "Fréchet distance of real images, noised to t and denoised by one call of the stage-1"
        ]
        lines += ["network, to those images, as a share of its largest value:"]
        lines += ["", _link("denoising over the noise level", named(out, "denoising"), page), ""]
        lines += [*denoising_table(results), ""]
    return "\n".join([*lines, END])


def named(out: Path, what: str) -> Path:
    """A picture beside the results."""
    return out.with_name(f"{out.stem}_{what}.png")


def _link(text: str, picture: Path, page: Path) -> str:
    return f"![{text}]({Path(os.path.relpath(picture, page.parent)).as_posix()})"


def denoised(results: Results) -> dict[str, dict[float, np.ndarray]]:
    """By setting and noise level: distances of every seed's stage-1 network, over that network's largest."""
    found: dict[str, dict[float, np.ndarray]] = {}
    for setting in SETTINGS:
        rows = [r for (s, _, _), r in results.rows.items() if s == setting and "denoising" in r]
        if rows:
            values = np.array([list(row["denoising"].values()) for row in rows])
            values /= values.max(1, keepdims=True)
            found[setting] = dict(zip(map(float, rows[0]["denoising"]), values.T, strict=True))
    return found


def denoising_table(results: Results) -> list[str]:
    found = denoised(results)
    times = next(iter(found.values()))
    lines = ["| t | " + " | ".join(f"{t:g}" for t in times) + " |", "|" + "---|" * (len(times) + 1)]
    for setting, by_time in found.items():
        cells = [f"{values.mean():.0%}" for values in by_time.values()]
        lines.append(f"| {SETTINGS[setting].title} | " + " | ".join(cells) + " |")
    return lines


def plot_denoising(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for setting, by_time in denoised(results).items():
        values = np.array([[v.mean(), v.std()] for v in by_time.values()]).T
        axes.errorbar(list(by_time), *values, fmt="o-", capsize=3, label=SETTINGS[setting].title)
    axes.set(xscale="log", xlabel="noise level t", ylabel="share of the largest distance")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def picture(table: Table, runs: Path, setting: str, out: Path) -> list[str]:
    """Samples of seed 0, a row for each arm of the first table, of the same noise; the arms' labels."""
    arms = [arm for arm in table.arms if arm.setting == setting and not arm.table]
    shown = [arm for arm in arms if (folder_of(runs, arm, 0) / RESULT).exists()]
    drawn = []
    for arm in shown:
        steps = OBJECTIVES[[*arm.images][-1]].sampling_steps[0]
        drawn.append(sample(load_network(folder_of(runs, arm, 0)), SHOWN, steps=steps, seed=0))
    if drawn:
        save_grid(
            torch.cat(drawn), named(out, setting), SHOWN, 48 // drawn[0].shape[1], overwrite=True
        )
    return [arm.label for arm in shown]


def renew(out: Path, page: Path) -> None:
    """Write the page's block and the curves anew.

    Raises:
        ValueError: the page has no marks for the block, or matplotlib is not installed.
    """
    record = json.loads(out.read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Study\n\n{BEGIN}\n{END}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(with_table(text, block(record, out, page), (BEGIN, END)), encoding="utf-8")
    if any("denoising" in row for row in record["rows"]):
        try:
            plot_denoising(Results(record), named(out, "denoising"))
        except ModuleNotFoundError:
            raise ValueError(
                "report: the curves need matplotlib, pip install 'tcm-fast[plot]'"
            ) from None
