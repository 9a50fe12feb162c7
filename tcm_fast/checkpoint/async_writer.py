"""Checkpoints written in the background: training waits for a copy to host memory, not for the disk."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcm_fast.checkpoint.format import Contents, write_checkpoint
from tcm_fast.runtime.atomic import Tensors


@dataclass
class Saved:
    """How a save ended: its folder, or why there is none."""

    path: Path | None
    error: BaseException | None
    seconds: float
    """From the copy's arrival to the end."""


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread.

    `submit` copies the tensors to host memory (pinned beside a GPU, used again by the next save) in the
    stream's order, so training may change them at once. `poll` hands a copy that has arrived to the
    thread: the thread itself issues no CUDA call, since a graph may be captured meanwhile.

    Args:
        run: the run's folder.
        constant: files whose tensors never change ("stage1"): they are copied once.
    """

    def __init__(self, run: Path, constant: tuple[str, ...] = ()) -> None:
        self.run, self.constant = run, constant
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._arriving: tuple[Any, Contents, dict[str, Any]] | None = None
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None

    def submit(self, contents: Contents, **options: Any) -> None:
        """Begin to save; `options` are those of `write_checkpoint`. The one before must have ended."""
        assert self._arriving is None, "a save is under way"
        assert self._thread is None, "a save is under way"
        files = {
            name: (self._copy(name, tensors), header)
            for name, (tensors, header) in contents.files.items()
        }
        copied = Contents(files, contents.info, contents.optimizer, contents.state)
        arrival = None
        if any(t.is_cuda for tensors, _ in contents.files.values() for t in tensors.values()):
            arrival = torch.cuda.Event()
            arrival.record()
        self._arriving = arrival, copied, options
        self._start()

    def _start(self) -> None:
        """Hand what has arrived to the thread."""
        if self._arriving is not None:
            arrival, contents, options = self._arriving
            if arrival is None or arrival.query():
                self._arriving = None
                self._thread = threading.Thread(
                    target=self._write, args=(contents, options), name="checkpoint", daemon=True
                )
                self._thread.start()

    def poll(self) -> Saved | None:
        """Start writing what has arrived; return how a save ended, once. Never waits."""
        self._start()
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread.join()
        self._thread, saved = None, self._saved
        return saved

    def wait(self) -> Saved | None:
        """The end of the save that is under way, or None where there is none."""
        if self._arriving is not None and self._arriving[0] is not None:
            self._arriving[0].synchronize()
        saved = self.poll()
        if self._thread is not None:
            self._thread.join()
            saved = self.poll()
        return saved

    def _copy(self, file: str, tensors: Tensors) -> Tensors:
        copies = {}
        for name, tensor in tensors.items():
            key = (file, name)
            buffer = self._buffers.get(key)
            is_new = buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype)
            if buffer is None or is_new:
                if file in self.constant and not tensor.is_cuda:
                    buffer = tensor.detach()
                else:
                    buffer = torch.empty_like(
                        tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda
                    )
                self._buffers[key] = buffer
            if is_new or file not in self.constant:
                buffer.copy_(tensor.detach(), non_blocking=True)
            copies[name] = buffer
        return copies

    def _write(self, contents: Contents, options: dict[str, Any]) -> None:
        begun = time.monotonic()
        path, error = None, None
        try:
            check_finite(contents)
            path = write_checkpoint(self.run, contents, **options)
        except BaseException as caught:
            error = caught
        self._saved = Saved(path, error, time.monotonic() - begun)


class NotFinite(ValueError):
    """NaN/Inf among the weights: no state to resume from."""


def check_finite(contents: Contents) -> None:
    """NotFinite where a network has NaN/Inf weights."""
    for name, (tensors, _) in contents.files.items():
        if name == "optimizer":
            continue
        for key, value in tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise NotFinite(
                    f"checkpoint: {key} of {name} has values that are not finite, not saved"
                )
