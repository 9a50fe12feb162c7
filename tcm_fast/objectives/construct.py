"""A phase's networks and objective from a run's configuration: what trains them and what only counts their
memory build them here alike."""

from __future__ import annotations

from typing import Any

from tcm_fast.config import Config
from tcm_fast.networks import LOGVAR_CHANNELS, Precond, build_network
from tcm_fast.networks.precision import is_derived, make_copies
from tcm_fast.networks.recompute import set_recompute
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.base import Objective
from tcm_fast.runtime.arithmetic import PRECISIONS, splits_convolutions


def build_student(
    config: Config, name: str, *, resolution: int, channels: int, classes: int
) -> Precond:
    """The network of a phase, on torch's default device. ValueError for one that cannot be built.

    Args:
        config: of the run.
        name: the phase.
        resolution, channels, classes: of the images.
    """
    phase = config.phase(name)
    return build_network(
        config.network.name,
        img_resolution=resolution,
        img_channels=channels,
        label_dim=classes if config.network.class_conditional else 0,
        logvar_channels=LOGVAR_CHANNELS if OBJECTIVES[name].learns_variance(phase) else 0,
        dropout=phase.dropout,
        **config.network.architecture(),
    )


def build_objective(
    config: Config, name: str, student: Precond, frozen: Precond | None, *, has_copies: bool
) -> Objective[Any]:
    """A phase's objective on its networks, ready to train.

    Args:
        config: of the run.
        name: the phase.
        student, frozen: its networks; the student is put into train mode.
        has_copies: the optimizer keeps the weights that the student computes with, where they are derived.
    """
    kind, phase = OBJECTIVES[name], config.phase(name)
    student.train()
    augmentation = student.model.augmentation
    if augmentation is not None:  # has a gradient only where something is augmented
        augmentation.requires_grad_(kind.augments(phase))
    set_recompute(student.model, norms=config.recompute_norms, blocks_from=config.recompute_blocks)
    dtype = PRECISIONS[config.precision]
    split = splits_convolutions(config.precision)
    objective = kind(phase, student, frozen, dtype=dtype, split=split)
    objective.apart = config.is_lean
    if has_copies and is_derived(student, dtype):
        objective.folded = config.folds_rows
        objective.copies = make_copies(student, dtype, rows_too=objective.folded)
    return objective
