"""How large rounding errors are, by drawing them at random: tolerances that hold on any processor."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Operations that only move numbers round nothing.
MOVES = {"cat", "clone", "constant_pad_nd", "copy", "detach", "select_backward", "slice_backward"}


class RoundingErrors(TorchDispatchMode):
    """Runs float64 operations with rounding errors of another dtype: multiplies each operand and each
    result by 1 + u, u uniform within half a unit in the last place."""

    def __init__(self, dtype: torch.dtype, seed: int):
        super().__init__()
        self.size = torch.finfo(dtype).eps / 2
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        moves = function.is_view or function._schema.is_mutable or name in MOVES
        creates = not any(
            torch.is_tensor(v) for v in tree_leaves(args)
        )  # constants, random numbers
        if moves or creates:
            return function(*args, **kwargs)
        args = tree_map_only(torch.Tensor, self._rounded, args)
        return tree_map_only(torch.Tensor, self._rounded, function(*args, **kwargs))

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.float64:
            return tensor
        u = torch.rand(tensor.shape, dtype=torch.float64, generator=self.generator)
        return tensor * (1 + self.size * (2 * u - 1))


def allowed_errors(function, dtype: torch.dtype, terms: int, draws: int = 4):
    """For each tensor that `function()` computes in float64, by name: the largest error that an
    implementation in `dtype` may have, on any processor.

    terms: the most numbers that are summed up for one element anywhere in it. A sum of n numbers taken
    one after another rounds n partial sums, the k-th √k times as large as a number: an error of √n / 2
    times that of rounding each number once, which is what a draw has. Vectors and blocks make it
    smaller. Twice that is allowed, since a draw may come out smaller than another implementation's.
    """
    exact = function()
    largest = dict.fromkeys(exact, 0.0)
    for seed in range(draws):
        with RoundingErrors(dtype, seed):
            drawn = function()
        for name, value in exact.items():
            largest[name] = max(largest[name], (drawn[name] - value).abs().max().item())
    return {name: math.sqrt(terms) * error for name, error in largest.items()}
