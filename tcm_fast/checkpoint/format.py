"""Networks and checkpoints on disk: safetensors and JSON, whole or absent, never pickled.

A run keeps its checkpoints in folders of their own:

    RUN/checkpoints/PHASE-IMAGES/
        model.safetensors       the student
        ema-0.safetensors ...   its EMAs; the first one is sampled
        stage1.safetensors      the frozen network of stage 2
        optimizer.safetensors   moments and step counts, by parameter name
        state.json              progress, configuration, versions, size and SHA-256 of each file

Every network file carries what rebuilds the network (metadata key "tcm_fast"). state.json is
written last and the folder gets its name when everything is on the disk: a folder of that name is
complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tcm_fast.checkpoint.hub import local_path
from tcm_fast.checkpoint.optimizer_state import flatten_optimizer, kind_of, restore_optimizer
from tcm_fast.checkpoint.run_folder import (
    ATTEMPTS,
    FOLDER,
    STATE,
    check_sizes,
    file_hash,
    find_checkpoints,
    newest,
    read_state,
    scan,
    verify_files,
    write_state,
)
from tcm_fast.networks import Precond, build_network
from tcm_fast.runtime.atomic import (
    FORMAT,
    TEMPORARY,
    Tensors,
    check_fit,
    read_tensors,
    reason,
    remove_leftovers,
    replacing,
    sync,
    write_tensors,
)

OWN_KEYS = ("format", "sequence", "milestone", "optimizer", "versions", "files", "sha256")
INFO: dict[str, Any] = {
    "phase": None,
    "t_prime": None,
    "images": 0,
    "iterations": 0,
    "class_names": [],
}

# ---- one network --------------------------------------------------------------------------------


def save_network(
    path: str | Path,
    net: Precond,
    *,
    metadata: Mapping[str, Any],
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a network as one safetensors file, from which alone `load_network` can rebuild it.

    Args:
        path: the file; one that exists is replaced in one piece.
        net: the network; its state dict is written as it is (dtype included).
        metadata: phase, t_prime, images, iterations, class_names (any may be missing), and whatever
            else is JSON.
        state: values that take the place of the network's own, by state-dict name: an EMA.

    Raises:
        OSError: the file cannot be written.
        ValueError: `state` does not fit the network.
    """
    with replacing(path) as temporary:
        write_tensors(temporary, *_contents_of(net, metadata, state))


def load_network(path: str | Path, device: str | torch.device = "cpu") -> Precond:
    """Rebuild a network, in eval mode.

    `info` of the result holds what the file says of its training (phase, t_prime, images,
    iterations, class_names), `source` the file it came from.

    Args:
        path: a .safetensors file, a checkpoint's folder, a run (its newest complete checkpoint), or
            hf:user/repo[@revision], which is downloaded once. Of a checkpoint the first EMA is taken,
            and the model itself where there is none.
        device: where the network is to be.

    Raises:
        FileNotFoundError: no such file, or a run without a complete checkpoint.
        ModuleNotFoundError, OSError: hf: without huggingface_hub, or the Hub cannot be reached.
        ValueError: the file is damaged, is not ours, or does not fit the network it describes.
    """
    file, header, tensors = _open_network(local_path(path))
    try:
        with torch.random.fork_rng(devices=[]):  # loading must not move the caller's generator
            net = build_network(**header["network"])
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"network: {file} describes one that cannot be built, {reason(error)}"
        ) from error
    _fill(net, header, tensors, file)
    net = net.to(device).eval()
    if torch.device(device).type == "cuda":
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def load_stage1(path: str | Path, device: str | torch.device = "cpu") -> Precond | None:
    """The stage-1 network that lies beside the one that `load_network(path)` loads, or None."""
    file = _network_file(Path(path)).with_name("stage1.safetensors")
    return load_network(file, device) if file.is_file() else None


def _open_network(path: Path) -> tuple[Path, dict[str, Any], Tensors]:
    """The network file that a path stands for, its header and its tensors. A run may be training: what
    it deletes meanwhile is looked up again."""
    for attempt in range(ATTEMPTS):
        file = None
        try:
            file = _network_file(path)
            _verify_listed(file)
            return file, *network_file(file)
        except (FileNotFoundError, ValueError):
            if not path.is_dir() or (file and file.is_file()) or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def _network_file(path: Path) -> Path:
    """The network file that a path stands for."""
    if not path.is_dir():
        return path
    if not (path / STATE).exists():
        found = find_checkpoints(path)
        path = newest(found, f"network: {path} is neither a network file nor")
    files = read_state(path)["files"]
    return path / ("ema-0.safetensors" if "ema-0.safetensors" in files else "model.safetensors")


