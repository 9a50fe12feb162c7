"""Activations that are computed again in the backward pass instead of being kept.

Two amounts, which may be mixed: a block that recomputes its *norms* keeps what enters each normalisation
and not what leaves it, so that only normalisations and activations run twice, while the convolutions and
the attention do not; one that is recomputed *whole* keeps what enters the block, and costs one more
forward pass. Neither changes a number: dropout is keyed, not drawn, so both passes drop the same. (But for
rounding, on a GPU: what enters a normalisation, a residual sum, is made by a kernel of its own then.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tcm_fast.networks.raw_network import RawNetwork


def set_recompute(model: RawNetwork, *, norms: bool = False, blocks_from: int | None = None) -> int:
    """Choose what a raw network computes again.

    Args:
        model: whose `blocks` are meant.
        norms: normalisations and activations of every block that is not recomputed whole.
        blocks_from: whole blocks where they work at this resolution or above; None is none of them.

    Returns:
        How many blocks are recomputed whole.
    """
    count = 0
    for block in model.blocks():
        is_whole = blocks_from is not None and block.resolution >= blocks_from
        block.recompute_whole, block.recompute_norms = is_whole, norms and not is_whole
        count += is_whole
    return count


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which only the arguments are kept for the backward pass. What happens in
    `function` after the last tensor that a gradient needs is not repeated."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a module computes with now, buffers included: normalised weights are such."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def run_block(block: Any, inputs: Sequence[Any], *args: Any, **options: Any) -> Any:
    """block(*inputs, *args, **options), recomputed where the block says so. The second pass uses the weights
    that stand in the block now: those of a `functional_call` are gone by then."""
    weights = _weights(block) if block.recompute_whole else {}

    def run(*inputs: torch.Tensor) -> Any:
        if not weights:
            return block(*inputs, *args, **options)
        return functional_call(block, weights, (*inputs, *args), options)

    return recomputed(run, *inputs) if weights else run(*inputs)


def after_norm(
    norm: Callable[..., Any], conv: nn.Module, *args: Any, recompute: bool, **options: Any
) -> Any:
    """conv(norm(*args), **options), with the convolution's input computed again if `recompute`. A norm
    that returns a tuple hands on what follows its first element."""
    weights = _weights(conv) if recompute else {}

    def run(*inputs: Any) -> Any:
        normed = norm(*inputs)
        normed, *past = normed if isinstance(normed, tuple) else (normed,)
        out = (
            functional_call(conv, weights, (normed,), options)
            if weights
            else conv(normed, **options)
        )
        return (out, *past) if past else out

    return recomputed(run, *args) if recompute else run(*args)
