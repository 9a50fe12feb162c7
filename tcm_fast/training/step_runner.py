"""What the device does in a step: losses, gradients and the optimizer; captured as a CUDA graph where it can
be, and again in smaller pieces where it runs out of memory."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext, suppress

import torch
from torch.nn.parallel import DistributedDataParallel

from tcm_fast.config import Config
from tcm_fast.kernels._triton import compiling_together, runs_triton
from tcm_fast.networks import force_rows
from tcm_fast.objectives.batch import Batch
from tcm_fast.optim.schedules import learning_rate
from tcm_fast.runtime.cuda_graphs import CaptureError
from tcm_fast.runtime.distributed import Workers
from tcm_fast.training.batch_loader import BatchLoader
from tcm_fast.training.logger import RunLog
from tcm_fast.training.micro_batches import MicroBatches
from tcm_fast.training.phase import Phase, TrainingError
from tcm_fast.training.step_monitor import nan_if_not_finite

OUT_OF_MEMORY = "out of memory"


class StepRunner:
    """Takes the steps of a run's phases. Every process has one and calls it alike.

    Args:
        config: of the run.
        workers: its processes.
        micro: how many passes a batch is cut into; raised where a pass runs out of memory.
        log: of the run.
    """

    def __init__(self, config: Config, workers: Workers, micro: MicroBatches, log: RunLog) -> None:
        self.config, self.workers, self.micro, self.log = config, workers, micro, log
        self.device = workers.device

    # ---- a step ---------------------------------------------------------------------------------

    def run(self, phase: Phase, loader: BatchLoader) -> None:
        """Take the phase's next step, whose result does not depend on how its batch is cut or whether it is
        captured. Out of memory, it is tried again: with the allocator's unused memory freed, without graphs,
        in smaller micro-batches.

        Raises:
            TrainingError: nothing of that helps, or other processes are waiting in the step that failed.
        """
        may_clear = phase.graphs is not None
        while True:
            try:
                self.step(phase, loader.batches(phase))
                phase.metrics.steps += 1
                return
            except torch.OutOfMemoryError:
                failure = OUT_OF_MEMORY  # what the failed attempt holds is free from here on
            except CaptureError as error:
                failure, may_clear = str(error), False
            if may_clear:  # the memory of graphs is not that of pictures, which may lie unused
                self._clear(phase)
            elif phase.graphs is not None:
                self._drop_graphs(phase, failure)
            else:
                self._cut_smaller(phase)
            if self.workers.world > 1 and not may_clear:
                raise TrainingError(
                    f"{phase.name}: rank {self.workers.rank} ran out of memory after {phase.images:,} "
                    f"images; with --resume auto the run goes on in {self.micro.count} micro-batches"
                )
            phase.metrics.set_back()
            may_clear = False

    def step(self, phase: Phase, batches: list[Batch]) -> None:
        """One optimizer step; its losses and gradient norm go to the phase's metrics."""
        rate = phase.rate_factor * learning_rate(phase.config, phase.images, phase.iteration)
        size = phase.config.batch_size
        after = (phase.iteration + 1, phase.images + size, size)
        phase.optimizer.prepare(rate, [ema.rule.beta(*after) for ema in phase.emas])
        if phase.graphs is None:
            self._work(phase, batches)
            return
        (batch,) = batches

        def work(*tensors: torch.Tensor) -> torch.Tensor:
            return self._work(phase, [batch.at(*tensors)])

        phase.graphs(batch.kind, work, *batch.tensors)
        phase.optimizer.after_replay()

    def _work(self, phase: Phase, batches: list[Batch]) -> torch.Tensor:
        """What a graph captures: losses, gradients, the optimizer. Returns the mean losses off and on the
        boundary, [2]."""
        losses: torch.Tensor | None = None
        phase.optimizer.zero_grad(set_to_none=True)
        if phase.inner.folded:  # the optimizer leaves the network's rows normalised
            for name, part in phase.student.named_children():
                if name != "model":
                    force_rows(part)
        else:
            force_rows(phase.student)
        with nullcontext() if phase.graphs is None else phase.graphs.memory():
            for batch in batches:
                module, is_last = phase.objective, batch is batches[-1]
                waits = isinstance(module, DistributedDataParallel) and not is_last
                with module.no_sync() if waits else nullcontext():  # type: ignore[operator]
                    loss, share = module(batch)
                    # Gradients are means over the processes; the loss is a sum over them.
                    factor = nan_if_not_finite(loss, self.workers.world)
                    loss.backward(phase.optimizer.loss_scale.scale(factor))
                losses = share if losses is None else losses + share
            phase.inner.forget_weights()
            del loss, share
        assert losses is not None
        phase.metrics.write(losses, phase.take_step())
        if phase.graphs is not None:  # the next call takes their memory
            phase.optimizer.zero_grad(set_to_none=True)
        return losses

    # ---- before the first step ------------------------------------------------------------------

    def warm_up(self, phase: Phase, loader: BatchLoader) -> None:
        """Compile what the phase's first step needs, and let several processes agree on a cut of the batch
        that fits all of them."""
        if phase.step < phase.steps:
            batches = loader.batches(phase)
            self.compile_kernels(phase, batches)
            self._fit_in_memory(phase, loader, batches)

    def compile_kernels(self, phase: Phase, batches: list[Batch]) -> None:
        """Compile the Triton kernels of a step in parallel, by one that only notes them."""
        if self.config.compile or not runs_triton("step", self.device.type):
            return
        begun = time.monotonic()
        with compiling_together() as noted:
            # The first step will run out of memory too, cut its batch and compile what is missing.
            with suppress(torch.OutOfMemoryError):
                self._gradients(phase, batches[0])
            names = {kernel.__name__ for kernel, *_ in noted}
            self.log.say(f"{phase.name}: compiling {len(names)} kernels for this GPU")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.log.say(f"{phase.name}: kernels ready after {time.monotonic() - begun:.0f} s")

    def _fit_in_memory(self, phase: Phase, loader: BatchLoader, batches: list[Batch]) -> None:
        """Several processes cannot repeat a step that one of them failed in, while the others wait for
        its gradients: so each tries the first one alone."""
        if self.workers.world == 1:
            return
        while True:
            is_short = False
            try:
                self._gradients(phase, batches[0])
            except torch.OutOfMemoryError:
                is_short = True
            if not self.workers.any(is_short)[0]:
                break
            self._cut_smaller(phase)
            batches = loader.batches(phase)
        if len(batches) > 1:
            # A static graph is learnt in a pass that exchanges gradients; in a step, not all do.
            loss, _ = phase.objective(batches[0])
            loss.backward()
            phase.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, phase: Phase, batch: Batch) -> None:
        """Forward and backward pass of a micro-batch that leave nothing behind. The gradients do not
        arrive at the weights: DistributedDataParallel, which watches those, would take it for a step."""
        weights = [p for p in phase.student.parameters() if p.requires_grad]
        try:
            loss, _ = phase.inner(batch)
            torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            phase.inner.forget_weights()

    # ---- out of memory --------------------------------------------------------------------------

    def free(self, phase: Phase) -> None:
        """Free what a step that failed holds, and the graphs."""
        phase.graphs = None  # one cannot cut a batch either
        self._clear(phase)

    def _clear(self, phase: Phase) -> None:
        """Free what a step that failed holds, and what the allocator keeps unused."""
        phase.optimizer.zero_grad(set_to_none=True)
        phase.inner.forget_weights()
        gc.collect()  # the error's frames and the tensors in them
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _drop_graphs(self, phase: Phase, why: str) -> None:
        """Go on without captured steps: the same result, with more work for the host."""
        if self.config.cuda_graph == "on" and why != OUT_OF_MEMORY:
            raise TrainingError(
                f"{phase.name}: a step could not be captured as a CUDA graph ({why}); use --cuda-graph auto"
            )
        self.free(phase)
        self.log.warn(
            "no_graphs",
            f"{phase.name}: {why} where steps are captured as CUDA graphs: they run without from here on, "
            "with the same result",
            images=phase.images,
        )

    def _cut_smaller(self, phase: Phase) -> None:
        """Cut the batch into more micro-batches. TrainingError where each has one image already."""
        self.free(phase)
        before = self.micro.of(phase.config.batch_size)
        if not self.micro.halve(phase.config.batch_size):
            raise TrainingError(
                f"{phase.name}: out of memory with a single image at a time; take a smaller network or "
                "--precision bf16"
            )
        self.log.warn(
            "out_of_memory",
            f"{phase.name}: out of memory with {before} micro-batch{'es' * (before > 1)} a step: "
            f"{self.micro.count} from here on, with the same result",
            images=phase.images,
            micro_batches=self.micro.count,
        )
