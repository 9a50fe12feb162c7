"""GroupNorm followed by SiLU in an `nn.Sequential`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from tcm_fast.drop_in.known_blocks import (
    NORM_NAMES,
    activates,
    dropped,
    known_block,
    norm_obstacle,
    normalise,
)
from tcm_fast.networks.layers import has_hooks


def is_norm(module: Any) -> bool:
    """Whether a module is a group normalisation that the fused operation can replace, without SiLU."""
    if not isinstance(module, nn.Module):
        return False
    block = known_block(module)
    is_known = block is not None and block.class_name in NORM_NAMES
    return is_known and not norm_obstacle(module) and not activates(module)


def sequential_runs(sequence: nn.Sequential) -> dict[int, int]:
    """Positions of GroupNorm, SiLU and perhaps Dropout in a row -> how many of them there are."""
    modules = list(sequence)
    runs = {}
    for i, (norm, act) in enumerate(itertools.pairwise(modules)):
        if is_norm(norm) and type(act) is nn.SiLU and not has_hooks(norm) and not has_hooks(act):
            drops = len(modules) > i + 2 and type(modules[i + 2]) is nn.Dropout
            runs[i] = 3 if drops and not has_hooks(modules[i + 2]) else 2
    return runs


def sequential_forward(self: Any, x: Any) -> Any:
    """The forward method of an `nn.Sequential` whose runs are one operation each."""
    modules, i = list(self), 0
    while i < len(modules):
        length = self._tcm_fast_runs.get(i, 0)
        module = modules[i]
        if length and is_norm(module) and isinstance(x, torch.Tensor) and x.ndim == 4:
            drops = {}
            if length == 3 and 0 <= modules[i + 2].p < 1:
                drops = dropped(modules[i + 2], x, modules[i + 2].p)
                i += 1
            x = normalise(x, module, silu=True, **drops)
            i += 2
        else:
            x = module(x)
            i += 1
    return x
