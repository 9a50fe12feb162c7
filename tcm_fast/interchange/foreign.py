"""The network in another project's file, read as data: its tensors by our names, its options."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tcm_fast.interchange.safe_pickle import Record, Refused, shown
from tcm_fast.interchange.torch_format import FileTensor
from tcm_fast.networks.recognition import STEM

MAX_MODULES = 100_000
MAX_DEPTH = 40
CONSISTENCY = "ECMPrecond"
POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")


@dataclass
class Found:
    """A network in another project's file. `tensors` have our names; `options` are of the constructor."""

    tensors: dict[str, FileTensor]
    weights: str
    """Which of the file's networks it is: "ema", "net", ..."""
    preconditioning: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    """Options of the loss that it was trained by, its class as "class"."""
    dropped: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """The other networks in the file."""
    is_shifted: bool = False
    """Whether the preconditioning shifts the noise level in eval mode, as ECT's does."""


def find_network(content: Any, weights: str | None = None) -> Found:
    """The network in what a file holds.

    Raises:
        Refused: there is none, or not the one that was asked for.
    """
    candidates = dict(_candidates(content))
    if not candidates:
        raise Refused("it holds no network, neither a snapshot's nor a state dict")
    order = sorted(candidates, key=lambda name: (not name.startswith("ema"), name != "net"))
    chosen = weights or order[0]
    if chosen not in candidates:
        raise Refused(f"it has no network {chosen!r}, but {', '.join(order)}")
    network = candidates[chosen]
    others = [name for name in order if name != chosen]
    if isinstance(network, Record):
        tensors: dict[str, FileTensor] = {}
        _collect(network, "", tensors, [0], 0)
        # ECT and TCM have a class of one name; the difference is in the source, which is text.
        found = Found(
            tensors, chosen, network.kind[:80], _arguments(network), others=others,
            is_shifted=network.kind == CONSISTENCY and "sigma - self.sigma_min" in network.source,
        )  # fmt: skip
    else:
        tensors = {
            name: t for name, t in network.items()
            if isinstance(name, str) and isinstance(t, FileTensor)
        }  # fmt: skip
        found = Found(tensors, chosen, others=others)
    loss = content.get("loss_fn") if isinstance(content, dict) else None
    if isinstance(loss, Record):
        found.loss = {"class": loss.kind, **loss.state}
    found.tensors = {_our_name(name): tensor for name, tensor in found.tensors.items()}
    return found


def _candidates(content: Any) -> list[tuple[str, Any]]:
    """Networks by the names that the file gives them: modules, or dictionaries of tensors."""
    if _is_network(content):
        return [("net", content)]
    if not isinstance(content, dict):
        return []
    inside = content.get("model") if isinstance(content.get("model"), dict) else None
    if inside is not None and not _is_network(inside):  # FastGen's
        content = inside
    ema = content.get("ema")
    if isinstance(ema, dict) and isinstance(ema.get("emas"), list):  # EDM2's states
        stds = ema.get("stds")
        stds = stds if isinstance(stds, list) else []
        named = {f"ema-{std:g}": v for std, v in zip(stds, ema["emas"], strict=False)
                 if isinstance(std, float)}  # fmt: skip
        content = content | named
    names = [n for n in content if isinstance(n, str) and re.fullmatch(r"[\w.\-]{1,40}", n)]
    return [(name, content[name]) for name in names if _is_network(content[name])]


def _is_network(value: Any) -> bool:
    if isinstance(value, Record):
        return isinstance(value.state.get("_modules"), dict) and _has_encoder(value, 0)
    return isinstance(value, dict) and any(isinstance(n, str) and STEM.search(n) for n in value)


def _has_encoder(module: Record, depth: int) -> bool:
    """Whether a module, or one in it, has the encoder of a U-Net."""
    children = module.state.get("_modules")
    if not isinstance(children, dict) or depth > 3:
        return False
    inner = (child for child in children.values() if isinstance(child, Record))
    return "enc" in children or any(_has_encoder(child, depth + 1) for child in inner)


def _collect(
    module: Record, prefix: str, out: dict[str, FileTensor], visited: list[int], depth: int
) -> None:
    """The state dict of a module that was not built."""
    visited[0] += 1
    if depth > MAX_DEPTH or visited[0] > MAX_MODULES:
        raise Refused("its modules are nested too deeply")

    def attribute(name: str) -> dict:
        value = module.state.get(name, {})
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise Refused(f"a module's {name} is no dictionary")
        return value

    unsaved = module.state.get("_non_persistent_buffers_set", set())
    if not isinstance(unsaved, set):
        raise Refused("a module's _non_persistent_buffers_set is no set")
    buffers = {k: v for k, v in attribute("_buffers").items() if k not in unsaved}
    for name, value in {**attribute("_parameters"), **buffers}.items():
        if isinstance(value, FileTensor):
            out[prefix + name] = value
    for name, child in attribute("_modules").items():
        if isinstance(child, Record):
            _collect(child, f"{prefix}{name}.", out, visited, depth + 1)


def _arguments(network: Record) -> dict[str, Any]:
    """The recorded arguments of a constructor by name."""
    named = network.state.get("_init_kwargs")
    options = dict(named) if isinstance(named, dict) else {}
    given = network.state.get("_init_args")
    options |= dict(zip(POSITIONAL, given if isinstance(given, tuple | list) else (), strict=False))
    return options


def _our_name(name: str) -> str:
    """`unet.` of EDM2's own snapshots is our `model.`; wrappers of torch's are left off."""
    if not re.fullmatch(r"[\w.\-]{1,200}", name):
        raise Refused(f"a weight has the name {shown(name)}")
    name = re.sub(r"^(module\.|_orig_mod\.|net\.)+", "", name)
    name = re.sub(r"^unet\.", "model.", name)
    return name if re.match(r"model\.|logvar_|noise_scheduler\.", name) else f"model.{name}"
