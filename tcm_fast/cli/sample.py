"""`tcm-fast sample`: arguments and words. torch is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcm_fast.config import Precision

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import Positional

MOST_COLUMNS = 32  # of a grid with one for each class


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
    """Arithmetic of the network; by default fp16 on a GPU and fp32 elsewhere. bf16x3 is not yet timed on a
    GPU."""


def run_sample(args: Sample) -> int:
    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.runtime.distributed import join
    from tcm_fast.sampling import arguments, image_io, sampler

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
    numbers = arguments.class_numbers(net, args.num, labels, args.start)
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
