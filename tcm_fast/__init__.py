"""Truncated consistency models: train and sample one-step image generators.

    net = tcm_fast.load_network("runs/digits")
    images = tcm_fast.sample(net, 16)          # uint8 [16,H,W,C]

The public names are loaded when they are used: importing the package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcm_fast.checkpoint.format import load_network, save_network
    from tcm_fast.config import Config, load_config, load_preset
    from tcm_fast.drop_in.accelerate import accelerate, restore
    from tcm_fast.networks import build_network
    from tcm_fast.sampling.editing import edit
    from tcm_fast.sampling.sampler import sample
    from tcm_fast.training.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "Trainer": "training.trainer",
    "accelerate": "drop_in.accelerate",
    "build_network": "networks",
    "edit": "sampling.editing",
    "load_config": "config",
    "load_network": "checkpoint.format",
    "load_preset": "config",
    "restore": "drop_in.accelerate",
    "sample": "sampling.sampler",
    "save_network": "checkpoint.format",
}

__all__ = [
    "Config",
    "Trainer",
    "accelerate",
    "build_network",
    "edit",
    "load_config",
    "load_network",
    "load_preset",
    "restore",
    "sample",
    "save_network",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tcm_fast' has no attribute {name!r}")
    return getattr(import_module(f"tcm_fast.{_HOMES[name]}"), name)
