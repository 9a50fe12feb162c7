"""An optimizer's state as named tensors, taken and given back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from tcm_fast.runtime.atomic import Tensors


def kind_of(optimizer: torch.optim.Optimizer) -> str:
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
        elif value.dtype == torch.uint8 and hasattr(optimizer, "stands_for"):  # of 8 bits
            restored = value.to(parameter.device, copy=True)
        elif value.shape == parameter.shape:
            restored = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            restored.copy_(value)
        else:
            raise ValueError(
                f"optimizer: saved state {path!r} must be {list(parameter.shape)}, "
                f"got {list(value.shape)}"
            )
        optimizer.state[parameter][key] = restored
