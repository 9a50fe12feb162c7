"""Other projects' checkpoints -> our safetensors, without running anything in them.

    snapshots of EDM, EDM2, ECT, TCM (network-snapshot-*.pkl), their training states (.pt) and state
    dicts (.pth), FastGen's checkpoints (.pth)

Their tensors have our names (`model.enc.32x32_block0.norm0.weight`); the architecture follows from names
and shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcm_fast.checkpoint.format import save_network
from tcm_fast.interchange.foreign import Found, find_network
from tcm_fast.interchange.safe_pickle import Refused, shown
from tcm_fast.interchange.torch_format import read
from tcm_fast.networks import Precond, build_network, recognise
from tcm_fast.networks.recognition import Weights

OTHER_PRECONDITIONING = ("VPPrecond", "VEPrecond", "iDDPMPrecond")
DIFFUSION = ("EDMPrecond", "Precond", "EDM2Precond")
# Weights of other projects' extra outputs, which sampling and training do without.
DROPPED = re.compile(r"model\.logvar_|noise_scheduler\.")


@dataclass(frozen=True)
class Summary:
    """What was converted; prints as a few lines."""

    source: Path
    found: Found
    net: Precond
    info: dict[str, Any]

    def __str__(self) -> str:
        net, found = self.net, self.found
        dtypes = sorted({str(t.storage.dtype)[6:] for t in found.tensors.values()})
        size = f"{net.img_channels} x {net.img_resolution} x {net.img_resolution}"
        count = sum(p.numel() for p in net.parameters())
        phase = self.info["phase"] or "unknown: give --phase edm, ect or tcm"
        if self.info["t_prime"] is not None:
            phase += f", t' = {self.info['t_prime']:g}"
        lines = {
            "network": f"{net.spec['name']}, {count:,} parameters ({', '.join(dtypes)} -> fp32)",
            "images": size,
            "labels": f"{net.label_dim} classes" if net.label_dim else "none",
            "weights": found.weights
            + (f" (the file also has {', '.join(found.others)})" if found.others else ""),
            "trained as": phase,
        }
        if self.info["images"]:
            lines["after"] = f"{self.info['images']:,} images"
        if found.dropped:
            lines["dropped"] = ", ".join(found.dropped)
        if found.is_shifted:
            lines["note"] = (
                "in eval mode ECT shifts t in c_skip and c_out by sigma_min; ours does not"
            )
        return "\n".join(f"{name + ':':12}{text}" for name, text in lines.items())


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    weights: str | None = None,
    phase: str | None = None,
    t_prime: float | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write another project's network as one of our safetensors files.

    Args:
        source: network-snapshot-*.pkl, training-state-*.pt, a state dict (.pth), FastGen's .pth.
        destination: the .safetensors to write.
        weights: which network to take where there are several: "ema" (usual), "net", ...
        phase: what the network was trained for, edm, ect or tcm; by default what the file says.
        t_prime: of a tcm network: the lowest noise level that it was trained for.
        overwrite: replace a file that is there.

    Raises:
        FileNotFoundError: no such file. FileExistsError: the destination is there.
        ValueError: the file holds something that is not data (nothing of it was run), is damaged, or a
            network that is not one of ours.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and not overwrite:
        raise FileExistsError(f"convert: {destination} is there already; add --overwrite")
    if destination.suffix != ".safetensors":
        raise ValueError(f"convert: the destination must end in .safetensors, got {destination}")
    net, found = load_foreign(source, weights=weights)
    info = training_info(source, found, phase, t_prime)
    save_network(destination, net, metadata=info)
    return Summary(source, found, net, info)


def load_foreign(path: str | Path, *, weights: str | None = None) -> tuple[Precond, Found]:
    """Another project's network as one of ours, in eval mode, in fp32, and what was found in the file.

    Raises: as `convert`."""
    path = Path(path)
    try:
        found = find_network(read(path), weights)
        spec = architecture(found)
        _check(spec, found)
        with torch.random.fork_rng(devices=[]):  # loading must not move the caller's generator
            net = build_network(**spec)
        with torch.no_grad():
            for name, target in net.state_dict().items():
                target.copy_(found.tensors[name].load().reshape(target.shape))
    except Refused as error:
        text = str(error)
        raise ValueError(
            text if text.startswith("convert:") else f"convert: {path}: {text}"
        ) from None
    return net.eval(), found


def training_info(
    source: Path, found: Found, phase: str | None, t_prime: float | None
) -> dict[str, Any]:
    """What our file says of the training: phase, t_prime, images, and where it comes from."""
    if phase not in (None, "edm", "ect", "tcm"):
        raise ValueError(f"phase: must be edm, ect or tcm, got {phase}")
    recorded, lowest = _phase(found)
    phase = phase or recorded
    if phase == "tcm":
        t_prime = t_prime or lowest or 1.0
    elif t_prime is not None:
        raise ValueError(f"t_prime: belongs to phase tcm, got {t_prime:g} for phase {phase}")
    snapshot = re.fullmatch(r"network-snapshot-(\d+)(-[\d.]+)?\.pkl", source.name)
    counts_images = snapshot is not None and phase == "edm"  # ECT and TCM count ticks there
    return {
        "phase": phase,
        "t_prime": t_prime,
        "images": 1000 * int(snapshot[1]) if snapshot and counts_images else 0,
        "converted_from": {
            "file": source.name,
            "weights": found.weights,
            "preconditioning": found.preconditioning,
        },
    }


def _phase(found: Found) -> tuple[str | None, float | None]:
    """The phase that a file says, and t' of a truncated network."""
    loss = found.loss.get("class")
    if loss in ("EDMLoss", "EDM2Loss"):
        return "edm", None
    if loss == "ECMLoss":
        lowest = found.loss.get("t_lower", 0.0)
        # TCM's second stage draws no t below t', which is near 1; the first begins at 0.002.
        is_truncated = isinstance(lowest, int | float) and lowest >= 0.1
        return ("tcm", float(lowest)) if is_truncated else ("ect", None)
    return ("edm", None) if found.preconditioning in DIFFUSION else (None, None)


