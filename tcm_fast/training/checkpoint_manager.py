"""What a run saves: its checkpoints and snapshots, and what happens where that fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tcm_fast.checkpoint import run_folder
from tcm_fast.checkpoint.async_writer import CheckpointWriter, NotFinite
from tcm_fast.checkpoint.format import Contents, collect, load_checkpoint
from tcm_fast.checkpoint.posthoc_ema import save_snapshot
from tcm_fast.checkpoint.run_lock import RunLock
from tcm_fast.config import Config, save_config, to_dict
from tcm_fast.runtime.distributed import Workers
from tcm_fast.training.logger import RunLog, timed
from tcm_fast.training.micro_batches import MicroBatches
from tcm_fast.training.phase import Phase, TrainingError, named_ema

FAILED_SAVES = 3  # in a row, that end a run


class CheckpointManager:
    """Saves the phases of a run in its folder, which is locked for other runs meanwhile.

    Every process has one and calls it alike; the main one's writes.

    Args:
        out: the run's folder.
        config: of the run.
        workers: its processes.
        micro: how many passes a batch takes.
        class_names: of the images.
        measure: the Fréchet distance of a phase's first EMA, for `keep_best`.

    Attributes:
        spent: seconds that training waited for saves, under "saving".

    Raises:
        FileExistsError: another run is going on in the folder.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        workers: Workers,
        micro: MicroBatches,
        class_names: tuple[str, ...],
        measure: Callable[[Phase], float],
        *,
        resumes: bool = False,
    ) -> None:
        self.out, self.config, self.workers, self.micro = out, config, workers, micro
        self.class_names, self.measure, self.resumes = list(class_names), measure, resumes
        self.spent: Counter[str] = Counter()
        self._failed = 0
        self._writer: CheckpointWriter | None = None
        self._lock: RunLock | None = None
        self.log = RunLog(out, active=False)
        workers.on_main(self._take_folder)
        if self._lock is not None and self._lock.replaced:
            text = f"{out}: took over from {self._lock.replaced}, which is gone"
            self.log.warn("stale_lock", text)

    def _take_folder(self) -> None:
        self._lock = RunLock(self.out)
        try:
            (self.out / "grids").mkdir(exist_ok=True)
            if not self.resumes:
                self.save_config()
            self.log = RunLog(self.out, self.config)
        except BaseException:
            self._lock.release()
            raise

    def save_config(self) -> None:
        """Of a run that is resumed: once its checkpoint has been taken, so that settings which it refuses
        do not replace its own."""
        save_config(self.config, self.out / "config.json")

    def close(self) -> None:
        """Finish what is being written and let the folder go."""
        if self._writer is not None:
            self._writer.wait()
        self.log.close()
        if self._lock is not None:
            self._lock.release()

    def start_phase(self, phase: Phase) -> None:
        """Before the phase's first save."""
        self.check_last_save(wait=True)
        self._writer = CheckpointWriter(self.out, (phase.inner.frozen_file,))

    def save(self, phase: Phase, *, is_last: bool = False) -> None:
        """A checkpoint of everything, written while training goes on; the last one of a phase is waited for,
        and has to be written."""
        self.check_last_save(wait=True)
        every = self.config.milestone_every
        is_milestone = phase.step == phase.steps or bool(every and phase.step % every == 0)
        metrics = {"frechet": self.measure(phase)} if self.config.keep_best == "frechet" else {}
        with timed(self.spent, "saving"):
            contents = self._contents(phase, metrics)
            if self._writer is not None and self.workers.is_main:
                self._keep_folder()
                self._writer.submit(
                    contents,
                    keep=self.config.keep_checkpoints,
                    milestone=is_milestone,
                    best=self.config.keep_best,
                )
        if is_last:
            self.workers.on_main(lambda: self.check_last_save(wait=True, must_succeed=True))

    def check_last_save(self, *, wait: bool = False, must_succeed: bool = False) -> None:
        """Look at how the last save ended. One that failed is tried again at the next; several in a row end
        the run, and so does the last one of a phase (`must_succeed`)."""
        if self._writer is None:
            return
        with timed(self.spent, "saving"):
            saved = self._writer.wait() if wait else self._writer.poll()
        if saved is None:
            return
        if saved.error is None:
            self._failed = 0
            self.log.write("saved", path=str(saved.path), seconds=round(saved.seconds, 3))
            return
        self._failed += 1
        if isinstance(saved.error, NotFinite) and must_succeed:
            raise TrainingError(str(saved.error))
        if must_succeed or not isinstance(saved.error, OSError | NotFinite):
            raise saved.error
        if self._failed >= FAILED_SAVES:
            raise OSError(f"{saved.error} ({FAILED_SAVES} times in a row)") from saved.error
        self.log.warn("save_failed", f"{saved.error}; training goes on and tries again")

    def last_good(self, phase: str) -> Path | None:
        """The newest checkpoint of a phase that was not saved amid skipped steps, on every process."""
        return self.workers.on_main(lambda: self._last_good(phase))

    def _last_good(self, phase: str) -> Path | None:
        for found in reversed(run_folder.find_checkpoints(self.out)):
            if not found.ok:
                continue
            state = run_folder.read_state(found.path)
            if state["phase"] == phase and not state.get("streak"):
                with suppress(ValueError):
                    return load_checkpoint(found.path).path
        return None

    def snapshot(self, phase: Phase) -> None:
        """Save the power-function EMAs for good."""
        phase.optimizer.wait()
        for index, ema in enumerate(phase.emas):
            if ema.rule.kind != "power":
                continue
            net, values = phase.student, ema.average
            if self.workers.is_main:
                net.info = phase.info() | {"class_names": self.class_names}
                try:
                    save_snapshot(self.out, net, named_ema(phase, values), index, ema.rule.value)
                except OSError as error:
                    self.log.warn("snapshot_failed", f"{error}; training goes on without it")

    def _contents(self, phase: Phase, metrics: dict[str, float]) -> Contents:
        """What a checkpoint holds."""
        phase.optimizer.wait()
        networks: dict[str, Any] = {"model": phase.student}
        for number, ema in enumerate(phase.emas):
            networks[f"ema-{number}"] = phase.student, named_ema(phase, ema.average)
        if phase.frozen is not None:
            networks[phase.inner.frozen_file] = phase.frozen
        return collect(
            networks,
            phase.optimizer,
            phase.info() | {"class_names": self.class_names},
            {
                **phase.counters(),
                "seed": self.config.seed,
                "batch_size": phase.config.batch_size,
                "micro_batches": self.micro.count,
                "metrics": metrics,
                "config": to_dict(self.config),
            },
        )

    def _keep_folder(self) -> None:
        """Make sure that the folder is there, and still ours."""
        if self._lock is None:
            return
        try:
            self._lock.hold()
            if not (self.out / "config.json").exists():
                save_config(self.config, self.out / "config.json")
        except FileExistsError as error:
            raise TrainingError(f"{error}; this run ends, its checkpoints are intact") from None
        except OSError:
            return  # the checkpoint will say what cannot be written
        self.log.reopen()
