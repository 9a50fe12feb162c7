"""`tcm-fast convert`, `tcm-fast ema`: network files from other files. torch is imported when they run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tcm_fast.config import PhaseName

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import Positional


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
class Ema:
    """Reconstruct an EMA of another width from a run's snapshots (train with --snapshot-every)."""

    source: Positional[Path]
    """A run."""
    width: float
    """Relative standard deviation of the EMA (EDM2's sigma_rel), such as 0.05 or 0.10."""
    out: Path | None = None
    """Network file; by default RUN/ema-PHASE-WIDTH.safetensors."""
    phase: PhaseName | None = None
    images: int | None = None
    """Images seen at the snapshot where the EMA ends; by default the last."""
    overwrite: bool = False


def run_convert(args: Convert) -> int:
    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.checkpoint.hub import PREFIX
    from tcm_fast.interchange import convert

    is_ours = args.source.is_dir() or args.source.suffix == ".safetensors"
    is_ours = is_ours or str(args.source).startswith(PREFIX)
    if args.to == "tcm-fast":
        if is_ours:
            raise ValueError(
                f"convert: {args.source} is a network file of ours already; give --to edm, diffusers, ..."
            )
        summary = convert.convert(
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
        net, found = convert.load_foreign(args.source, weights=args.weights)
        net.info = convert.training_info(args.source, found, args.phase, args.t_prime)
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


def run_ema(args: Ema) -> int:
    from tcm_fast.checkpoint.format import save_network
    from tcm_fast.checkpoint.posthoc_ema import reconstruct

    net, error = reconstruct(args.source, args.width, phase=args.phase, images=args.images)
    name = f"ema-{net.info['phase']}-{args.width:g}.safetensors"
    out = args.source / name if args.out is None else args.out
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"out: {out} is there already; add --overwrite, or give another")
    save_network(out, net, metadata=net.info)
    print(f"the EMA of width {args.width:g} after {net.info['images']:,} images in {out}")
    print(f"its profile is off by {100 * error:.2g} %")
    return 0
