"""The step in pieces: the numbers of the step in one, wherever the state lies."""

import copy

import pytest
import torch

from tcm_fast.optim.fused import FusedOptimizer
from tcm_fast.optim.offload import PiecewiseOptimizer

SHAPES = [(3,), (), (40, 7), (5, 3, 3, 3), (0, 4), (130,), (17, 2)]
STATE = 3 * 4 * 200  # bytes: three of the shapes together


class Side:
    """Parameters, EMAs and 16-bit copies with an optimizer of one kind."""

    def __init__(self, make, device="cpu", copies=False, **options):
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in SHAPES]
        last = self.params[3].data.to(memory_format=torch.channels_last)
        self.params[3] = torch.nn.Parameter(last)
        self.emas = [[p.detach().clone() for p in self.params] for _ in range(2)]
        self.copies = [p.detach().to(torch.bfloat16) for p in self.params] if copies else None
        self.optimizer = make(self.params, emas=self.emas, copies=self.copies, **options)

    def step(self, number, poison=False, scale=1.0):
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(number)
        for i, p in enumerate(self.params):
            if i == 5 and number % 2:
                continue  # a parameter without a gradient, alone in its piece
            grad = torch.randn(p.shape, generator=generator).to(p.device) * scale
            p.grad = torch.empty_like(p).copy_(grad)
        if poison:
            self.params[2].grad[3, 3] = torch.nan
        self.optimizer.prepare(ema_betas=[0.9, 0.5])
        self.optimizer.step()

    def everything(self):
        self.optimizer.wait()
        found = [*self.params, *(self.copies or [])]
        for ema in self.emas:
            found += ema
        for p in self.params:
            found += self.optimizer.state[p].values() if p in self.optimizer.state else []
        return [x.detach().cpu() for x in found]


def assert_equal(a, b):
    ours, theirs = a.everything(), b.everything()
    assert len(ours) == len(theirs)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def both(**options):
    pieces = Side(PiecewiseOptimizer, piece_bytes=STATE, **options)
    return Side(FusedOptimizer, **options), pieces


@pytest.mark.parametrize("kind", ["radam", "adam", "adamw"])
def test_the_same_bits_as_in_one_piece(kind):
    whole, pieces = both(kind=kind, weight_decay=0.01, copies=True)
    assert len(pieces.optimizer._pieces) > 3
    for number in range(8):
        for side in (whole, pieces):
            side.step(number, poison=number == 4)
    assert_equal(whole, pieces)
    assert pieces.optimizer.skips == whole.optimizer.skips == 1
    held = [x.untyped_storage()._cdata for x in pieces.optimizer._slots]
    for state in pieces.optimizer.state.values():
        assert state["exp_avg"].untyped_storage()._cdata not in held


def test_a_step_that_is_skipped_changes_nothing():
    whole, pieces = both()
    for side in (whole, pieces):
        side.step(1)
    before = [x.clone() for x in pieces.everything()]
    pieces.step(3, poison=True)  # odd: one piece has no gradient to be poisoned
    assert all(torch.equal(a, b) for a, b in zip(before, pieces.everything(), strict=True))
    assert pieces.optimizer.grad_norm.isnan()


@pytest.mark.parametrize("max_norm", [None, 1.5])
def test_the_loss_scale_moves_alike(max_norm):
    options = {"scale": 16.0, "growth_interval": 3, "max_norm": max_norm}
    whole, pieces = both(**options)
    seen = []
    for number in range(12):
        for side in (whole, pieces):
            side.step(number, poison=number in (1, 6, 7), scale=16.0)
            seen.append(side.optimizer.loss_scale.get_scale())
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) > 2
    norms = [side.optimizer.grad_norm.item() for side in (whole, pieces)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for a, b in zip(whole.everything(), pieces.everything(), strict=True):
        # Clipping scales by a norm that was summed in another order: an ulp or two a step.
        torch.testing.assert_close(a, b, rtol=1e-6 * 12, atol=1e-6)


def test_moments_in_half_the_memory_stay_unbiased():
    whole, pieces = both(moments="bf16", kind="adam")
    for number in range(0, 40, 2):
        for side in (whole, pieces):
            side.step(number)
    for p, q in zip(whole.params, pieces.params, strict=True):
        # Of 20 steps of lr 1e-3 each is off by the rounding of its moments, 2^-8 relative.
        torch.testing.assert_close(p, q, rtol=0, atol=20 * 1e-3 * 2**-7)
    assert pieces.optimizer.state[pieces.params[2]]["exp_avg"].dtype == torch.bfloat16


def test_moments_of_8_bits_in_pieces(monkeypatch):
    """Their random bits are keyed by the piece: the values are near those of the step in one, and the
    state is what is saved and loaded."""
    monkeypatch.setitem(globals(), "SHAPES", [(64, 80), (7,), (128, 64), (32, 16, 3, 3)])
    whole, pieces = both(moments="8bit", kind="adam")
    for number in range(0, 20, 2):
        for side in (whole, pieces):
            side.step(number)
    for p, q in zip(whole.params, pieces.params, strict=True):
        # Of 10 steps of lr 1e-3 each is off by the rounding of its moments, an eighth each.
        torch.testing.assert_close(p, q, rtol=0, atol=10 * 1e-3 * 0.5)
    kinds = [pieces.optimizer.state[p]["exp_avg"].dtype for p in pieces.params]
    assert kinds == [torch.uint8, torch.float32, torch.uint8, torch.uint8]
    saved = copy.deepcopy(pieces.optimizer.state_dict())
    _, again = both(moments="8bit", kind="adam")
    again.optimizer.load_state_dict(saved)
    for ema, other in zip(pieces.emas, again.emas, strict=True):
        for a, b in zip(ema, other, strict=True):
            b.copy_(a)
    for p, q in zip(pieces.params, again.params, strict=True):
        q.data.copy_(p.data)
    for side in (pieces, again):
        side.step(30)
    assert_equal(pieces, again)


def test_state_travels_both_ways():
    whole, pieces = both()
    whole.step(2)
    pieces.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    for a, b in zip(pieces.params, whole.params, strict=True):
        a.data.copy_(b)
    for ours, theirs in zip(pieces.emas, whole.emas, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    for number in (4, 6):
        for side in (whole, pieces):
            side.step(number)
    assert_equal(whole, pieces)
    back = Side(FusedOptimizer)
    back.optimizer.load_state_dict(pieces.optimizer.state_dict())
    again = [back.optimizer.state[p]["exp_avg"] for p in back.params]
    mine = [pieces.optimizer.state[p]["exp_avg"] for p in pieces.params]
    assert all(torch.equal(a, b) for a, b in zip(again, mine, strict=True))


def test_groups_come_at_the_beginning():
    _, pieces = both()
    with pytest.raises(ValueError, match="all groups must be there"):
        pieces.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["radam", "adam"])
def test_state_in_pinned_memory_gives_the_same_bits(kind):
    whole, pieces = both(kind=kind, device="cuda", copies=True)
    assert all(piece.host.is_pinned() for piece in pieces.optimizer._pieces)
    for number in range(50):
        for side in (whole, pieces):
            side.step(number, poison=number == 4)
    assert_equal(whole, pieces)
