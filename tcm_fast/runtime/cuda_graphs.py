"""Work whose shapes repeat, captured once as a CUDA graph and replayed: the host then starts one graph
where it started thousands of kernels."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

Work = Callable[..., torch.Tensor]
WARM_UPS = 2  # eager calls before a capture: kernels compile, libraries choose, optimizers allocate


class CaptureError(RuntimeError):
    """Work could not be captured as a CUDA graph; nothing of it has been carried out."""


class Replay(Protocol):
    """A captured function: replaying it computes its result anew from its inputs' memory."""

    result: torch.Tensor

    def replay(self) -> None: ...


class Place(Protocol):
    """Where eager calls and captures run and allocate."""

    def stream(self) -> AbstractContextManager[None]: ...

    def memory(self) -> AbstractContextManager[None]: ...

    def capture(self, work: Work, tensors: list[torch.Tensor]) -> Replay: ...


@functools.cache
def _stream_of(index: int) -> torch.cuda.Stream:
    """One for each device: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream(index)


class CudaPlace:
    """A stream and a memory pool of their own.

    Eager calls run on the stream that captures use, as torch advises: autograd's accumulation nodes
    remember the stream they were made on, and a capture that met one of another stream would make the
    two depend on each other, which CUDA refuses (pytorch pull request 180090). And they allocate from
    the captures' pool, or a device would have to hold the memory of a step twice."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device, self._stream = torch.device("cuda", index), _stream_of(index)
        with torch.cuda.device(self.device):
            self._pool = torch.cuda.MemPool()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Run on the stream, in order with the current one before and after."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Allocate from the pool: only what is freed, or not read any more, when the next call begins."""
        if torch.cuda.is_current_stream_capturing():  # it does already
            yield
            return
        # By stream: `use_mem_pool` goes by thread, and a backward pass runs in one of autograd's. Made to run
        # in ours, a pass that fails leaves its tasks, and with them all its memory, in the thread's queue.
        place = self.device.index, self._pool.id
        torch._C._cuda_beginAllocateCurrentStreamToPool(*place)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(*place)
            torch._C._cuda_releasePool(*place)

    def capture(self, work: Work, tensors: list[torch.Tensor]) -> Replay:
        return _CudaReplay(work, tensors, self._pool, self._stream)


class _CudaReplay:
    """`work` on tensors that keep their places, captured."""

    def __init__(
        self, work: Work, tensors: list[torch.Tensor], pool: Any, stream: torch.cuda.Stream
    ) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.pool = pool  # outlives the graph
        # Other threads read images into pinned memory meanwhile, which a global capture forbids.
        capture = torch.cuda.graph(
            self.graph, pool=pool.id, stream=stream, capture_error_mode="thread_local"
        )
        failure: Exception | None = None
        try:
            with capture:
                self.result = work(*tensors)
        except Exception as error:
            # What ended `work` is hidden behind what the end of the capture said to it.
            failure = _what_failed(error.__context__ or error)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # or the frame and the exception would keep each other alive

    def replay(self) -> None:
        self.graph.replay()


def _what_failed(cause: BaseException) -> Exception:
    """The error to raise, without the traceback that keeps all of the work's memory alive."""
    text = str(cause).partition("\n")[0]
    if isinstance(cause, torch.OutOfMemoryError):
        return torch.OutOfMemoryError(text)
    return CaptureError(f"{type(cause).__name__}: {text}")


class GraphCache:
    """Captured functions by the shapes that they were captured for.

    One at a time may be in use: they share the memory of their intermediate results, and a result is
    good until the next call.

    Args:
        place: where calls run; a `CudaPlace`, but in the tests.
        capturing: makes a context that is entered around each capture.
    """

    def __init__(
        self,
        place: Place,
        capturing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._place, self._capturing = place, capturing
        self._calls: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, tuple[list[torch.Tensor], Replay]] = {}

    def memory(self) -> AbstractContextManager[None]:
        """For `work`, around what allocates much: memory that all calls share. Nothing that outlives a
        call must be allocated there, but its result."""
        return self._place.memory()

    def __call__(self, key: Hashable, work: Work, *tensors: torch.Tensor) -> torch.Tensor:
        """work(*tensors), from the third call for this key on by replaying what the third captured.

        `key` tells apart what `work` would do differently; shapes and dtypes of the tensors are told
        apart here. `work` must read nothing but the tensors and what keeps its place in memory, and
        must not wait for the device.

        Raises:
            CaptureError: the third call could not be captured.
        """
        key = (key, *((t.shape, t.dtype) for t in tensors))
        with self._place.stream():
            if key not in self._captured:
                if self._calls[key] < WARM_UPS:
                    self._calls[key] += 1
                    return work(*tensors)
                places = [t.clone(memory_format=torch.preserve_format) for t in tensors]
                with self._capturing():
                    self._captured[key] = places, self._place.capture(work, places)
            places, captured = self._captured[key]
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
            captured.replay()
            return captured.result
