"""The objectives: which noise levels, which targets, which loss. One phase of training, one class."""

from __future__ import annotations

from typing import Any

from tcm_fast.objectives.base import Objective
from tcm_fast.objectives.cd import Cd
from tcm_fast.objectives.cmt import Cmt
from tcm_fast.objectives.ect import Ect
from tcm_fast.objectives.edm import Edm
from tcm_fast.objectives.ict import Ict
from tcm_fast.objectives.tcm import Tcm

OBJECTIVES: dict[str, type[Objective[Any]]] = {o.name: o for o in (Edm, Ect, Tcm, Ict, Cd, Cmt)}
"""By the name of the phase. Its order counts: a phase's place is part of its seed."""


def is_consistency(phase: str | None) -> bool:
    """Whether a network of that phase is sampled as a consistency function: every one that is not known
    to be a denoiser."""
    return phase not in OBJECTIVES or OBJECTIVES[phase].is_consistency


def counts_on(before: str | None, phase: str) -> bool:
    """Whether a phase's iterations are counted on from those of the phase before."""
    both = [OBJECTIVES.get(name or "") for name in (before, phase)]
    return all(kind is not None and kind.is_consistency and kind.counts_on for kind in both)
