"""Who carries out a case, and whether the answer is right: outputs and every gradient beside a float64
oracle. No provider is timed that has not passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tcm_fast.benchmarks.cases import Call, Case, Inputs, plain, tensors_of
from tcm_fast.benchmarks.sites import Like
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.noise_pair import NOISE_LAYER
from tcm_fast.kernels.philox import philox_normal


@dataclass(frozen=True)
class Provider:
    """Who carries out a case.

    make: arguments -> results, as the operation's. layout: of images. gap: why it cannot run here, empty
    where it can. own_chance: its dropout or noise come from a generator of its own.
    is_ours: held to twice the error of plain PyTorch, where others are held to their dtype.
    """

    name: str
    make: Call
    layout: torch.memory_format = torch.contiguous_format
    gap: str = ""
    own_chance: bool = False
    is_ours: bool = False
    directions: tuple[str, ...] = ("forward", "both")


def make_call(function: Call, inputs: Inputs, direction: str, seed: int = 0) -> Callable[[], Any]:
    """One call to be timed: the results, or, for `both`, results and the gradients of all arguments that
    ask for one, under random gradients of the results."""
    wanted = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    if direction == "forward" or not wanted:

        def forward() -> list[torch.Tensor]:
            with torch.no_grad():
                return tensors_of(function(**inputs))

        return forward
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = [
        torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))
        for x in tensors_of(function(**inputs))
        if x.requires_grad
    ]

    def both() -> list[torch.Tensor]:
        results = tensors_of(function(**inputs))
        reached = [x for x in results if x.requires_grad]
        grads = torch.autograd.grad(reached, wanted, upstream)
        return [x.detach() for x in (*results, *grads)]

    return both


def check(
    case: Case, provider: Provider, device: torch.device | str, *, batch: int = 2, seed: int = 0
) -> str:
    """What is wrong with a provider's outputs or gradients at this site on this device; empty where
    nothing is. The batch is small: the sites' programs do not depend on it."""
    small = replace(case, batch=batch)
    layout = provider.layout

    def computed(function: Call, wide: bool = False, chance: bool = True) -> list[torch.Tensor]:
        inputs = small.inputs(device, layout, seed=seed, wide=wide)
        if wide:
            inputs = {k: torch.float64 if v is case.dtype else v for k, v in inputs.items()}
        inputs = inputs if chance else without_chance(small, inputs)
        return make_call(function, inputs, "both", seed)()

    takes_noise = case.operation == "noise_pair"  # as an argument, where ours draws it from the key
    oracle_function = case.site.reference if provider.is_ours and not takes_noise else plain(case)
    assert oracle_function is not None
    chance = provider.is_ours and not takes_noise
    make = _without_noise(provider.make) if provider.is_ours and takes_noise else provider.make
    try:
        oracle = computed(oracle_function, wide=True, chance=chance)
        reference = computed(oracle_function, chance=chance)
        found = computed(make, chance=chance)
    except Exception as error:  # a provider that fails is one that is not timed
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return wrong(found, reference, oracle, case.dtype, provider.is_ours)


def check_ends(case: Case, provider: Provider, device: torch.device | str) -> str:
    """As `check`, for the first and the last image of the whole batch: what goes wrong in large tensors
    goes wrong at their end. Outputs only."""
    rows = [0, case.batch - 1]
    inputs = case.inputs(device, provider.layout, seed=1)
    per_image = {
        name for name, like in case.site.arguments if isinstance(like, Like) and like.shape[0] is None
    }  # fmt: skip

    def ends(wide: bool) -> Inputs:
        found: Inputs = {}
        for name, x in inputs.items():
            if isinstance(x, PhiloxKey):
                found[name] = x.select(torch.tensor(rows, device=device))
            elif isinstance(x, torch.Tensor):
                x = x.detach()[rows] if name in per_image else x.detach()
                found[name] = x.double() if wide and x.is_floating_point() else x
            else:
                found[name] = torch.float64 if wide and x is case.dtype else x
        return found

    takes_noise = case.operation == "noise_pair"
    reference = plain(case) if takes_noise else case.site.reference
    assert reference is not None
    chosen = [ends(wide) for wide in (True, False)]
    if takes_noise:
        chosen = [without_chance(case, given) for given in chosen]
    try:
        with torch.no_grad():
            oracle, same = (tensors_of(reference(**given)) for given in chosen)
            found = [x[rows] for x in tensors_of(provider.make(**inputs))]
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return wrong(found, same, oracle, case.dtype, True)


def _without_noise(function: Call) -> Call:
    return lambda **inputs: function(**{k: v for k, v in inputs.items() if k != "noise"})


def wrong(
    found: list[torch.Tensor], reference: list[torch.Tensor], oracle: list[torch.Tensor],
    dtype: torch.dtype, is_ours: bool,
) -> str:  # fmt: skip
    """The first result that is not within its bound. Ours: twice the error of `reference` (plain PyTorch
    in the same dtype) plus a millionth of the largest value, as in the tests. Others: a few roundings of
    the dtype, by the norm."""
    if len(found) != len(oracle):
        return f"{len(found)} results and gradients instead of {len(oracle)}"
    for i, (x, plain_x, exact) in enumerate(zip(found, reference, oracle, strict=True)):
        if x.shape != exact.shape:
            return f"result {i} is {list(x.shape)} instead of {list(exact.shape)}"
        if x.dtype == torch.uint8:  # a byte may round to its neighbour
            off = (x.int() - exact.int()).abs().max().item()
            if off > 1:
                return f"result {i} is off by {off} of 255"
            continue
        exact = exact.double()
        if is_ours:
            error = (x.double() - exact).abs().max().item()
            allowed = 2 * (plain_x.double() - exact).abs().max().item()
            allowed += 1e-6 * exact.abs().max().item()
        else:
            error = (x.double() - exact).norm().item()
            allowed = (8 * torch.finfo(dtype).eps + 1e-5) * exact.norm().item()
        if not error <= allowed:  # a NaN fails too
            return f"result {i} is off by {error:.2g}, {allowed:.2g} are allowed"
    return ""


def without_chance(case: Case, inputs: Inputs) -> Inputs:
    """Arguments under which a provider with random numbers of its own computes the same function."""
    inputs = dict(inputs)
    if "dropout_p" in inputs:
        inputs["dropout_p"] = 0.0
    if case.operation == "noise_pair":
        key, y = inputs["key"], inputs["y"]
        layer = max(key.layer, NOISE_LAYER)
        inputs["noise"] = philox_normal(key.seed, key.step, layer, key.sample, tuple(y.shape[1:]))
    return inputs
