"""What stage 2 brings, measured on the built-in digits: python -m tcm_fast.benchmarks.digits_study

For each seed: pre-training and stage 1 once, then from the same stage-1 network stage 2 and, as its
control, stage 1 continued for the same number of images (both with a fresh optimizer). For the first
seed also stage 2 with another t', another share rho of the batch on the boundary, and without the
boundary loss. One-step and two-step Fréchet distances against held-out digits go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, float]] = {
    "t_prime=0.5": {"t_prime": 0.5},
    "t_prime=2": {"t_prime": 2.0},
    "boundary_fraction=0.1": {"boundary_fraction": 0.1},
    "boundary_fraction=0.5": {"boundary_fraction": 0.5},
}


def train(job: tuple[str, str, int, dict[str, Any], str | None]) -> dict[str, Any]:
    """Train (name, phase, seed, changes, initial run); returns its row of the table."""
    import torch

    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.config import load_preset
    from tcm_fast.evaluation import features, metrics
    from tcm_fast.training.trainer import Trainer

    out, phase, seed, changes, init = job
    torch.set_num_threads(1)
    config = load_preset("digits")
    of_run = {name: value for name, value in changes.items() if name in vars(config)}
    of_phase = {name: value for name, value in changes.items() if name not in of_run}
    network = replace(config.network, class_conditional=False)
    config = replace(
        config,
        seed=seed,
        network=network,
        phases=(phase,),
        eval=replace(config.eval, features=""),
        **{phase: replace(config.phase(phase), **of_phase)},
        **of_run,
    )
    trainer = Trainer(config, out, init=init, resume=True)
    (result,) = trainer.run()
    net, space = load_network(out), features.feature_space("digits")
    row: dict[str, Any] = {"run": Path(out).name, "seed": seed, "phase": phase, "changes": changes}
    row |= {"images": result.images, "seconds": round(result.seconds, 1)}
    for steps in (None,) if phase == "edm" else (1, 2):
        report = metrics.evaluate_network(net, trainer.data, space, steps=steps)
        row[f"frechet_{steps or 'heun'}"] = round(report.frechet, 4)
        row[f"confident_{steps or 'heun'}"] = round(report.confident or 0.0, 4)
        row[f"memorised_{steps or 'heun'}"] = round(report.memorised, 4)
        row["copied"] = report.copied
    row["frechet_real"], row["confident_real"] = report.frechet_real, report.confident_real
    print(json.dumps(row), flush=True)
    return row


def study(folder: Path, seeds: int, jobs: int, images: int) -> list[dict[str, Any]]:
    """Every run of the study, `jobs` at a time with one thread each."""
    length = {"images": images}
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        rows += pool.map(train, [(f"{folder}/edm-{s}", "edm", s, {}, None) for s in range(seeds)])
        stage1 = [
            (f"{folder}/ect-{s}", "ect", s, length, f"{folder}/edm-{s}") for s in range(seeds)
        ]
        rows += pool.map(train, stage1)
        last = []
        for s in range(seeds):
            last.append((f"{folder}/tcm-{s}", "tcm", s, length, f"{folder}/ect-{s}"))
            last.append((f"{folder}/continued-{s}", "ect", s, length, f"{folder}/ect-{s}"))
        for name, changes in VARIANTS.items():
            last.append((f"{folder}/tcm-{name}", "tcm", 0, length | changes, f"{folder}/ect-0"))
        rows += pool.map(train, last)
    return rows


def summarise(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, and the variants, as a Markdown table."""
    lines = ["| | Fréchet, 1 step | 2 steps | confident, 1 step |", "|---|---|---|---|"]
    groups = {"stage 1": "ect-", "stage 1 continued": "continued-", "stage 2": "tcm-"}
    for label, prefix in groups.items():
        chosen = [
            r for r in rows if r["run"].startswith(prefix) and r["run"][len(prefix) :].isdigit()
        ]
        cells = []
        for key in ("frechet_1", "frechet_2", "confident_1"):
            values = [r[key] for r in chosen]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for row in rows:
        if row["run"].removeprefix("tcm-") in VARIANTS:
            label = f"stage 2, {row['run'].removeprefix('tcm-')}"
            lines.append(
                f"| {label} | {row['frechet_1']:.2f} | {row['frechet_2']:.2f} | {row['confident_1']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    from tcm_fast.benchmarks.measure import write_record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits_study.json"))
    parser.add_argument("--runs", type=Path, default=None, help="keep the runs in this folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=128_000, help="of each consistency phase")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = study(args.runs or Path(scratch), args.seeds, args.jobs, args.images)
    what = "digits: Fréchet distances to held-out digits by phase, seeds and variants"
    write_record(args.out, what, f"{platform.machine()} CPU, one thread a run", rows=rows)
    print(summarise(rows))


if __name__ == "__main__":
    main()
