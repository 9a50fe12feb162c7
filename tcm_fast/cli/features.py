"""`tcm-fast features train | info`: arguments and a table. torch is imported when it runs."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

LEARNT = 0.5  # R² from which a strength counts as learnt


@dataclass
class TrainFeatures:
    """Train a feature network on images alone, by having it tell how strongly they were distorted."""

    data: str
    """What `train --data` takes: a folder (of classes), a zip, an npz, ..."""
    out: Path
    """File of the network, .safetensors."""
    resolution: int | None = None
    """Centre-crop and resize to this many pixels, as `--data.resolution` of the run."""
    images: int = 256_000
    """Length of the training in images."""
    batch_size: int = 128
    """Images of a step."""
    width: int = 32
    """Channels of its first layers."""
    lr: float = 2e-3
    """Largest learning rate."""
    seed: int = 0
    skip_corrupt: bool = False
    """Go on without images that cannot be read."""
    overwrite: bool = False
    """Replace the file."""
    device: str = "auto"


@dataclass
class FeaturesInfo:
    """Describe a feature network: its images, and how well it tells each strength."""

    file: Positional[Path]
    """What `tcm-fast features train` has written."""


@dataclass
class Features:
    """Train the feature network of the manifold distance (`--ect.distance manifold`), or look at one."""

    action: OmitSubcommandPrefixes[
        Annotated[TrainFeatures, subcommand("train")] | Annotated[FeaturesInfo, subcommand("info")]
    ]


def run_features(args: Features) -> int:
    from tcm_fast.objectives.manifold import read_features

    action = args.action
    if isinstance(action, TrainFeatures):
        train(action)
        path = action.out
    else:
        path = action.file
    print_about(path, read_features(path, "features")[1])
    return 0


def train(args: TrainFeatures) -> None:
    from tcm_fast.data.dataset import load_images
    from tcm_fast.runtime.distributed import pick_device
    from tcm_fast.training.feature_training import train_features

    if args.out.suffix != ".safetensors":
        raise ValueError(f"out: must end in .safetensors, got {args.out}")
    if args.out.exists() and not args.overwrite:
        raise FileExistsError(f"out: {args.out} exists, give --overwrite or another --out")
    images = load_images(args.data, resolution=args.resolution, skip_corrupt=args.skip_corrupt)
    train_features(
        images, args.out, images=args.images, batch_size=args.batch_size, width=args.width, lr=args.lr,
        seed=args.seed, device=pick_device(args.device), progress=sys.stderr.isatty(),
    )  # fmt: skip


def print_about(path: Path, about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    if "explained" not in about:
        raise ValueError(f"features: {path} does not say how it was trained")
    network, explained = about["features"], about["explained"]
    size = f"{network['resolution']}x{network['resolution']}x{network['channels']}"
    print(
        f"{path}: {size}, width {network['width']}, trained on {about['images']:,} distorted images of "
        f"{about['data']}, seed {about['seed']}"
    )
    table = Table(title="strengths told of distorted images that were held out")
    table.add_column("")
    table.add_column("R²", justify="right")
    for name, value in explained.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    learnt = sum(value > LEARNT for value in explained.values())
    print(f"{learnt} of {len(explained)} have an R² above {LEARNT} (1 is perfect, 0 a guess)")
    if not learnt:
        print("it has learnt little: train it longer (--images), or on more images")
