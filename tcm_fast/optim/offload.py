"""The optimizer step piece by piece, so that what it alone needs does not have to be on the device: moments
and EMAs in pinned host memory.

    host memory -> slot on the device -> step of that piece -> host memory

Two slots take turns: while one piece computes, the next one comes in and the last one goes out, on
streams of their own. The host runs ahead of the device, so the first pieces come in during the backward
pass and the last ones leave during the next forward pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tcm_fast.kernels.eight_bit import packed_size
from tcm_fast.kernels.fused_step import StepControl, StepTable, StepTensors, fused_step
from tcm_fast.optim.fused import FusedOptimizer, moment_as, moment_size

PIECES = 8  # at least: what visits the device twice over must be much less than all
PIECE_BYTES = 64 << 20  # of state, at most; a larger parameter is a piece of its own
ALIGNED = 64  # bytes between the starts of tensors: the kernels' accesses are 16 wide
SLOTS = 2
SEED_STEP = 0x9E3779B9  # between the pieces' seeds of stochastic rounding


@dataclass
class Piece:
    """Some parameters, and where their state lies in one block of memory."""

    indices: list[int]
    places: list[dict[str, tuple[int, torch.dtype]]] = field(default_factory=list)
    """For each parameter: byte offset and dtype by name."""
    size: int = 0
    host: torch.Tensor | None = None
    table: StepTable = field(default_factory=StepTable)
    tensors: list[StepTensors] = field(default_factory=list)
    """As the step sees them: on the device."""
    control: StepControl | None = None
    grads: int = 0
    """Elements of the scaled gradients."""


class PiecewiseOptimizer(FusedOptimizer):
    """A `FusedOptimizer` that takes its step piece by piece, with moments and EMAs in host memory, pinned
    for CUDA. Same numbers: without clipping bit for bit (but for the stochastic rounding of moments
    below fp32, which is keyed by the piece).

    Args:
        piece_bytes: state that is on the device at a time, twice; None is an eighth of all, or 64 MiB.
        others: as `FusedOptimizer`'s. The lists of `emas` get the tensors in host memory in place of those
            given.
    """

    def __init__(
        self,
        params: Any,
        kind: str = "radam",
        *,
        piece_bytes: int | None = None,
        **options: Any,
    ) -> None:
        self.piece_bytes = piece_bytes
        self._pieces: list[Piece] = []
        self._slots: list[torch.Tensor] = []
        self._scaled: torch.Tensor | None = None
        self._streams: tuple[Any, Any] | None = None
        self._free: list[Any] = [None] * SLOTS
        super().__init__(params, kind, **options)
        if any(
            self._normalized
        ):  # the norm of a projected gradient is known to the whole pass alone
            raise ValueError("optimizer: normalized rows must not be cut into pieces")
        self._cut()

    # ---- where things lie -----------------------------------------------------------------------

    def _cut(self) -> None:
        """Cut the parameters into pieces, and lay out each one's state."""
        if self.piece_bytes is None:
            elements = [t.param.numel() for t in self._tensors]
            self.piece_bytes = piece_bytes(elements, len(self.emas), self._moments)
        for index, t in enumerate(self._tensors):
            kinds = {f"emas[{k}]": a.dtype for k, a in enumerate(t.emas)}
            kinds |= dict.fromkeys(("exp_avg", "exp_avg_sq"), self._kind_of_moments(t))
            sizes = [_aligned(_size(t.param.numel(), kind)) for kind in kinds.values()]
            if not self._pieces or self._pieces[-1].size + sum(sizes) > self.piece_bytes:
                self._pieces.append(Piece([]))
            piece = self._pieces[-1]
            starts = [piece.size + sum(sizes[:k]) for k in range(len(sizes))]
            piece.places.append(
                dict(zip(kinds, zip(starts, kinds.values(), strict=True), strict=True))
            )
            piece.indices.append(index)
            piece.size += sum(sizes)
            piece.grads += _aligned(4 * t.param.numel()) // 4
        device = self._tensors[0].param.device
        for number, piece in enumerate(self._pieces):
            seed = (self.control.seed + number * SEED_STEP) % 2**32
            piece.control = StepControl.on(device, seed=seed)
            pinned = device.type == "cuda"
            piece.host = torch.zeros(piece.size, dtype=torch.uint8, pin_memory=pinned)
        largest = max(piece.size for piece in self._pieces)
        self._slots = [
            torch.empty(largest, dtype=torch.uint8, device=device)
            for _ in range(min(SLOTS, len(self._pieces)))
        ]
        self._move_emas()
        most = max(piece.grads for piece in self._pieces)
        self._scaled = torch.empty(most, dtype=torch.float32, device=device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """ValueError once the pieces are cut."""
        if self._pieces:
            raise ValueError("optimizer: all groups must be there when it is made")
        super().add_param_group(param_group)

    def _move_emas(self) -> None:
        for piece in self._pieces:
            for index, places in zip(piece.indices, piece.places, strict=True):
                t = self._tensors[index]
                views = tuple(
                    _view(piece.host, places[f"emas[{k}]"], t.param) for k in range(len(t.emas))
                )
                for k, view in enumerate(views):
                    view.copy_(t.emas[k])
                    self.emas[k][index] = view
                t.emas = views

    def _gather(self) -> None:
        """State on the host: what is loaded or new moves there."""
        for piece in self._pieces:
            for index, places in zip(piece.indices, piece.places, strict=True):
                t = self._tensors[index]
                t.grad = t.param.grad
                state = self.state.get(t.param, {}) if t.grad is None else self.state[t.param]
                if t.grad is None and not state:
                    continue
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=t.param.device)
                t.step = state["step"]
                for key in ("exp_avg", "exp_avg_sq"):
                    view = getattr(t, key)
                    if view is None:
                        view = _view(piece.host, places[key], t.param)
                        setattr(t, key, view)
                    if state.get(key) is not view:
                        self.wait()
                        view.copy_(
                            moment_as(state[key], view.dtype, t, key)
                        ) if key in state else view.zero_()
                        state[key] = view

    # ---- the step -------------------------------------------------------------------------------

    def _update(self) -> None:
        factor = self._decide([t.grad for t in self._tensors if t.grad is not None])
        for number, piece in enumerate(self._pieces):
            slot = number % SLOTS
            self._bring_in(piece, slot)
            self._step_piece(piece, slot, factor)
            self._take_out(piece, slot)

    def _store_options(self) -> None:
        """Nothing to do ahead: this step is never captured in a graph."""

    def _decide(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """What the gradients are multiplied by: fp32 scalar on the device, NaN where one of them is NaN/Inf,
        so that every piece skips its step. Updates the loss scale as `fused_step` does."""
        control = self.control
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        norm = torch.stack(list(norms)).double().square().sum().sqrt()
        finite = norm.isfinite()
        scale = torch.ones_like(norm) if control.scale is None else control.scale.double()
        norm = torch.where(finite, norm / scale, math.nan)
        control.norm.copy_(norm)
        control.skips += ~finite
        if control.scale is not None and control.tracker is not None:
            counted = torch.where(finite, control.tracker + 1, 0)
            grown = (scale * control.growth).float()
            grows = counted == control.interval
            after = torch.where(finite, control.scale, control.scale * control.backoff)
            control.scale.copy_(torch.where(grows & grown.isfinite(), grown, after))
            control.tracker.copy_(torch.where(grows, 0, counted))
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1) / scale
        return torch.where(finite, factor, math.nan).float()

    def _step_piece(self, piece: Piece, slot: int, factor: torch.Tensor) -> None:
        assert self._scaled is not None
        if not piece.tensors:
            piece.tensors = [self._on_device(piece, k, slot) for k in range(len(piece.indices))]
        there, start = [], 0
        for index, t in zip(piece.indices, piece.tensors, strict=True):
            own = self._tensors[index]
            t.step, t.grad = own.step, None
            if own.grad is not None:
                t.grad = _view(
                    self._scaled.view(torch.uint8), (4 * start, torch.float32), own.param
                )
                there.append((t.grad, own.grad))
            start += _aligned(4 * own.param.numel()) // 4
        if there:
            torch._foreach_copy_([scaled for scaled, _ in there], [grad for _, grad in there])
            torch._foreach_mul_([scaled for scaled, _ in there], factor)
        assert piece.control is not None
        emas = [] if there else [a for t in piece.tensors for a in t.emas]
        before = [average.clone() for average in emas]
        fused_step(
            piece.tensors,
            self._options(),
            piece.control,
            ema_decays=self.ema_betas,
            table=piece.table,
        )
        # Without a gradient nothing tells a piece that the others skip.
        for average, old in zip(emas, before, strict=True):
            average.copy_(torch.where(factor.isfinite(), average, old))

    def _on_device(self, piece: Piece, k: int, slot: int) -> StepTensors:
        """A parameter's tensors, its state in the slot."""
        own = self._tensors[piece.indices[k]]
        block, places = self._slots[slot], piece.places[k]
        return dataclasses.replace(
            own,
            exp_avg=_view(block, places["exp_avg"], own.param),
            exp_avg_sq=_view(block, places["exp_avg_sq"], own.param),
            emas=tuple(_view(block, places[f"emas[{i}]"], own.param) for i in range(len(own.emas))),
        )

    # ---- copies ---------------------------------------------------------------------------------

    def _bring_in(self, piece: Piece, slot: int) -> None:
        assert piece.host is not None
        place = self._slots[slot][: piece.size]
        if place.device.type != "cuda":
            place.copy_(piece.host)
            return
        if self._streams is None:
            self._streams = torch.cuda.Stream(place.device), torch.cuda.Stream(place.device)
        incoming, _ = self._streams
        with torch.cuda.stream(incoming):
            if self._free[slot] is not None:
                incoming.wait_event(self._free[slot])
            place.copy_(piece.host, non_blocking=True)
        torch.cuda.current_stream(place.device).wait_stream(incoming)

    def _take_out(self, piece: Piece, slot: int) -> None:
        assert piece.host is not None
        place = self._slots[slot][: piece.size]
        if place.device.type != "cuda":
            piece.host.copy_(place)
            return
        assert self._streams is not None
        _, outgoing = self._streams
        outgoing.wait_stream(torch.cuda.current_stream(place.device))
        with torch.cuda.stream(outgoing):
            piece.host.copy_(place, non_blocking=True)
            self._free[slot] = torch.cuda.Event()
            self._free[slot].record(outgoing)

    def wait(self) -> None:
        """Wait until host memory holds the last step's state: before it is read or written."""
        if self._streams is not None:
            self._streams[1].synchronize()

    def state_dict(self) -> dict[str, Any]:
        self.wait()
        return super().state_dict()


