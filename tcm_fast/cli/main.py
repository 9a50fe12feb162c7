"""The command line: `tcm-fast train | plan | sample | eval | search-times | data | ema | convert | bench |
doctor`: arguments and words.

torch is imported when a command runs, not before: `--help` has to come up at once.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tcm_fast.cli.eval import Eval, SearchTimes, run_config, run_eval, run_search
from tcm_fast.cli.hub import Pull, Push, run_pull, run_push
from tcm_fast.cli.plan import Plan, image_shape, run_plan
from tcm_fast.config import Config, PhaseName, Precision, load_config, load_preset, preset_names

with suppress(ModuleNotFoundError):  # only parsing needs it
    from tyro.conf import OmitSubcommandPrefixes, Positional, arg, subcommand

FAILED, USER_MISTAKE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
STOPPED = 75  # asked to stop and saved: --resume auto goes on (sysexits' EX_TEMPFAIL)
SPIN_COUNT = "10000"  # GOMP's own is 300,000, and 1,000 where it knows of too few cores
MOST_COLUMNS = 32  # of a grid with one for each class


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
    hours: float | None = None
    """Scale the recipe so that it ends after so many hours on this device: see `tcm-fast plan`."""
    settings: Annotated[Config, arg(name="")] = field(default_factory=Config)
    """Every field of the configuration."""


@dataclass
class Sample:
    """Draw images from a trained network."""

    source: Positional[Path]
    """A run, a checkpoint, a network file or hf:user/repo."""
    num: int = 64
    """Number of images."""
    steps: int | None = None
    """Network evaluations per image: 1, 2, ... (a pre-trained edm network takes 18 Heun steps)."""
    seed: int = 0
    out: Path = Path("samples.png")
    """A .png (grid), an .npz, or a folder of PNGs."""
    classes: tuple[int, ...] | None = None
    """Class numbers, repeated in turn (class-conditional networks): a column of the grid for each."""
    times: tuple[float, ...] | None = None
    """Noise levels to return to after the first step, in falling order."""
    start: int = 0
    """Number of the first image: image i of a seed is always the same."""
    batch_size: int | None = None
    allow_below_t_prime: bool = False
    """Use a stage-2 network at noise levels for which it was not trained."""
    overwrite: bool = False
    device: str = "auto"
    precision: Precision | None = None
    """Arithmetic of the network; by default fp16 on a GPU and fp32 elsewhere."""


@dataclass
class Pack:
    """Pack images: into a .zip that both this program and EDM's can read, or into a folder whose images are
    mapped into memory, for sets that do not fit there."""

    source: Positional[str]
    """What `train --data` takes: a folder (of classes), a zip, an npz, ..."""
    destination: Positional[Path]
    """A name that ends in .zip, or a folder's."""
    resolution: Annotated[int | None, arg(aliases=["--size"])] = None
    """Centre-crop and resize to this many pixels."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read."""
    skip_unlabelled: bool = False
    """Leave out images that have no label where others have one."""
    renumber: bool = False
    """Number only the classes that have images, from 0."""
    overwrite: bool = False
    """Replace what is there."""


@dataclass
class Info:
    """Describe a set of images."""

    source: Positional[str]
    """What `train --data` takes: a folder (of classes), a zip, an npz, ..."""
    resolution: int | None = None
    """As they would be, cropped and resized to this many pixels."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read."""
    skip_unlabelled: bool = False
    """Leave out images that have no label where others have one."""


@dataclass
class Data:
    """Look at images, or pack them."""

    action: OmitSubcommandPrefixes[
        Annotated[Pack, subcommand("pack")] | Annotated[Info, subcommand("info")]
    ]


@dataclass
class Ema:
    """Make the average of another width from a run's snapshots (train with --snapshot-every)."""

    source: Positional[Path]
    """A run."""
    width: float
    """Relative standard deviation of the average, such as 0.05 or 0.10."""
    out: Path | None = None
    """Network file; by default RUN/ema-PHASE-WIDTH.safetensors."""
    phase: PhaseName | None = None
    images: int | None = None
    """End at this stand of the training, where there is a snapshot, instead of at the last."""
    overwrite: bool = False


