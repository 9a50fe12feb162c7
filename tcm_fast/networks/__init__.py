"""The networks, by name."""

import inspect
from collections.abc import Callable
from typing import Any

from tcm_fast.config import load_preset, preset_names, require, suggest
from tcm_fast.networks.adm import DhariwalUNet
from tcm_fast.networks.ddpmpp import NCSNpp, SongUNet
from tcm_fast.networks.edm2 import EDM2UNet
from tcm_fast.networks.mp_layers import force_rows
from tcm_fast.networks.precond import Precond
from tcm_fast.networks.raw_network import RawNetwork
from tcm_fast.networks.recognition import Weights

__all__ = ["LOGVAR_CHANNELS", "NETWORKS", "Precond", "build_network", "force_rows", "recognise"]

LOGVAR_CHANNELS = 128  # of the log-variance that EDM2 learns in pre-training
NETWORKS: dict[str, Callable[..., RawNetwork]] = {
    "ddpmpp": SongUNet,
    "ncsnpp": NCSNpp,
    "adm": DhariwalUNet,
    "edm2": EDM2UNet,
}
"""What `build_network` builds: a family is a class in a file of its own and a line here."""
_OWN = ("img_resolution", "in_channels", "out_channels", "label_dim")  # what build_network derives


def build_network(
    name: str,
    *,
    img_resolution: int,
    img_channels: int,
    label_dim: int = 0,
    sigma_data: float = 0.5,
    logvar_channels: int = 0,
    **architecture: Any,
) -> Precond:
    """A freshly initialised denoiser, in fp32 on torch's default device and in train mode.

    Args:
        name: `ddpmpp`, `ncsnpp`, `adm` or `edm2`, or a preset's name for the network of that preset.
        img_resolution: height and width of the images, which the network must be able to halve.
        img_channels: channels of the images.
        label_dim: number of classes, 0 for an unconditional network.
        sigma_data: standard deviation of the data.
        logvar_channels: width of EDM2's learned log-variance for pre-training, 0 for none.
        architecture: named as EDM names it (model_channels, channel_mult, num_blocks,
            attn_resolutions, dropout, label_dropout, ...); the defaults are those of the recipes:
            CIFAR-10 for ddpmpp and ncsnpp, ImageNet-64 for adm and edm2 (size S).

    Returns:
        The module `net(x, t, labels=None) -> D`; weights are initialised from torch's generator.

    Raises:
        ValueError: an unknown name or argument, with the nearest known one; sizes that do not fit.
    """
    if name not in NETWORKS and name in preset_names():
        preset = load_preset(name).network
        name, architecture = preset.name, preset.architecture() | architecture
    if name not in NETWORKS:
        known = [*NETWORKS, *preset_names()]
        raise ValueError(f"build_network: {suggest(name, known)}, got {name!r}")
    network = NETWORKS[name]
    parameters = inspect.signature(network).parameters
    defaults = {key: p.default for key, p in parameters.items() if key not in _OWN}
    for key in architecture:
        if key not in defaults:
            raise ValueError(f"build_network: {key}: {suggest(key, list(defaults))}")
    require(img_channels >= 1, f"img_channels: must be at least 1, got {img_channels}")
    require(label_dim >= 0, f"label_dim: must be at least 0, got {label_dim}")
    options: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in (defaults | architecture).items()
    }
    model = network(img_resolution, img_channels, img_channels, label_dim, **options)
    require(logvar_channels >= 0, f"logvar_channels: must be at least 0, got {logvar_channels}")
    sizes: dict[str, Any] = {
        "img_resolution": img_resolution,
        "img_channels": img_channels,
        "label_dim": label_dim,
        "sigma_data": sigma_data,
    }
    if logvar_channels:
        sizes["logvar_channels"] = logvar_channels
    return Precond(model, **sizes, spec={"name": name, **sizes, **options})


def recognise(weights: Weights) -> dict[str, Any]:
    """The arguments of `build_network` for a network in somebody's file, whose family it is found out.

    Raises:
        ValueError: it is none of ours; the message says by what.
    """
    for network in NETWORKS.values():
        family: Any = getattr(network, "func", network)  # one with other defaults is a partial
        if (spec := family.recognise(weights)) is not None:
            return spec
    raise ValueError(
        "its network is of no family that is known here, or has no first convolution "
        "model.enc.RxR_conv.weight"
    )
