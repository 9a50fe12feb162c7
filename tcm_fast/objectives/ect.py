"""Stage 1: consistency training over all noise levels (Geng et al. 2024, in the variant of TCM)."""

from __future__ import annotations

from tcm_fast.config import EctConfig
from tcm_fast.objectives.posterior import PosteriorTarget


class Ect(PosteriorTarget[EctConfig]):
    """Pairs over all noise levels, targets by the student."""

    name = "ect"
    time_share = 0.40

    @classmethod
    def distribution(cls, config: EctConfig) -> str:
        return "truncated_lognormal" if config.truncate else "lognormal"