@dataclass
class Convert:
    """Other projects' checkpoints (EDM, EDM2, ECT, TCM, FastGen: .pkl, .pt, .pth) into a network file of
    ours, without running anything in them; or our networks into other projects' forms."""

    source: Positional[Path]
    """Their file; or a run or network file of ours."""
    destination: Positional[Path]
    """A .safetensors; with --to edm or edm2 a .pth or .safetensors, with --to diffusers a folder, with
    --to program a .pt2 (torch.export) or .onnx."""
    to: Literal["tcm-fast", "edm", "edm2", "diffusers", "program"] = "tcm-fast"
    """edm, edm2: a state dict that their own networks load; diffusers: a pipeline's folder; program:
    the sampler as one graph, noise [n,steps,C,H,W] -> uint8 [n,H,W,C]."""
    weights: str | None = None
    """Which of a file's networks: ema (usual), net, ..."""
    phase: PhaseName | None = None
    """What the network was trained for, where the file does not say it: edm, ect or tcm."""
    t_prime: float | None = None
    """Lowest noise level that a tcm network was trained for."""
    steps: int = 1
    """Network evaluations per image of a program."""
    overwrite: bool = False


@dataclass
class Doctor:
    """Say what this machine offers: versions, GPU, which backends are active and why not; or what each
    precision does to a trained network."""

    precision: Path | None = None
    """A run or network file: measure the rounding error of each precision against the signal that the
    consistency loss learns from."""
    ratio: float = 0.999
    """r/t at which to measure; the schedule's limit is the hardest."""
    data: str | None = None
    """Images to measure on; by default those of the run."""
    num: int = 16
    """Number of images."""
    plot: Path | None = None
    """Draw the measurement into this file (the [plot] extra)."""
    device: str = "auto"


BenchGroup = Literal["ops", "step", "sample", "memory", "all", "profile", "compare"]


@dataclass
class Bench:
    """Measure this machine: operations, training steps, sampling and memory beside plainly written
    baselines, and a report of it. `compare A.json B.json` tells two results apart and ends with status 1
    where ours got slower or wrong; `profile` writes a trace of one step."""

    what: Positional[BenchGroup] = "all"
    files: Positional[tuple[Path, ...]] = ()
    """For compare: two results.json."""
    quick: bool = False
    """A few minutes: fewer cases and samples."""
    out: Path = Path("bench")
    """Folder of results.json, report.md and report.html."""
    only: str = ""
    """Cases whose name contains this."""
    official: Path | None = None
    """A checkout of NVlabs/TCM, to be timed beside."""
    fastgen: Path | None = None
    """A checkout of NVlabs/FastGen, to be timed beside."""
    compiled: bool | None = None
    """Time torch.compile among the operations too; by default on a GPU only."""
    tolerance: float = 0.05
    """compare: share of the median below which no difference counts."""
    relative: bool = False
    """compare: against the baselines of the same run, where the machine itself was slower or faster."""
    device: str = "auto"


def parse(argv: Sequence[str]) -> Any:
    """The command that the arguments ask for. Presets and files are the defaults that flags override."""
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the command line needs tyro: pip install tyro ({error})", name=error.name
        ) from None
    command = Annotated[Train, subcommand("train", default=_train_defaults(argv))]
    command |= Annotated[Plan, subcommand("plan", default=_plan_defaults(argv))]  # type: ignore[assignment]
    for kind in (Sample, Eval, SearchTimes, Data, Ema, Convert, Push, Pull, Bench, Doctor):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()
        command |= Annotated[kind, subcommand(name)]  # type: ignore[assignment]
    epilog = f"Presets: {', '.join(preset_names())}."
    return tyro.cli(command, prog="tcm-fast", args=list(argv), description=f"{SUMMARY} {epilog}")  # type: ignore[call-overload]


SUMMARY = "Train and sample truncated consistency models: images in one or two network calls."


def _train_defaults(argv: Sequence[str]) -> Train:
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


def _plan_defaults(argv: Sequence[str]) -> Plan:
    """What --preset or --config give before any other flag is read."""
    if argv[:1] != ["plan"]:
        return Plan()
    given = [a for a in argv[1:] if a not in ("--out", "--resume")]
    return Plan(settings=_train_defaults(["train", *given]).settings)


def with_images(settings: Config, source: str) -> Config:
    """The settings for other images: the digits classifier judges digits only."""
    settings = replace(settings, data=replace(settings.data, source=source))
    if settings.eval.features == "digits" and not source.startswith("digits"):
        settings = replace(settings, eval=replace(settings.eval, features=""))
    return settings


# ---- the commands -------------------------------------------------------------------------------