def _contents_of(
    net: Precond, metadata: Mapping[str, Any], state: Mapping[str, torch.Tensor] | None
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and header of a network's file."""
    tensors = net.state_dict()
    if state is not None:
        check_fit("network: the state to save", tensors, tensors | dict(state))
        tensors = tensors | dict(state)
    return tensors, {"format": FORMAT, "network": net.spec, **INFO, **metadata}


def network_file(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Header and tensors of a network's file. ValueError where it is damaged or something else."""
    header, tensors = read_tensors(path)
    if "network" not in header:
        raise ValueError(f"network: {path} holds something else (not a network)")
    return header, tensors


def _fill(net: Precond, header: dict[str, Any], tensors: Tensors, source: Path) -> None:
    """Put a file's tensors into a network, and what the file says of them beside it."""
    check_fit(f"network: {source}", net.state_dict(), tensors)
    net.load_state_dict(tensors)
    info = {key: value for key, value in header.items() if key not in ("format", "network")}
    net.info, net.source = info, source  # type: ignore[assignment]


# ---- checkpoints --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is its state.json; tensors are read when asked for."""

    path: Path
    state: dict[str, Any]

    def network_tensors(self, name: str) -> Tensors:
        """The state dict in NAME.safetensors, e.g. "model", "ema-0", "stage1"."""
        return network_file(self.path / f"{name}.safetensors")[1]

    def restore_network(self, net: Precond, name: str) -> None:
        """Load NAME.safetensors into a network. ValueError where it does not fit."""
        file = self.path / f"{name}.safetensors"
        _fill(net, *network_file(file), file)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, net: Precond) -> None:
        """Load the optimizer's state, for the parameters of `net`. ValueError for one of another kind, or
        that does not fit."""
        kind = kind_of(optimizer)
        if kind != self.state["optimizer"]:
            raise ValueError(
                f"optimizer: the checkpoint {self.path} was written by {self.state['optimizer']}, "
                f"got {kind}"
            )
        tensors = read_tensors(self.path / "optimizer.safetensors")[1]
        restore_optimizer(optimizer, net.named_parameters(), tensors)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint will hold.

    files: tensors and header of each, by name without suffix; state: further entries of state.json.
    """

    files: dict[str, tuple[Tensors, dict[str, Any]]]
    info: dict[str, Any]
    optimizer: str
    state: dict[str, Any]

    def __post_init__(self) -> None:
        taken = sorted(self.state.keys() & ({*OWN_KEYS, *self.info}))
        if taken:
            raise ValueError(f"checkpoint: state must not use the names {', '.join(taken)}")


def collect(
    networks: Mapping[str, Precond | tuple[Precond, Mapping[str, torch.Tensor]]],
    optimizer: torch.optim.Optimizer,
    info: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Contents:
    """What `write_checkpoint` will write; the tensors are the networks' and the optimizer's own.

    Args:
        networks: "model" (whose parameters the optimizer holds), "ema-0", ..., "stage1"; a pair is
            a network with state-dict values that take the place of its own.
        optimizer: its state is stored by the names of the model's parameters.
        info: phase, t_prime, images, iterations, class_names of model and EMAs. Other networks
            keep their own `info`.
        state: what else a resumed run has to know, as JSON.

    Raises:
        ValueError: `state` uses a name that is taken.
    """
    info = {**INFO, **info}
    files = {}
    model = None
    for name, entry in networks.items():
        net, values = entry if isinstance(entry, tuple) else (entry, None)
        model = net if name == "model" else model
        is_student = name == "model" or name.startswith("ema-")
        own = {"class_names": info["class_names"], **getattr(net, "info", {})}
        files[name] = _contents_of(net, info if is_student else own, values)
    assert model is not None, "a checkpoint needs its model"
    kind, moments = kind_of(optimizer), flatten_optimizer(optimizer, model.named_parameters())
    files["optimizer"] = moments, {"format": FORMAT, "optimizer": kind}
    return Contents(files, info, kind, dict(state))


def write_checkpoint(
    run: str | Path, contents: Contents, *, keep: int = 2, milestone: bool = False, best: str = ""
) -> Path:
    """Write a checkpoint of a run and then delete what has become too old.

    Args:
        run: the run's folder.
        contents: of the checkpoint.
        keep: how many of the phase's newest checkpoints stay, besides milestones.
        milestone: keep this one for good (the end of a phase).
        best: the phase's checkpoint with the smallest state["metrics"][best] stays as well.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or the like; the previous checkpoint is intact and nothing is left
            of the new one.
        ValueError: `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"checkpoint: keep must be at least 1, got {keep}")
    run, info = Path(run), contents.info
    folder = run / FOLDER
    earlier = scan(run)
    previous = next((found.path for found, _ in reversed(earlier) if found.ok), None)
    final = _unused(folder / f"{info['phase']}-{info['images']:09d}")
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        remove_leftovers(folder)
        temporary.mkdir(parents=True)
        files = _write_files(temporary, contents.files)
        own = {
            "format": FORMAT,
            "sequence": 1 + max((saved.get("sequence", 0) for _, saved in earlier), default=0),
            "milestone": milestone,
            **info,
            "optimizer": contents.optimizer,
            "versions": {"torch": torch.__version__, "tcm_fast": version("tcm-fast")},
            "files": files,
        }
        write_state(temporary / STATE, {**own, **contents.state})
        sync(temporary)
        os.rename(temporary, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        rest = (
            f"the previous one at {previous} is intact" if previous else "there is no earlier one"
        )
        raise OSError(
            f"checkpoint: could not be saved to {final}, {reason(error)}; {rest}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(run, str(info["phase"]), keep, best)
    return final


def load_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint's folder (or a run's newest one) after verifying the SHA-256 of every file
    (where that was done a moment ago, `verify=False` looks at their sizes alone).

    Raises:
        FileNotFoundError: no such folder, or a run without a complete checkpoint.
        ValueError: a file is missing, truncated or changed; the message names it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: no such folder: {path}")
    if not (path / STATE).exists() and (path / FOLDER).is_dir():
        path = newest(find_checkpoints(path), f"checkpoint: {path} is neither a checkpoint nor")
    state = read_state(path)
    (verify_files if verify else check_sizes)(path, state["files"])
    return Checkpoint(path, state)


def _write_files(
    folder: Path, files: Mapping[str, tuple[Tensors, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Write tensors; returns size and SHA-256 of each file."""
    written = {}
    for name, (tensors, header) in files.items():
        file = folder / f"{name}.safetensors"
        write_tensors(file, tensors, header)
        sync(file)
        written[file.name] = {"size": file.stat().st_size, "sha256": file_hash(file)}
    return written


def _verify_listed(file: Path) -> None:
    """Verify a file that lies in a checkpoint; any other folder says nothing about its files."""
    try:
        entry = read_state(file.parent)["files"].get(file.name)
    except ValueError:
        return
    if entry is not None:
        verify_files(file.parent, {file.name: entry})


def _unused(path: Path) -> Path:
    """The path, or the same with a number: a checkpoint never takes the place of another."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}.{number}"), number + 1
    return candidate


def _prune(run: Path, phase: str, keep: int, best: str) -> None:
    """Delete a phase's checkpoints beyond the `keep` newest, the best and the milestones, and those
    that a newer one of the same number of images replaces. What cannot be deleted stays."""
    complete = [(f.path, s) for f, s in scan(run) if f.ok and s["phase"] == phase]
    latest = {state["images"]: path for path, state in complete}
    rolling = [path for path, state in complete if not state["milestone"]]
    scored = [
        (state["metrics"][best], -state["sequence"], path)
        for path, state in complete
        if latest[state["images"]] == path and state.get("metrics", {}).get(best) is not None
    ]
    old = {*rolling[:-keep]} - {path for *_, path in sorted(scored)[:1]}
    for path, state in complete:
        if path in old or latest[state["images"]] != path:
            # Renamed first: a half-deleted folder must not bear a checkpoint's name.
            doomed = path.with_name(f"{TEMPORARY}{path.name}")
            try:
                os.rename(path, doomed)
            except OSError:
                continue
            shutil.rmtree(doomed, ignore_errors=True)
