"""`tcm-fast doctor`: versions, backends, and what each precision does to a trained network."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tcm_fast.cli.eval import run_config
from tcm_fast.config import Config

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
    "gradio": "demo, optional: the [demo] extra",
    "matplotlib": "plots, optional: the [plot] extra",
    "torch-fidelity": "Inception features, optional: the [eval] extra",
    "timm": "DINOv2 features, optional: the [eval] extra",
}


@dataclass
class Doctor:
    """Say what this machine offers: versions, GPU, which backends are active and why not; or what each
    precision does to a trained network."""

    precision: Path | None = None
    """A run, network file or hf:user/repo: measure the rounding error of each precision against the signal
    that the consistency loss learns from."""
    ratio: float | None = None
    """r/t at which to measure; by default where the run's schedule ends, which is the hardest (0.999 of a
    network of no run)."""
    data: str | None = None
    """Images to measure on; by default those of the run."""
    num: int = 16
    """Number of images."""
    plot: Path | None = None
    """Draw the measurement into this file (the [plot] extra)."""
    device: str = "auto"


def run_doctor(args: Doctor) -> int:
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


def schedule_end(config: Config) -> float:
    """The largest r/t of a run: its first consistency phase's, which later ones go on with."""
    from tcm_fast.objectives import OBJECTIVES

    gaps = (OBJECTIVES[name].smallest_gap(config.phase(name)) for name in config.phases)
    return next((1 - gap for gap in gaps if 0 < gap < 1), 0.999)


def check_precision(args: Doctor, source: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.checkpoint.hub import local_path
    from tcm_fast.data.dataset import load_images
    from tcm_fast.evaluation import precision_check
    from tcm_fast.runtime.distributed import pick_device

    network = local_path(source)
    config = run_config(network)
    images = args.data or config.data.source
    if not images:
        raise ValueError(f"doctor: no images, give --data ({source} is not a run)")
    device = pick_device(args.device)
    ratio = schedule_end(config) if args.ratio is None else args.ratio
    readings = precision_check.measure(
        load_network(network, device=device),
        load_images(images, **config.data.reading()),
        ratio=ratio, num=args.num, device=device,
    )  # fmt: skip
    table = Table(
        title=f"{source}: rounding / signal of D(x_t,t) - D(x_r,r) at r/t = {ratio:g}, and cosine"
    )
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
    print(
        "bf16x3: fp32 convolutions by 3 products of bf16 parts, executed in emulation and not yet timed on a "
        "GPU; bf16x6, tf32x3: by 6 or 3 products, for comparison (docs/precision.md)."
    )
    if args.plot is not None:
        precision_check.plot(readings, args.plot)
        print(f"plot in {args.plot}")
    return 0