def train(args: Train) -> int:
    settings = args.settings
    if args.phase:
        settings = replace(settings, phases=(args.phase,))
    if str(args.init).startswith("hf:"):
        from tcm_fast.interchange.hub import local_path

        args.init = local_path(str(args.init))
    if not settings.data.source:
        raise ValueError(
            "train: no images, give --data FOLDER (or zip, npz, archive), or --preset digits to try it"
        )
    assert args.out is not None
    resume: bool | Path = (
        False if args.resume is None else args.resume == "auto" or Path(args.resume)
    )
    if args.hours is not None:
        return train_within(args, settings)
    from tcm_fast.training.phase import TrainingError
    from tcm_fast.training.summary import summary
    from tcm_fast.training.trainer import Interrupted, Trainer

    trainer = Trainer(settings, args.out, init=args.init, resume=resume)
    is_main = trainer.workers.is_main
    try:
        results = recorded(trainer.run)() if trainer.workers.world > 1 else trainer.run()
    except (TrainingError, Interrupted) as stop:
        is_failure = isinstance(stop, TrainingError)
        advice = "" if is_failure else f"; to go on: {resume_command(args)}"
        if is_main:
            print(f"tcm-fast: {stop}{advice}", file=sys.stderr)
        return FAILED if is_failure else STOPPED
    if is_main:
        summary(trainer.out, results)
    return 0


def recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """The function; torchrun's last words will hold its traceback."""
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(run)  # type: ignore[return-value]


def train_within(args: Train, settings: Config) -> int:
    from tcm_fast.planning.cards import this_device
    from tcm_fast.runtime.distributed import pick_device
    from tcm_fast.training import time_budget
    from tcm_fast.training.phase import TrainingError
    from tcm_fast.training.summary import summary
    from tcm_fast.training.trainer import Interrupted

    assert args.out is not None
    if args.resume is not None:
        raise ValueError("hours: a run within a box of time begins anew; leave out --resume")
    shape = image_shape(settings, args.preset, None)
    card = this_device(pick_device(settings.device))
    try:
        results = time_budget.train_within(
            settings, args.out, args.hours or 0.0, shape, card, init=args.init,
            say=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
    except (TrainingError, Interrupted) as stop:
        print(f"tcm-fast: {stop}", file=sys.stderr)
        return FAILED if isinstance(stop, TrainingError) else STOPPED
    summary(args.out, results)
    return 0


def resume_command(args: Train) -> str:
    preset = f"--preset {args.preset} " if args.preset else ""
    phase = f"--phase {args.phase} " if args.phase else ""
    return f"tcm-fast train {preset}{phase}--out {shlex.quote(str(args.out))} --resume auto"


def sample(args: Sample) -> int:
    from tcm_fast.interchange.hub import load_network
    from tcm_fast.runtime.distributed import join
    from tcm_fast.sampling import image_io, sampler

    workers = join(args.device)
    net = load_network(args.source, device=workers.device)
    labels = list(args.classes) if args.classes else None
    options: dict[str, Any] = {
        "steps": args.steps,
        "seed": args.seed,
        "labels": labels,
        "times": args.times,
        "batch_size": args.batch_size,
        "allow_below_t_prime": args.allow_below_t_prime,
        "start": args.start,
        "precision": args.precision,
        "progress": sys.stderr.isatty() and workers.is_main,
    }
    batches: Iterable[tuple[int, Any]]
    if workers.world > 1:
        batches = [(args.start, sampler.sample_shared(net, args.num, workers, **options))]
    else:
        batches = sampler.sample_batches(net, args.num, **options)
    numbers = sampler.class_numbers(net, args.num, labels, args.start)
    columns = len(labels) if labels and 1 < len(labels) <= MOST_COLUMNS else None
    workers.on_main(
        lambda: image_io.write_samples(
            batches, args.out, overwrite=args.overwrite, labels=numbers, columns=columns
        )
    )
    if not workers.is_main:
        return 0
    print(f"{args.num} images of seed {args.seed} in {args.out}")
    if labels and columns and args.out.suffix.lower() == ".png":
        names = getattr(net, "info", {}).get("class_names") or ()
        known = len(names) == net.label_dim
        # An image's class goes by its number: the first column is that of the first image.
        turn = [labels[(args.start + i) % len(labels)] for i in range(len(labels))]
        print(f"columns: {', '.join(str(names[k]) if known else f'class {k}' for k in turn)}")
    return 0


def data(args: Data) -> int:
    from tcm_fast.data import dataset as images

    action = args.action
    if isinstance(action, Pack):
        count = images.pack(
            action.source,
            action.destination,
            resolution=action.resolution,
            skip_corrupt=action.skip_corrupt,
            skip_unlabelled=action.skip_unlabelled,
            renumber=action.renumber,
            overwrite=action.overwrite,
        )
        print(f"{count} images in {action.destination}")
        if names := images.class_names_of(action.destination):
            print(f"{len(names)} classes: {images.class_mapping(names)}")
        return 0
    found = images.describe(
        action.source, resolution=action.resolution, skip_corrupt=action.skip_corrupt,
        skip_unlabelled=action.skip_unlabelled,
    )  # fmt: skip
    if found["classes"]:
        counts = enumerate(found["classes"].items())
        found["classes"] = ", ".join(f"{number} {name} ({n})" for number, (name, n) in counts)
    for key, value in found.items():
        print(f"{key:>16}: {value}")
    return 0


def ema(args: Ema) -> int:
    from tcm_fast.checkpoint.format import save_network
    from tcm_fast.checkpoint.posthoc_ema import reconstruct

    net, error = reconstruct(args.source, args.width, phase=args.phase, images=args.images)
    name = f"ema-{net.info['phase']}-{args.width:g}.safetensors"
    out = args.source / name if args.out is None else args.out
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"out: {out} is there already; add --overwrite, or give another")
    save_network(out, net, metadata=net.info)
    print(f"the average of width {args.width:g} after {net.info['images']:,} images in {out}")
    print(f"its profile is off by {100 * error:.2g} %")
    return 0