def architecture(found: Found) -> dict[str, Any]:
    """The arguments of `build_network` for a network, from its names and shapes and its options.

    Raises:
        Refused: the network is not one of ours; the message says by what.
    """
    if found.preconditioning in OTHER_PRECONDITIONING:
        raise Refused(
            f"its preconditioning is {found.preconditioning}; only EDM's is supported, of which EDM has "
            "published a network for each of its data sets"
        )
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    weights = Weights(shapes, found.options, lambda name: found.tensors[name].load(), shown)
    try:
        spec = recognise(weights)
        spec["sigma_data"] = float(weights.number("sigma_data", 0.5))
    except ValueError as error:
        raise Refused(str(error)) from None
    if "logvar_linear.weight" in shapes and "logvar_fourier.freqs" in shapes:
        spec["logvar_channels"] = shapes["logvar_linear.weight"][1]
    for name in ("img_resolution", "img_channels", "label_dim"):
        recorded = found.options.get(name, spec[name])
        if recorded != spec[name]:
            raise Refused(
                f"{name} is {shown(recorded)} by its arguments, {spec[name]} by its weights"
            )
    return spec


def _check(spec: dict[str, Any], found: Found) -> None:
    """Refused unless the network of a specification has just the tensors that were found. Nothing is
    allocated for it: the shapes may be anything."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            shapes = {n: v.shape for n, v in build_network(**spec).state_dict().items()}
    except (ValueError, TypeError, RuntimeError, OverflowError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"its network cannot be built, {reason}") from None
    given = {n: t.shape for n, t in found.tensors.items()}
    found.dropped += [n for n in given if n not in shapes and DROPPED.match(n)]
    if "logvar_linear.weight" not in shapes:
        found.dropped += [n for n in given if n.startswith("logvar_")]
    problems = [f"{n} is missing" for n in shapes if n not in given]
    problems += [f"{n} is unknown" for n in given if n not in shapes and n not in found.dropped]
    problems += [
        f"{n} is {list(shape)} instead of {list(shapes[n])}"
        for n, shape in given.items()
        # FastGen keeps gains as [1].
        if n in shapes and shape != shapes[n] and (shape, len(shapes[n])) != ((1,), 0)
    ]
    if problems:
        rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise Refused(
            f"its network is not the {spec['name']} that it looks like: "
            f"{', '.join(problems[:3])}{rest}"
        )
