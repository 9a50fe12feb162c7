"""`tcm-fast train`: arguments and words. torch is imported when it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tcm_fast.cli import FAILED, STOPPED
from tcm_fast.cli.plan import image_shape
from tcm_fast.config import Config, PhaseName, load_config, load_preset

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import arg


@dataclass
class Train:
    """Train: pre-training (edm), stage 1 (ect), stage 2 (tcm), one after another or singly."""

    preset: str | None = None
    """Start from this recipe: see `tcm-fast train --help` for the names."""
    data: str | None = None
    """Images: a folder, zip, npz, archive or parquet; short for --data.source."""
    out: Path | None = None
    """Folder of the run; by default runs/NAME."""
    phase: PhaseName | None = None
    """Train this phase only."""
    init: Path | None = None
    """Network file, run or hf:user/repo that the first phase starts from."""
    resume: str | None = None
    """auto: continue the newest complete checkpoint of the run, or begin; or a checkpoint's folder."""
    config: Path | None = None
    """Start from this TOML file, or from the config.json of another run."""
    time_budget: float | None = None
    """Shorten the recipe to so many hours on this device: see `tcm-fast plan`."""
    settings: Annotated[Config, arg(name="")] = field(default_factory=Config)
    """Every field of the configuration."""


def train_defaults(argv: Sequence[str]) -> Train:
    """What --preset, --config or --resume give before any other flag is read."""
    if argv[:1] != ["train"]:
        return Train()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("preset", "config", "out", "resume", "data"):
        parser.add_argument(f"--{name}")
    try:
        first, _ = parser.parse_known_args(list(argv[1:]))
    except argparse.ArgumentError:
        return Train()  # a flag without its value: tyro says so
    if first.preset and first.config:
        raise ValueError("train: give --preset or --config, not both")
    name = first.preset or (Path(first.config).stem if first.config else "run")
    out = Path(first.out) if first.out else Path("runs") / name
    saved = out / "config.json"
    if first.resume and saved.is_file():
        settings = load_config(saved)
    elif first.preset:
        settings = load_preset(first.preset)
    else:
        settings = load_config(first.config) if first.config else Config()
    if first.data:
        settings = with_images(settings, first.data)
    return Train(out=out, settings=settings)


def with_images(settings: Config, source: str) -> Config:
    """The settings for other images: the digits classifier evaluates digits only."""
    settings = replace(settings, data=replace(settings.data, source=source))
    if settings.eval.features == "digits" and not source.startswith("digits"):
        settings = replace(settings, eval=replace(settings.eval, features=""))
    return settings


def run_train(args: Train) -> int:
    settings = args.settings
    if args.phase:
        settings = replace(settings, phases=(args.phase,))
    if not settings.data.source:
        raise ValueError(
            "train: no images, give --data FOLDER (or zip, npz, archive), or --preset digits to try it"
        )
    assert args.out is not None
    if args.time_budget is not None and args.resume is not None:
        raise ValueError("time_budget: a run with a time budget begins anew; leave out --resume")
    from tcm_fast.training.phase import TrainingError
    from tcm_fast.training.summary import summary
    from tcm_fast.training.trainer import Interrupted, Trainer

    is_main = True
    try:
        if args.time_budget is not None:
            results = train_within(args, settings, args.time_budget)
        else:
            resume = args.resume is not None and (args.resume == "auto" or Path(args.resume))
            trainer = Trainer(settings, args.out, init=args.init, resume=resume)
            is_main, run = trainer.workers.is_main, trainer.run
            if trainer.workers.world > 1:  # torchrun's error report then has the traceback
                from torch.distributed.elastic.multiprocessing.errors import record

                run = record(run)  # type: ignore[assignment]
            results = run()
    except (TrainingError, Interrupted) as stop:
        is_failure = isinstance(stop, TrainingError)
        can_resume = not is_failure and args.time_budget is None
        advice = f"; to go on: {resume_command(args)}" if can_resume else ""
        if is_main:
            print(f"tcm-fast: {stop}{advice}", file=sys.stderr)
        return FAILED if is_failure else STOPPED
    if is_main:
        summary(args.out, results)
    return 0


def train_within(args: Train, settings: Config, hours: float) -> Any:
    """Train the recipe shortened to so many hours on this device."""
    from tcm_fast.planning.cards import this_device
    from tcm_fast.runtime.distributed import pick_device
    from tcm_fast.training import time_budget

    shape = image_shape(settings, args.preset, None)
    card = this_device(pick_device(settings.device))
    assert args.out is not None
    return time_budget.train_within(
        settings, args.out, hours, shape, card, init=args.init,
        say=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip


def resume_command(args: Train) -> str:
    preset = f"--preset {args.preset} " if args.preset else ""
    phase = f"--phase {args.phase} " if args.phase else ""
    return f"tcm-fast train {preset}{phase}--out {shlex.quote(str(args.out))} --resume auto"