def bench(args: Bench) -> int:
    if args.what == "compare":
        return compare_results(args)
    if args.files:
        raise ValueError(f"bench: only compare takes files, got {args.files[0]}")
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # none of the profiler's notes; before torch comes
    from tcm_fast.benchmarks import report, suite
    from tcm_fast.runtime.distributed import pick_device

    groups = {
        "ops": ("ops", "host", "optimizer"), "step": ("step", "roofline"), "sample": ("sample",),
        "memory": ("memory",),
    }  # fmt: skip
    settings = suite.Settings(
        quick=args.quick, device=pick_device(args.device).type, compiled=args.compiled, only=args.only,
        official=args.official, fastgen=args.fastgen,
    )  # fmt: skip
    if args.what == "profile":
        trace = suite.profile(settings, args.out)
        print(f"trace for chrome://tracing or ui.perfetto.dev in {trace}")
        return 0
    if args.what in groups:
        settings = replace(settings, groups=groups[args.what])
    results = suite.run(
        settings,
        say=lambda line: print(line, file=sys.stderr),
        save=lambda results: report.write_numbers(results, args.out),
    )
    page = report.write(results, args.out)
    print(report.terminal(results))
    print(f"report in {page}")
    return FAILED if results.wrong else 0


def compare_results(args: Bench) -> int:
    from tcm_fast.benchmarks import results
    from tcm_fast.benchmarks.compare import compare, text

    if len(args.files) != 2:
        raise ValueError(f"bench compare: needs A.json and B.json, got {len(args.files)} files")
    before, after = map(results.load, args.files)
    comparison = compare(before, after, tolerance=args.tolerance, relative=args.relative)
    print(text(comparison))
    return FAILED if comparison.failures else 0


def convert(args: Convert) -> int:
    from tcm_fast.interchange.convert import convert as import_network
    from tcm_fast.interchange.convert import load_foreign, training_info
    from tcm_fast.interchange.hub import PREFIX, load_network

    is_ours = args.source.is_dir() or args.source.suffix == ".safetensors"
    is_ours = is_ours or str(args.source).startswith(PREFIX)
    if args.to == "tcm-fast":
        if is_ours:
            raise ValueError(
                f"convert: {args.source} is ours already; give --to edm, diffusers, ..."
            )
        summary = import_network(
            args.source, args.destination, weights=args.weights, phase=args.phase,
            t_prime=args.t_prime, overwrite=args.overwrite,
        )  # fmt: skip
        print(summary)
        print(f"{'written to:':12}{args.destination}")
        return 0
    if args.to != "diffusers" and args.destination.exists() and not args.overwrite:
        raise FileExistsError(f"convert: {args.destination} is there already; add --overwrite")
    if is_ours:
        net = load_network(args.source)
    else:
        net, found = load_foreign(args.source, weights=args.weights)
        net.info = training_info(args.source, found, args.phase, args.t_prime)
    if args.to == "diffusers":
        from tcm_fast.interchange.diffusers_export import save_folder

        kind = save_folder(net, args.destination)
        print(f"a pipeline with a {kind} in {args.destination}")
    elif args.to == "program":
        from tcm_fast.interchange.export import export_program

        export_program(net, args.destination, steps=args.steps)
        print(f"{args.steps}-step sampling as a program in {args.destination}")
    else:
        from tcm_fast.interchange.export import export_state

        names = export_state(net, args.destination, args.to)
        print(f"{len(names)} tensors in the names of {args.to} in {args.destination}")
    return 0


