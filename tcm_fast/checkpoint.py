"""Networks and checkpoints on disk: safetensors and JSON, whole or absent, never pickled.

A run keeps its checkpoints in folders of their own:

    RUN/checkpoints/PHASE-IMAGES/
        model.safetensors       the student
        ema-0.safetensors ...   its averages; the first one is sampled
        stage1.safetensors      the frozen network of stage 2
        optimizer.safetensors   moments and step counts, by parameter name
        state.json              progress, configuration, versions, size and SHA-256 of each file

Every network file carries what rebuilds the network (metadata key "tcm_fast"). state.json is
written last and the folder gets its name when everything is on the disk: what bears the name is
complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tcm_fast.networks import Precond, build_network

FORMAT = 1
KEY = "tcm_fast"
STATE = "state.json"
FOLDER = "checkpoints"
TEMPORARY = ".tmp-"
INFO: dict[str, Any] = {
    "phase": None,
    "t_prime": None,
    "images": 0,
    "iterations": 0,
    "class_names": [],
}

Tensors = dict[str, torch.Tensor]


# ---- files that are whole or absent -------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` once its bytes are on the disk.

    Raises:
        OSError: the file cannot be written; what was at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be written, {_reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """What the system says, as part of a sentence."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split())


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
        state: values that take the place of the network's own, by state-dict name: an average.

    Raises:
        OSError: the file cannot be written.
        ValueError: `state` does not fit the network.
    """
    with replacing(path) as temporary:
        _write_network(temporary, net, metadata, state)


def load_network(path: str | Path, device: str | torch.device = "cpu") -> Precond:
    """Rebuild a network, in eval mode.

    `info` of the result holds what the file says of its training (phase, t_prime, images,
    iterations, class_names), `source` the file it came from.

    Args:
        path: a .safetensors file, a checkpoint's folder, or a run (its newest complete checkpoint).
            Of a checkpoint the first average is taken, and the model itself where there is none.

    Raises:
        FileNotFoundError: no such file, or a run without a complete checkpoint.
        ValueError: the file is damaged, is not ours, or does not fit the network it describes.
    """
    file = _network_file(Path(path))
    _verify_listed(file)
    header, tensors = network_file(file)
    try:
        with torch.random.fork_rng(devices=[]):  # loading must not move the caller's generator
            net = build_network(**header["network"])
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"network: {file} describes one that cannot be built, {_reason(error)}"
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


def _network_file(path: Path) -> Path:
    """The network file that a path stands for."""
    if not path.is_dir():
        return path
    if not (path / STATE).exists():
        found = find_checkpoints(path)
        path = _newest(found, f"network: {path} is neither a network file nor")
    files = _read_state(path)["files"]
    return path / ("ema-0.safetensors" if "ema-0.safetensors" in files else "model.safetensors")


def _write_network(
    path: Path, net: Precond, metadata: Mapping[str, Any], state: Mapping[str, torch.Tensor] | None
) -> None:
    tensors = net.state_dict()
    if state is not None:
        _check_fit("network: the state to save", tensors, tensors | dict(state))
        tensors = tensors | dict(state)
    _write(path, tensors, {"format": FORMAT, "network": net.spec, **INFO, **metadata})


def _write(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, Any]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={KEY: json.dumps(header)})


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Header and tensors of one of our safetensors files."""
    if not path.is_file():
        raise FileNotFoundError(f"network: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"network: {path} is truncated, damaged or not a safetensors file ({_reason(error)})"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(
            f"network: {path} was not written by tcm_fast (it has no {KEY!r} metadata); "
            "tcm-fast convert reads other projects' weights"
        )
    if header.get("format") != FORMAT:
        raise ValueError(
            f"network: {path} has to be of format {FORMAT}, got {header.get('format')!r} (from "
            "another version of tcm_fast?)"
        )
    return header, tensors


def read_header(path: Path) -> dict[str, Any]:
    """What one of our files says of itself, without its tensors. ValueError where it is not ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"network: {path} is truncated, damaged or not a safetensors file ({_reason(error)})"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(
            f"network: {path} was not written by tcm_fast (it has no {KEY!r} metadata)"
        )
    return header


def network_file(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Header and tensors of a network's file. ValueError where it is damaged or something else."""
    header, tensors = _read(path)
    if "network" not in header:
        raise ValueError(f"network: {path} holds something else (not a network)")
    return header, tensors


