"""Does truncated training pay? python -m tcm_fast.benchmarks.recipe_study --data CIFAR10

Small networks are trained by the arms of a table (`recipe_arms.BLOCKS`), three seeds each: pre-training,
stage 1, stage 1 continued, stage 2 with several t' and widths of its law, mid-training and other add-ons,
each from the network of another arm. Samples after one and two steps are compared with held-out images:
kernel and Fréchet distances of several sets of samples. CIFAR10 is a folder with train and test in it;
without it the digits alone are studied.

An arm is done when its folder (under --runs) has a result.json; the command takes up what is missing, and
with --budget stops in time. Results go to a JSON file, from which --report writes the page anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tcm_fast.benchmarks.measure import environment, write_record
from tcm_fast.benchmarks.recipe_arms import OWN, Arm, Setting, Table
from tcm_fast.checkpoint.format import load_network
from tcm_fast.config import Config, changes, to_dict
from tcm_fast.data.dataset import ImageData, load_images
from tcm_fast.evaluation import denoising
from tcm_fast.evaluation.features import FeatureSpace, feature_space
from tcm_fast.evaluation.metrics import FRECHET, KERNEL, frechet_distance, kernel_distance
from tcm_fast.networks import Precond
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.runtime.atomic import replacing
from tcm_fast.sampling.sampler import sample
from tcm_fast.training.feature_training import train_features
from tcm_fast.training.trainer import Interrupted, Trainer

SEEDS = 3
FEW_REAL = 2000  # held-out images that samples are compared with, at most
TIMES = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0, 80.0)  # of one-call denoising
RESULT, REAL = "result.json", "real.json"
DISTANCES = {KERNEL: kernel_distance, FRECHET: frechet_distance}


# ---- one arm ------------------------------------------------------------------------------------


class Judge:
    """A setting's images, from `data`, in small copies that are kept in `folder`; and its features."""

    def __init__(self, setting: Setting, data: Path | None, folder: Path) -> None:
        self.setting = setting
        self.train_source, self.held_out = "digits:train", load_images("digits:test")
        if setting.resolution is not None:
            assert data is not None
            small = {
                half: _shrunk(data / half, setting.resolution, folder) for half in ("train", "test")
            }
            self.train_source, self.held_out = str(small["train"]), load_images(small["test"])
        self.folder = folder
        self.space: FeatureSpace = feature_space(setting.features)

    @functools.cached_property
    def real(self) -> np.ndarray:
        """Features [N,D] of held-out images."""
        return self.space.features(_spaced(self.held_out.images, FEW_REAL))

    @functools.cached_property
    def feature_file(self) -> str:
        """File of the feature network for the manifold distance, trained once."""
        path = self.folder / f"features-{self.held_out.resolution}.safetensors"
        if not path.exists():
            train_features(
                load_images(self.train_source), path, images=self.setting.feature_images, width=16
            )
        return str(path)

    def distances(self, images: np.ndarray | torch.Tensor) -> dict[str, float]:
        features = self.space.features(images)
        return {name: float(f"{of(features, self.real):.6g}") for name, of in DISTANCES.items()}

    def of_training_images(self) -> dict[str, float]:
        """What nothing that has learnt from these images can be expected to fall below."""
        images = load_images(self.train_source).images
        return self.distances(_spaced(images, self.setting.num))

    def of_network(self, net: Precond, steps: int | None) -> dict[str, list[float]]:
        """The distances of every set of samples."""
        num = self.setting.num
        seeds = range(self.setting.sets)
        sets = [self.distances(sample(net, num, steps=steps, seed=seed)) for seed in seeds]
        return {name: [found[name] for found in sets] for name in DISTANCES}


def _spaced(images: np.ndarray, most: int) -> np.ndarray:
    index = np.linspace(0, len(images) - 1, min(most, len(images))).astype(np.int64)
    return images[index]


def _shrunk(source: Path, resolution: int, folder: Path) -> Path:
    """An npz of the images at a resolution, made once."""
    path = folder / f"{source.name}-{resolution}.npz"
    if not path.exists():
        data: ImageData = load_images(source, resolution=resolution)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, images=data.images, labels=data.labels)
    return path


def run_arm(
    table: Table, arm: Arm, seed: int, judge: Judge, runs: Path, stop_after: float | None
) -> None:
    """Train what is missing of an arm, judge it, write its result.

    Args:
        stop_after: hours.

    Raises:
        Interrupted: that time was too short.
    """
    folder = folder_of(runs, arm, seed)
    features = judge.feature_file if arm.feature_fields else ""
    config = table.config(arm, seed, judge.train_source, features)
    before = table.before(arm)
    init = folder_of(runs, before, seed) if before else None
    trainer = Trainer(replace(config, stop_after=stop_after), folder, init=init, resume=True)
    results = trainer.run()
    net = load_network(folder)
    steps = OBJECTIVES[results[-1].phase].sampling_steps
    row: dict[str, Any] = {
        "setting": arm.setting,
        "arm": arm.name,
        "seed": seed,
        "seconds": round(sum(r.seconds for r in results), 1),
        "passes": table.passes(arm),
        "distances": {str(n or "heun"): judge.of_network(net, n) for n in steps},
    }
    if arm.denoises:
        found = denoising.distances(net, judge.held_out, judge.space, times=TIMES)
        row["denoising"] = {f"{t:g}": float(f"{d:.6g}") for t, d in found.items()}
    _write(folder / RESULT, row)