def doctor(args: Doctor) -> int:
    if args.precision is not None:
        return check_precision(args, args.precision)
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from rich.console import Console
    from rich.table import Table

    from tcm_fast.kernels import _backend

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    table = Table(show_header=False)
    table.add_row("python", platform.python_version(), f"{platform.system()} {platform.machine()}")
    for name, needed in DEPENDENCIES.items():
        table.add_row(name, installed(name), needed)
    table.add_section()
    for name, is_active, why in _backend.describe():
        table.add_row(name, "active" if is_active else "not active", why)
    Console(markup=False).print(table)
    return 0


def check_precision(args: Doctor, source: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.data.dataset import load_images
    from tcm_fast.evaluation import precision_check
    from tcm_fast.runtime.distributed import pick_device

    config = run_config(source)
    images = args.data or config.data.source
    if not images:
        raise ValueError(f"doctor: no images, give --data ({source} is not a run)")
    device = pick_device(args.device)
    readings = precision_check.measure(
        load_network(source, device=device),
        load_images(images, **config.data.reading()),
        ratio=args.ratio, num=args.num, device=device,
    )  # fmt: skip
    table = Table(title=f"{source}: rounding / signal of D(x_t,t) - D(x_r,r), and cosine")
    table.add_column("t", justify="right")
    precisions = list(dict.fromkeys(r.precision for r in readings))
    table.add_column("signal", justify="right")
    for name in precisions:
        table.add_column(name, justify="right")
    for t in dict.fromkeys(r.t for r in readings):
        row = [r for r in readings if r.t == t]
        cells = [f"{r.noise / max(r.signal, 1e-300):.2g}  {r.cosine:.2f}" for r in row]
        table.add_row(f"{t:g}", f"{row[0].signal:.2g}", *cells)
    Console().print(table)
    drowned = [
        name for name in precisions if any(r.is_drowned and r.precision == name for r in readings)
    ]
    for name in drowned:
        levels = [r.t for r in readings if r.precision == name and r.is_drowned]
        chosen = ", which this run was trained in" if name == config.precision else ""
        print(f"tcm-fast: warning: {name}{chosen} drowns the signal at t = "
              f"{', '.join(f'{t:g}' for t in levels)}", file=sys.stderr)  # fmt: skip
    if device.type == "cpu" and "tf32" in precisions:
        print("tf32 is emulated here: operands rounded to 10 bits.")
    if args.plot is not None:
        precision_check.plot(readings, args.plot)
        print(f"plot in {args.plot}")
    return 0


DEPENDENCIES = {
    "tcm-fast": "",
    "torch": "networks and training",
    "triton": "GPU kernels",
    "numpy": "",
    "safetensors": "checkpoints",
    "tensorboard": "curves, optional: the [log] extra",
    "wandb": "curves, optional: the [wandb] extra",
    "trackio": "curves, optional: the [trackio] extra",
    "huggingface_hub": "push, pull, hf:user/repo, optional: the [hub] extra",
    "pyarrow": "image parquet, optional: the [hf] extra",
    "diffusers": "convert --to diffusers, optional: the [diffusers] extra",
    "onnx": "convert to .onnx, optional: the [onnx] extra",
    "matplotlib": "plots, optional: the [plot] extra",
    "torch-fidelity": "Inception features, optional: the [eval] extra",
}


COMMANDS: dict[type, Callable[[Any], int]] = {
    Train: train,
    Plan: run_plan,
    Sample: sample,
    Eval: run_eval,
    SearchTimes: run_search,
    Data: data,
    Ema: ema,
    Bench: bench,
    Convert: convert,
    Push: run_push,
    Pull: run_pull,
    Doctor: doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends in one sentence on stderr and exit status 2."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _spin_briefly()
    warnings.formatwarning = lambda message, *_, **__: f"tcm-fast: warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            command = parse(arguments or ["--help"])
            status = COMMANDS[type(command)](command)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if not is_users_mistake(error):
            raise
        print(f"tcm-fast: {error}", file=sys.stderr)
        status = USER_MISTAKE
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


def _spin_briefly() -> None:
    """Let OpenMP's threads, which torch starts, spin at a barrier for a fraction of a millisecond instead
    of several: long enough for the gaps between a step's operations, too short to take the time of a
    thread that they wait for where the cores are shared. Read when torch is loaded; never over the user's."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def is_users_mistake(error: BaseException) -> bool:
    """Whether our own code raised it, to tell the user something: what a library raises deep inside is
    a defect of ours, and shows its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "tcm_fast"
