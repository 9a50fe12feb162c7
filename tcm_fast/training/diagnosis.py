"""Where numbers that are not finite come from: one batch again, looked at module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tcm_fast.objectives.base import Objective
from tcm_fast.objectives.batch import Batch

NAMED = 3  # rows and parameters that are named


def diagnose(objective: Objective[Any], batch: Batch, scale: float = 1.0) -> str:
    """What is not finite first when a batch goes through the objective again, with the weights of now;
    empty where everything is. Changes neither weights nor gradients; waits for the device at every
    module.

    Args:
        objective: of the phase, not the wrapper that talks to other processes.
        batch: the micro-batch.
        scale: of the loss.
    """
    spoilt = [n for n, p in objective.student.named_parameters() if not _is_finite(p)]
    if spoilt:
        return f"weights of the student are not finite: {_list(spoilt)}"
    if not _is_finite(batch.images):
        rows = _rows(batch.images.flatten(1))
        return f"images are not finite, {_where(batch, rows)}"
    culprits: list[str] = []
    networks: dict[str, nn.Module | None] = {
        "student": objective.student,
        "frozen network": objective.frozen,
    }
    with torch.compiler.set_stance("force_eager"), torch.enable_grad():
        with _watching(networks, culprits):
            losses = objective.losses(batch)
        rows = _rows(losses.detach()[:, None])
        if rows:
            module = f"{culprits[0]}, " if culprits else "the loss itself, "
            return f"first in the forward pass: {module}{_where(batch, rows)}"
        parameters = dict(objective.student.named_parameters())
        loss = torch.dot(losses, batch.weights[0]) * scale
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    broken = [
        name
        for name, grad in zip(parameters, grads, strict=True)
        if grad is not None and not _is_finite(grad)
    ]
    if broken:  # the backward pass meets the last modules first
        return f"first in the backward pass: gradient of {broken[-1]} ({len(broken)} in all), " + (
            f"largest loss {losses.max().item():.3g} {_where(batch, [int(losses.argmax())])}"
        )
    return ""


@contextmanager
def _watching(networks: dict[str, nn.Module | None], culprits: list[str]) -> Iterator[None]:
    """Note the modules whose output is not finite although their inputs are, innermost first."""

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not all(map(_is_finite, _tensors(output))) and all(
                map(_is_finite, _tensors(inputs))
            ):
                culprits.append(f"{name} ({type(module).__name__})")

        return look

    handles = [
        module.register_forward_hook(watch(f"{path} of the {title}"))
        for title, network in networks.items()
        if network is not None
        for path, module in network.named_modules()
        if path
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, tuple | list) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def _rows(values: torch.Tensor) -> list[int]:
    """Rows of [n,k] that hold something that is not finite."""
    return torch.nonzero(~values.isfinite().all(1)).flatten().tolist()


def _where(batch: Batch, rows: list[int]) -> str:
    """Which samples of the global batch, and their noise levels."""
    samples, levels = batch.key.sample.tolist(), batch.t.tolist()
    named = [f"sample {samples[row]} at t = {levels[row]:.4g}" for row in rows[:NAMED]]
    return _list(named, len(rows))


def _list(names: list[str], count: int | None = None) -> str:
    count = len(names) if count is None else count
    rest = f" and {count - NAMED} more" if count > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
