"""Back to the last good checkpoint where steps stay NaN or Inf."""

from __future__ import annotations

from tcm_fast.config import GuardConfig
from tcm_fast.networks import Precond
from tcm_fast.training.checkpoint_manager import CheckpointManager
from tcm_fast.training.phase import Phase, TrainingError
from tcm_fast.training.phase_builder import PhaseBuilder

LAST_STREAK = 5  # skipped steps in a row at which a phase does not end well
LOWERED = 0.5  # by which a roll-back multiplies the learning rate or the loss scale


def is_lost(phase: Phase, guard: GuardConfig, *, is_last: bool) -> bool:
    """Whether so many steps in a row were NaN or Inf that they will not be finite again by themselves."""
    limit = min(guard.bad_steps, LAST_STREAK, phase.steps) if is_last else guard.bad_steps
    return phase.monitor.streak >= limit


def roll_back(
    phase: Phase, previous: Precond | None, builder: PhaseBuilder, checkpoints: CheckpointManager
) -> Phase:
    """The phase as it was before its steps became NaN or Inf, with a lower rate or loss scale; saved, so that
    a run that is resumed knows of it.

    Args:
        phase: as it is now; it holds no graphs and no gradients any more.
        previous: what it began with, for where nothing good was saved yet.
        builder, checkpoints: the run's.

    Raises:
        TrainingError: it was tried often enough.
    """
    guard, name = builder.config.guard, phase.name
    streak = phase.monitor.streak
    begun = (phase.step - streak) * phase.config.batch_size
    what = f"{name}: the last {streak} steps, from image {begun:,} on, were not finite"
    checkpoints.check_last_save(wait=True)
    good = checkpoints.last_good(name)
    if phase.rollbacks >= guard.rollbacks:
        raise TrainingError(
            f"{what} ({phase.cause}), after {phase.rollbacks} roll-backs; go on from "
            f"{good or 'the beginning'} with a lower --{name}.lr, with --{name}.grad-clip, or with "
            "a wider --precision"
        )
    count = phase.rollbacks + 1
    fresh = builder.begin(name, previous) if good is None else builder.restore(good)
    missing = count - fresh.rollbacks
    fresh.rollbacks, fresh.skips = count, phase.skips
    now = fresh.lower(guard.lower, LOWERED**missing)
    checkpoints.log.warn(
        "roll_back",
        f"{what}: going on from image {fresh.images:,} with {now} (roll-back {count} of "
        f"{guard.rollbacks})",
        phase=name,
        rollbacks=count,
        images=fresh.images,
    )
    checkpoints.save(fresh)
    return fresh