def _fill(net: Precond, header: dict[str, Any], tensors: Tensors, source: Path) -> None:
    """Put a file's tensors into a network, and what the file says of them beside it."""
    _check_fit(f"network: {source}", net.state_dict(), tensors)
    net.load_state_dict(tensors)
    info = {key: value for key, value in header.items() if key not in ("format", "network")}
    net.info, net.source = info, source  # type: ignore[assignment]


def _check_fit(what: str, expected: Tensors, given: Tensors) -> None:
    """ValueError unless names and shapes agree; it names the first few that do not."""
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in expected]
    wrong += [
        f"{name} is {list(given[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    if wrong:
        rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{what} does not fit the network: {', '.join(wrong[:3])}{rest}")


# ---- the optimizer ------------------------------------------------------------------------------


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """The torch optimizer whose state it has: its own name, or what it stands for."""
    return str(getattr(optimizer, "stands_for", type(optimizer).__name__))


def flatten_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]],
) -> Tensors:
    """An optimizer's state as 'PARAMETER/KEY' -> tensor, e.g. 'model.enc.8x8_conv.weight/exp_avg'.

    Learning rate and other options are not in it: they follow from the configuration.

    Raises:
        ValueError: the optimizer holds state of an unnamed parameter, or that is no tensor.
    """
    names = {parameter: name for name, parameter in named_parameters}
    tensors = {}
    for parameter, values in optimizer.state.items():
        if parameter not in names:
            raise ValueError(
                f"optimizer: holds state of a parameter {list(parameter.shape)} that has no name"
            )
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"optimizer: {key} of {names[parameter]} must be a tensor, got {value!r}"
                )
            tensors[f"{names[parameter]}/{key}"] = value
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Give an optimizer the state that `flatten_optimizer` took, bit for bit (torch's own
    `load_state_dict` would cast it to the parameters' dtype).

    Raises:
        ValueError: state of a parameter that the optimizer does not have, or of another shape.
    """
    named = dict(named_parameters)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = named.get(name)
        if parameter is None or parameter not in groups:
            raise ValueError(f"optimizer: has no parameter for the saved state {path!r}")
        group = groups[parameter]
        if key == "step":  # torch keeps the count on the host unless a graph has to see it
            on_device = group.get("capturable") or group.get("fused")
            restored = value.to(parameter.device if on_device else "cpu", copy=True)
        elif value.shape == parameter.shape:
            restored = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            restored.copy_(value)
        else:
            raise ValueError(
                f"optimizer: saved state {path!r} must be {list(parameter.shape)}, "
                f"got {list(value.shape)}"
            )
        optimizer.state[parameter][key] = restored


# ---- checkpoints --------------------------------------------------------------------------------


class Found(NamedTuple):
    """A checkpoint's folder, whether it is complete, and if not, why."""

    path: Path
    ok: bool
    reason: str


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
        """Load the optimizer's state, for the parameters of `net`. ValueError unless it fits."""
        kind = _kind(optimizer)
        if kind != self.state["optimizer"]:
            raise ValueError(
                f"optimizer: the checkpoint {self.path} was written by {self.state['optimizer']}, "
                f"got {kind}"
            )
        _, tensors = _read(self.path / "optimizer.safetensors")
        restore_optimizer(optimizer, net.named_parameters(), tensors)


def save_checkpoint(
    run: str | Path,
    *,
    networks: Mapping[str, Precond | tuple[Precond, Mapping[str, torch.Tensor]]],
    optimizer: torch.optim.Optimizer,
    info: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int = 2,
    milestone: bool = False,
) -> Path:
    """Write a checkpoint of a run and then delete what has become too old.

    Args:
        run: the run's folder.
        networks: "model" (whose parameters the optimizer holds), "ema-0", ..., "stage1"; a pair is
            a network with state-dict values that take the place of its own.
        optimizer: its state is stored by the names of the model's parameters.
        info: phase, t_prime, images, iterations, class_names of model and averages. Other networks
            keep their own `info`.
        state: what else a resumed run has to know, as JSON.
        keep: how many of the phase's newest checkpoints stay, besides milestones.
        milestone: keep this one for good (the end of a phase).

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or the like; the previous checkpoint is intact and nothing is left
            of the new one.
        ValueError: `state` uses a name that is taken, or `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"checkpoint: keep must be at least 1, got {keep}")
    run = Path(run)
    folder = run / FOLDER
    info = {**INFO, **info}
    earlier = _scan(run)
    previous = next((found.path for found, _ in reversed(earlier) if found.ok), None)
    final = _unused(folder / f"{info['phase']}-{info['images']:09d}")
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        _remove_leftovers(folder)
        temporary.mkdir(parents=True)
        files = _write_tensors(temporary, networks, optimizer, info)
        own = {
            "format": FORMAT,
            "sequence": 1 + max((saved.get("sequence", 0) for _, saved in earlier), default=0),
            "milestone": milestone,
            **info,
            "optimizer": _kind(optimizer),
            "versions": {"torch": torch.__version__, "tcm_fast": version("tcm-fast")},
            "files": files,
        }
        taken = sorted(state.keys() & (own.keys() | {"sha256"}))
        if taken:
            raise ValueError(f"checkpoint: state must not use the names {', '.join(taken)}")
        _write_state(temporary / STATE, {**own, **state})
        _sync(temporary)
        os.rename(temporary, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        rest = (
            f"the previous one at {previous} is intact" if previous else "there is no earlier one"
        )
        raise OSError(
            f"checkpoint: could not be saved to {final}, {_reason(error)}; {rest}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(run, str(info["phase"]), keep)
    return final


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint's folder (or a run's newest one) after verifying the SHA-256 of every file.

    Raises:
        FileNotFoundError: no such folder, or a run without a complete checkpoint.
        ValueError: a file is missing, truncated or changed; the message names it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: no such folder: {path}")
    if not (path / STATE).exists() and (path / FOLDER).is_dir():
        path = _newest(find_checkpoints(path), f"checkpoint: {path} is neither a checkpoint nor")
    state = _read_state(path)
    _verify(path, state["files"])
    return Checkpoint(path, state)


def find_checkpoints(run: str | Path) -> list[Found]:
    """All checkpoints of a run: first the incomplete ones, then the complete ones, oldest first.

    Complete means that state.json is readable and every file that it lists has its size; contents
    are verified when one is loaded."""
    return [found for found, _ in _scan(Path(run))]


def newest_checkpoint(run: str | Path) -> Path | None:
    """The complete checkpoint of a run that was written last, or None."""
    return next((found.path for found in reversed(find_checkpoints(run)) if found.ok), None)


def open_run(out: str | Path, resume: bool | str | Path = False) -> Path | None:
    """The checkpoint from which a run in `out` goes on, or None for a run that begins.

    Args:
        out: the run's folder.
        resume: False begins; True or "auto" takes the newest complete checkpoint in `out`, if there
            is one; a path names a checkpoint, or a run whose newest one is taken.

    Raises:
        FileExistsError: `out` is a file, or holds another run.
        FileNotFoundError: the checkpoint to resume does not exist.
        ValueError: the checkpoint to resume is incomplete.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: must be a folder, got the file {out}")
    holds_run = any((out / name).exists() for name in ("config.json", "log.jsonl", FOLDER))
    if resume is True or resume == "auto":
        return newest_checkpoint(out)
    if not resume:
        if holds_run:
            raise FileExistsError(
                f"out: {out} already holds a run; continue it with --resume auto, or choose "
                "another folder with --out"
            )
        return None
    path = Path(resume)
    if not path.is_dir():
        raise FileNotFoundError(f"resume: no such folder: {path}")
    if (path / FOLDER).is_dir():
        path = _newest(find_checkpoints(path), f"resume: {path} is neither a checkpoint nor")
    _check_sizes(path, _read_state(path)["files"])
    if holds_run and path.resolve().parent.parent != out.resolve():
        raise FileExistsError(
            f"out: {out} holds another run than the checkpoint to resume, {path}; choose another "
            "folder with --out"
        )
    return path


def _write_tensors(
    folder: Path,
    networks: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    info: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write networks and optimizer; returns size and SHA-256 of each file."""
    model = None
    for name, entry in networks.items():
        net, values = entry if isinstance(entry, tuple) else (entry, None)
        model = net if name == "model" else model
        is_student = name == "model" or name.startswith("ema-")
        own = {"class_names": info["class_names"], **getattr(net, "info", {})}
        _write_network(folder / f"{name}.safetensors", net, info if is_student else own, values)
    assert model is not None, "a checkpoint needs its model"
    moments = flatten_optimizer(optimizer, model.named_parameters())
    header = {"format": FORMAT, "optimizer": _kind(optimizer)}
    _write(folder / "optimizer.safetensors", moments, header)
    files = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    return files


def _write_state(path: Path, state: dict[str, Any]) -> None:
    """state.json, with its own SHA-256."""
    text = json.dumps({**state, "sha256": _digest(state)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    _sync(path)


def _read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. ValueError where it is missing, damaged or of another format."""
    file = path / STATE
    try:
        state = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {path} is incomplete, {STATE} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {file} is damaged ({_reason(error)})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"checkpoint: {file} is not the state of a checkpoint")
    if state["format"] != FORMAT:
        raise ValueError(
            f"checkpoint: {file} has to be of format {FORMAT}, got {state['format']!r} (from "
            "another version of tcm_fast?)"
        )
    if state.pop("sha256", None) != _digest(state):
        raise ValueError(f"checkpoint: {file} is damaged (its SHA-256 differs)")
    return state


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, however it is laid out."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sizes(path: Path, files: Mapping[str, Any]) -> None:
    """ValueError for a file that is missing or has another size than state.json says."""
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint: {path} is incomplete, {name} is missing")
        size = file.stat().st_size
        if size != entry["size"]:
            raise ValueError(
                f"checkpoint: {file} must have {entry['size']} bytes, got {size} (truncated?)"
            )


def _verify(path: Path, files: Mapping[str, Any]) -> None:
    """ValueError for a file that is not what was written."""
    _check_sizes(path, files)
    for name, entry in files.items():
        if _sha256(path / name) != entry["sha256"]:
            raise ValueError(
                f"checkpoint: {path / name} is damaged, its SHA-256 differs from the one in {STATE}"
            )


def _verify_listed(file: Path) -> None:
    """Verify a file that lies in a checkpoint; any other folder says nothing about its files."""
    try:
        entry = _read_state(file.parent)["files"].get(file.name)
    except ValueError:
        return
    if entry is not None:
        _verify(file.parent, {file.name: entry})


def _scan(run: Path) -> list[tuple[Found, dict[str, Any]]]:
    """`find_checkpoints` with the state of each (empty where it cannot be read)."""
    folder = run / FOLDER
    entries = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir():
            continue
        state: dict[str, Any] = {}
        reason = ""
        try:
            if path.name.startswith(TEMPORARY):
                raise ValueError(f"checkpoint: {path} was never completed")
            state = _read_state(path)
            _check_sizes(path, state["files"])
        except ValueError as error:
            reason = str(error)
        entries.append((Found(path, not reason, reason), state))
    return sorted(entries, key=lambda e: (e[0].ok, e[1].get("sequence", 0)))


def _newest(found: list[Found], complaint: str) -> Path:
    """The newest complete one. FileNotFoundError with the reasons where there is none."""
    if found and found[-1].ok:
        return found[-1].path
    reasons = f" ({'; '.join(f.reason for f in found)})" if found else ""
    raise FileNotFoundError(f"{complaint} a run with a complete checkpoint{reasons}")


def _unused(path: Path) -> Path:
    """The path, or the same with a number: a checkpoint never takes the place of another."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}.{number}"), number + 1
    return candidate


def _remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _prune(run: Path, phase: str, keep: int) -> None:
    """Delete a phase's checkpoints beyond the `keep` newest and the milestones, and those that a
    newer one of the same number of images replaces. What cannot be deleted stays."""
    complete = [(f.path, s) for f, s in _scan(run) if f.ok and s["phase"] == phase]
    latest = {state["images"]: path for path, state in complete}
    rolling = [path for path, state in complete if not state["milestone"]]
    for path, state in complete:
        if path in rolling[:-keep] or latest[state["images"]] != path:
            # Renamed first: a half-deleted folder must not bear a checkpoint's name.
            doomed = path.with_name(f"{TEMPORARY}{path.name}")
            try:
                os.rename(path, doomed)
            except OSError:
                continue
            shutil.rmtree(doomed, ignore_errors=True)