def check_recipe(folder: Path, config: Config) -> None:
    """ValueError where a folder holds an arm of another recipe."""
    if (folder / "config.json").exists():
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if different := [c for c in changes(saved, to_dict(config)) if not c.startswith(OWN)]:
            what = f"{folder} is of another recipe ({', '.join(different)})"
            raise ValueError(f"runs: {what}, remove it or give other --runs")


def folder_of(runs: Path, arm: Arm, seed: int) -> Path:
    return runs / arm.setting / f"{arm.name}-{seed}"


# ---- the study ----------------------------------------------------------------------------------


def study(
    table: Table, runs: Path, data: Path | None, *, seeds: int = SEEDS, budget: float | None = None
) -> None:
    """Run what is not done yet of every arm that has data, as far as so many minutes go."""
    begun = time.monotonic()
    judges: dict[str, Judge] = {}
    for arm, seed in table.order(seeds):
        setting, folder = table.settings[arm.setting], folder_of(runs, arm, seed)
        check_recipe(folder, table.config(arm, seed))
        result = folder / RESULT
        if result.exists() or (setting.resolution is not None and data is None):
            continue
        if arm.setting not in judges:
            judges[arm.setting] = Judge(setting, data, runs / "images")
            _write(runs / arm.setting / REAL, judges[arm.setting].of_training_images())
        left = None if budget is None else budget / 60 - (time.monotonic() - begun) / 3600
        mark = time.monotonic()
        try:
            if left is not None and left <= 0:
                raise Interrupted("the time is up")
            run_arm(table, arm, seed, judges[arm.setting], runs, left)
        except Interrupted as stopped:
            print(f"{stopped}: the same command goes on")
            return
        found = json.loads(result.read_text(encoding="utf-8"))["distances"]
        means = {steps: float(f"{np.mean(d[setting.metric]):.3g}") for steps, d in found.items()}
        took = time.monotonic() - mark
        print(
            f"{arm.setting} {arm.name} {seed}: {setting.metric} {means}, {took:.0f} s", flush=True
        )


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def results(table: Table, runs: Path, seeds: int) -> list[dict[str, Any]]:
    """The results of all arms that are done, in the table's order."""
    paths = (folder_of(runs, arm, seed) / RESULT for arm in table.arms for seed in range(seeds))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def dropped(out: Path, rows: list[dict[str, Any]]) -> int:
    """How many results a file has that are not among these."""
    kept = {(row["setting"], row["arm"], row["seed"]) for row in rows}
    there = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    return sum((row["setting"], row["arm"], row["seed"]) not in kept for row in there)


def real_distances(table: Table, runs: Path) -> dict[str, dict[str, float]]:
    """By setting: distances of training images to the held-out ones."""
    paths = {name: runs / name / REAL for name in table.settings}
    return {n: json.loads(p.read_text(encoding="utf-8")) for n, p in paths.items() if p.exists()}


def main() -> None:
    from tcm_fast.benchmarks import recipe_report  # which needs the table

    text, layout = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=layout)
    parser.add_argument("--data", type=Path, help="a folder with train and test of CIFAR-10 in it")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe_study"))
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop in so many minutes")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="two steps of all, in RUNS/quick")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page anew")
    parser.add_argument("--out", type=Path, help="benchmarks/results/recipe_study.json")
    parser.add_argument("--page", type=Path, help="docs/study.md")
    args = parser.parse_args()
    runs: Path = args.runs / "quick" if args.quick else args.runs
    out = args.out or (runs if args.quick else Path("benchmarks/results")) / "recipe_study.json"
    page = args.page or (runs if args.quick else Path("docs")) / "study.md"
    if args.seeds < 1:
        parser.error(f"--seeds: must be at least 1, got {args.seeds}")
    if args.budget is not None and args.budget < 0:
        parser.error(f"--budget: must not be negative, got {args.budget:g}")
    for half in ("train", "test") if args.data else ():
        if not (args.data / half).exists():
            parser.error(f"--data: must have train and test in it, got {args.data} without {half}")
    if not args.report:
        torch.set_num_threads(1)
        table = Table().shortened() if args.quick else Table()
        study(table, runs, args.data, seeds=args.seeds, budget=args.budget)
        rows = results(table, runs, args.seeds)
        if lost := dropped(out, rows):
            parser.error(
                f"--runs: {runs} lacks {lost} results that {out} has; give their --runs, or another --out"
            )
        pictures = {name: recipe_report.picture(table, runs, name, out) for name in table.settings}
        write_record(
            out,
            "arms of recipe_study: distances of sets of samples to held-out images",
            f"one thread of {environment('cpu')['name']}",
            real=real_distances(table, runs),
            rows=rows,
            pictures={name: labels for name, labels in pictures.items() if labels},
        )
    recipe_report.renew(out, page)


if __name__ == "__main__":
    main()