def piece_bytes(elements: Sequence[int], emas: int, moments: str) -> int:
    """How much state a piece may have, of fp32 parameters of so many elements."""
    state = sum(4 * emas * count + 2 * moment_size(count, moments) for count in elements)
    return min(state // PIECES, PIECE_BYTES)


def piece_sizes(elements: Sequence[int], emas: int, moments: str) -> list[tuple[int, int]]:
    """Bytes of (state, scaled gradients) of each piece that fp32 parameters of so many elements are cut
    into."""
    limit = piece_bytes(elements, emas, moments)
    pieces: list[tuple[int, int]] = []
    for count in elements:
        state = emas * _aligned(4 * count) + 2 * _aligned(moment_size(count, moments))
        if not pieces or pieces[-1][0] + state > limit:
            pieces.append((0, 0))
        size, grads = pieces[-1]
        pieces[-1] = size + state, grads + _aligned(4 * count)
    return pieces


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _size(numel: int, kind: torch.dtype) -> int:
    """Bytes of a tensor like a parameter, or of its moments of 8 bits."""
    return packed_size(numel) if kind == torch.uint8 else numel * kind.itemsize


def _view(
    block: torch.Tensor | None, place: tuple[int, torch.dtype], like: torch.Tensor
) -> torch.Tensor:
    """A tensor with the shape and strides of `like` (which is dense) at a place of a block of bytes."""
    assert block is not None
    start, dtype = place
    flat = block[start : start + _size(like.numel(), dtype)].view(dtype)
    return flat if dtype == torch.uint8 else flat.as_strided(like.shape, like.stride())
