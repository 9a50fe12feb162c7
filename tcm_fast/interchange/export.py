"""Our networks for other people's programs: state dicts in EDM's and EDM2's names, and the sampler's
steps as one graph that needs neither this package nor training code."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tcm_fast.networks import Precond
from tcm_fast.objectives import is_consistency
from tcm_fast.runtime.atomic import replacing
from tcm_fast.sampling.solvers import default_times

LOGVAR_CHANNELS = 128  # of EDM2's published networks


def export_state(net: Precond, path: str | Path, names: str = "edm") -> list[str]:
    """Write a state dict that the official network of the same architecture loads with strict=True.

    Args:
        net: the network.
        path: a .safetensors or .pth (`torch.load(..., weights_only=True)` reads it).
        names: "edm" for EDMPrecond and ECMPrecond of EDM, ECT and TCM, whose names ours are; "edm2" for
            EDM2's own Precond, which calls the network `unet` and has a log-variance. Where ours has
            none, zeros stand for it, which make u(t) = 0.

    Returns:
        The names that were written.

    Raises:
        ValueError: the network is none of that kind, or an unknown ending.
    """
    path = Path(path)
    is_edm2 = net.spec["name"] == "edm2"
    if names == "edm2" and not is_edm2:
        raise ValueError(f"export: names edm2 are for an edm2 network, got {net.spec['name']}")
    if names not in ("edm", "edm2"):
        raise ValueError(f"export: names must be edm or edm2, got {names}")
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    if names == "edm2":
        width = net.spec.get("logvar_channels") or LOGVAR_CHANNELS
        state = {name.replace("model.", "unet.", 1): value for name, value in state.items()}
        state.setdefault("logvar_fourier.freqs", torch.zeros(width))
        state.setdefault("logvar_fourier.phases", torch.zeros(width))
        state.setdefault("logvar_linear.weight", torch.zeros(1, width))
    else:
        state = {name: value for name, value in state.items() if name.startswith("model.")}
    about = {"network": net.spec, "info": getattr(net, "info", {})}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={"tcm_fast_export": json.dumps(about)})
        elif path.suffix in (".pt", ".pth"):
            torch.save(state, temporary)
        else:
            raise ValueError(f"export: {path} must end in .safetensors, .pth or .pt")
    return list(state)


class Steps(nn.Module):
    """The sampler as a function of its noise: unit Gaussians [n,steps,C,H,W] (and one-hot labels [n,K])
    -> images uint8 [n,H,W,C]."""

    def __init__(self, net: Precond, times: list[float]):
        super().__init__()
        self.net, self.times = net, times

    def forward(self, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.zeros_like(noise[:, 0])
        for step, t in enumerate(self.times):
            x = y + t * noise[:, step]
            y = self.net(x, torch.full_like(x[:, 0, 0, 0], t), labels)
        return (127.5 * y + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def export_program(
    net: Precond, path: str | Path, *, steps: int = 1, times: list[float] | None = None
) -> None:
    """Write one- or few-step sampling as a program: .pt2 (`torch.export.load`) or .onnx.

    It takes noise [n,steps,C,H,W] and, where the network has classes, labels [n,K]; n is free. It
    consists of PyTorch's or ONNX's own operations only and runs where they run.

    Raises:
        ValueError: an unknown ending; a network that is not sampled in this way (phase edm).
        ModuleNotFoundError: .onnx needs the packages onnx and onnxscript.
    """
    path = Path(path)
    info = getattr(net, "info", {})
    if not is_consistency(phase := info.get("phase")):
        raise ValueError(
            f"export: a pre-trained network (phase {phase}) is no consistency function"
        )
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"export: {path} must end in .pt2 or .onnx")
    levels = times or default_times(steps, info.get("t_prime"))
    program = Steps(net, levels).cpu().eval().requires_grad_(False)
    size = (net.img_channels, net.img_resolution, net.img_resolution)
    example: tuple[torch.Tensor, ...] = (torch.zeros(2, len(levels), *size),)
    batch = torch.export.Dim("n", min=1)
    shapes: list[dict[int, Any]] = [{0: batch}]
    if net.label_dim:
        example += (torch.eye(net.label_dim)[torch.arange(2) % net.label_dim],)
        shapes += [{0: batch}]
    with replacing(path) as temporary, _plain_operations():
        if path.suffix == ".pt2":
            exported = torch.export.export(program, example, dynamic_shapes=tuple(shapes))
            torch.export.save(exported, temporary)
        else:
            _onnx(program, example, shapes, temporary)


def _onnx(program: nn.Module, example: tuple, shapes: list, path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            raise ModuleNotFoundError(
                f"export: .onnx needs the package {package}: pip install 'tcm-fast[onnx]'"
            ) from None
    names = ["noise", "labels"][: len(example)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program, example, path, dynamo=True, dynamic_shapes=tuple(shapes), verbose=False,
            input_names=names, output_names=["images"], external_data=False,
        )  # fmt: skip


@contextmanager
def _plain_operations() -> Iterator[None]:
    """The references instead of the kernels, which a program on another machine could not find."""
    before = os.environ.get("TCM_FAST_BACKEND")
    os.environ["TCM_FAST_BACKEND"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TCM_FAST_BACKEND"]
        else:
            os.environ["TCM_FAST_BACKEND"] = before
