"""A recipe within a time budget, run and evaluated: python -m tcm_fast.benchmarks.budget_study --data IMAGES

All phases of a preset within so many minutes, as `tcm-fast train --time-budget` runs them; then, as control,
stage 1 continued for as many images as stage 2 had. Afterwards each checkpoint is evaluated: Fréchet distance
of one-step and two-step samples to held-out images over the time that training had taken. Results go to a
JSON file, curves and grids beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tcm_fast.benchmarks.measure import write_record
from tcm_fast.checkpoint.format import load_checkpoint, load_network
from tcm_fast.checkpoint.run_folder import find_checkpoints, newest_checkpoint
from tcm_fast.cli.plan import image_shape
from tcm_fast.config import Config, load_config, load_preset
from tcm_fast.data.dataset import load_images
from tcm_fast.evaluation.features import FeatureSpace, feature_space
from tcm_fast.evaluation.metrics import frechet_distance
from tcm_fast.planning.cards import Card, this_device
from tcm_fast.sampling.image_io import save_grid
from tcm_fast.sampling.sampler import sample
from tcm_fast.training.time_budget import train_within
from tcm_fast.training.trainer import Trainer

CONTROL = "stage 1 continued"
LABELS = {"edm": "pre-training", "ect": "stage 1", "tcm": "stage 2"}


def train(config: Config, out: Path, minutes: float, card: Card) -> dict[str, float]:
    """The recipe, then the control; seconds of each."""
    shape = image_shape(config, None, None)
    begun = time.monotonic()
    train_within(config, out / "run", minutes / 60, shape, card)
    seconds = {"run": time.monotonic() - begun}
    done = load_config(out / "run" / "config.json")
    stage1 = [
        f.path for f in find_checkpoints(out / "run") if f.ok and f.path.name.startswith("ect-")
    ]
    again = replace(done.ect, images=done.tcm.images, batch_size=done.tcm.batch_size)
    every = max(again.images // again.batch_size // 4, 1)
    ect = replace(again, lr=done.tcm.lr)
    control = replace(done, phases=("ect",), ect=ect, save_every=every)
    begun = time.monotonic()
    Trainer(control, out / "control", init=stage1[-1]).run()
    return seconds | {"control": time.monotonic() - begun}


def curve(run: Path, real: np.ndarray, space: FeatureSpace, num: int) -> list[dict[str, Any]]:
    """A row for every checkpoint: seconds of training so far, distances by number of steps to images
    whose features are `real`."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    saved = {Path(e["path"]).name: e["time"] for e in events if e["event"] == "saved"}
    begun = events[0]["time"]
    rows = []
    for found in find_checkpoints(run):
        if not found.ok or found.path.name not in saved:
            continue
        net, phase = (
            load_network(found.path),
            load_checkpoint(found.path, verify=False).state["phase"],
        )
        row: dict[str, Any] = {"phase": phase, "images": int(net.info["images"])}
        row["seconds"] = round(saved[found.path.name] - begun, 1)
        for steps in (None,) if phase == "edm" else (1, 2):
            count = num // 4 if steps is None else num
            samples = space.features(sample(net, count, steps=steps, seed=1))
            row[f"frechet_{steps or 'heun'}"] = round(frechet_distance(samples, real), 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def plot(
    rows: list[dict[str, Any]], control: list[dict[str, Any]], of_training_images: float, path: Path
) -> None:
    """Distances over minutes of training, one step and two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    stage1 = [row for row in rows if row["phase"] == "ect"]
    last = stage1[-1]["seconds"] if stage1 else 0.0
    shifted = [row | {"seconds": row["seconds"] + last} for row in control]
    stage2 = [row for row in rows if row["phase"] == "tcm"]
    for steps, style in ((1, "o-"), (2, "s--")):
        key, times = f"frechet_{steps}", "1 step" if steps == 1 else "2 steps"
        for label, some, colour in (
            (LABELS["ect"], stage1, "tab:blue"),
            (LABELS["tcm"], stage1[-1:] + stage2, "tab:red"),
            (CONTROL, stage1[-1:] + shifted, "tab:gray"),
        ):
            minutes = [row["seconds"] / 60 for row in some]
            axes.plot(
                minutes, [row[key] for row in some], style, color=colour, label=f"{label}, {times}"
            )
    axes.axhline(of_training_images, color="black", lw=0.8, label="training images")
    axes.set(
        xlabel="minutes of training, pre-training included", ylabel="Fréchet distance", yscale="log"
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def summarise(
    rows: list[dict[str, Any]], control: list[dict[str, Any]], of_training_images: float
) -> str:
    """The phases' ends, as a Markdown table."""
    lines = ["| phase | images | 1 step | 2 steps |", "|---|---|---|---|"]
    ends = {row["phase"]: row for row in rows}
    table = [(LABELS[name], row) for name, row in ends.items()] + [(CONTROL, control[-1])]
    for label, row in table:
        if "frechet_heun" in row:
            cells = f"{row['frechet_heun']:.2f} (18 Heun steps) | "
        else:
            cells = f"{row['frechet_1']:.2f} | {row['frechet_2']:.2f}"
        lines.append(f"| {label} | {row['images']:,} | {cells} |")
    lines.append(f"| training images | | {of_training_images:.2f} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="images to train on")
    parser.add_argument("--held-out", help="images to compare with; the training images by default")
    parser.add_argument("--preset", default="cifar10-tiny")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--num", type=int, default=2000, help="samples for a distance")
    parser.add_argument("--features", default="random", help="as --eval.features")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipe_cpu.json"))
    args = parser.parse_args()
    config = load_preset(args.preset)
    config = replace(config, data=replace(config.data, source=args.data), keep_checkpoints=1000)
    card = this_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        out = args.runs or Path(scratch)
        seconds = train(config, out, args.minutes, card)
        space = feature_space(args.features)
        held_out = load_images(args.held_out or args.data, resolution=config.data.resolution)
        real = space.features(held_out.images)
        trained_on = load_images(args.data, resolution=config.data.resolution).images
        chosen_ones = trained_on[:: max(len(trained_on) // args.num, 1)][: args.num]
        of_training_images = frechet_distance(space.features(chosen_ones), real)
        rows = curve(out / "run", real, space, args.num)
        control = curve(out / "control", real, space, args.num)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        plot(rows, control, of_training_images, args.out.with_suffix(".png"))
        newest = newest_checkpoint(out / "run")
        assert newest is not None
        for steps in (1, 2):
            images = sample(load_network(newest), 60, steps=steps, seed=1)
            grid = args.out.with_name(f"{args.out.stem}_{steps}_step.png")
            save_grid(images, grid, 10, overwrite=True)
        chosen = json.loads((out / "run" / "config.json").read_text())
    chosen["data"]["source"] = Path(args.data).name
    write_record(
        args.out,
        f"{args.preset} within {args.minutes:g} minutes; Fréchet distances of {args.num} samples in the "
        f"features {args.features!r} (no published FID)",
        card.name,
        seconds={name: round(value, 1) for name, value in seconds.items()},
        config=chosen,
        frechet_training_images=round(of_training_images, 4),
        rows=rows,
        control=control,
    )
    print(summarise(rows, control, of_training_images))


if __name__ == "__main__":
    main()
