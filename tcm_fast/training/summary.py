"""The table of a finished run, and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tcm_fast.objectives import is_consistency
from tcm_fast.sampling.solvers import HEUN_STEPS
from tcm_fast.training.phase import PhaseResult

NEXT = """Next:
  tcm-fast sample {out} --num 100{steps} --out {grid}
  tcm-fast eval {out}
  tcm-fast train --preset digits --data YOUR_IMAGES --network.no-class-conditional --out runs/yours
(YOUR_IMAGES: a folder, zip, npz or parquet; class sub-folders serve as labels with
--network.class-conditional; presets for real runs: cifar10, imagenet64-s, ...)"""


def summary(out: Path, results: list[PhaseResult]) -> None:
    """The table of a finished run, and what to do next."""
    table = Table(title=str(out), title_justify="left", box=box.SIMPLE)
    table.pad_edge, table.padding = False, (0, 1, 0, 0)  # fits 80 columns
    for column in ("phase", "images", "time", "images/s"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    judged = [r for r in results if r.reports]
    if judged:
        for column in ("Fréchet\n1 step", "\n2 steps", "confident", "memorised"):
            table.add_column(column, justify="right")
    for result in results:
        speed = result.images / max(result.seconds, 1e-9)
        minutes, hours = result.seconds / 60, result.seconds / 3600
        duration = f"{result.seconds:.0f} s" if minutes < 60 else f"{hours:.1f} h"
        row = [result.phase, f"{result.images:,}", duration, f"{speed:,.0f}"]
        table.add_row(*row, *_quality(result))
    if judged:
        real = next(iter(judged[-1].reports.values()))
        table.add_section()
        yardstick = [f"{real.frechet_real:.2f}", "", _share(real.confident_real), "0.010"]
        table.add_row("real data", "", "", "", *yardstick)
        table.add_row("noise", "", "", "", "", "", _share(real.confident_noise), "")
        table.caption = (
            f"* in {HEUN_STEPS} Heun steps" if any(None in r.reports for r in judged) else None
        )
    Console().print(table)
    is_pretrained = bool(results) and not is_consistency(results[-1].phase)  # sampled by the solver
    grid = shlex.quote(str(out / "samples.png"))
    steps = "" if is_pretrained else " --steps 1"
    print(NEXT.format(out=shlex.quote(str(out)), steps=steps, grid=grid))


def _quality(result: PhaseResult) -> list[str]:
    """Cells of a phase: distances at one and two steps, shares at one step."""
    if not result.reports:
        return []
    reports = list(result.reports.values())
    distances = [f"{report.frechet:.2f}" for report in reports]
    if None in result.reports:
        distances = [f"{distances[0]} *", ""]
    return [*distances, _share(reports[0].confident), f"{reports[0].memorised:.3f}"]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
