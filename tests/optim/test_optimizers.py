"""What `build_optimizer` makes: fused, offloaded and torch's, all used alike."""

import copy
import math

import pytest
import torch

from tcm_fast.checkpoint.optimizer_state import flatten_optimizer, kind_of, restore_optimizer
from tcm_fast.config import EctConfig, EdmConfig
from tcm_fast.kernels._backend import extension
from tcm_fast.optim import build_optimizer
from tcm_fast.optim.ema import Ema
from tcm_fast.optim.fused import TORCH_KINDS, FusedOptimizer
from tcm_fast.optim.torch_optimizer import TorchOptimizer, UnfinishedStepError

SHAPES = [(3,), (), (8, 4, 3, 3), (100, 7)]
RULES = ("constant:0.9", "power:6.94")
needs_extension = pytest.mark.skipif(extension() is None, reason="needs the extension: not built")


class Side:
    """Parameters, EMAs and the optimizer that a phase would have."""

    def __init__(self, monkeypatch, which, **options):
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
        self.emas = [Ema(rule, self.weights) for rule in RULES]
        config = EctConfig(optimizer=options.pop("kind", "radam"), grad_clip=2.0)
        if which == "torch":
            monkeypatch.setattr("tcm_fast.optim.extension_for", lambda name, device: None)
        self.optimizer = build_optimizer(
            self.weights, config, emas=self.emas, offload=which == "offload", **options
        )
        monkeypatch.undo()

    def backward(self, number):
        loss = sum((w * torch.cos(w + number)).sum() for w in self.weights)
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.loss_scale.scale(loss).backward()

    def prepare(self, number):
        betas = [ema.rule.beta(number + 1, 0, 0) for ema in self.emas]
        self.optimizer.prepare(1e-2 / (1 + number), betas)

    def step(self, number, spoilt=False):
        self.prepare(number)
        self.backward(number)
        if spoilt:
            self.weights[2].grad.view(-1)[7] = math.inf
        self.optimizer.step()

    def tensors(self):
        self.optimizer.wait()
        found = [w.detach() for w in self.weights] + [x for e in self.emas for x in e.average]
        return [x.clone() for x in found]


@pytest.mark.parametrize("kind", TORCH_KINDS)
@pytest.mark.parametrize("scale", [None, 8.0])
@needs_extension
def test_all_train_alike(kind, scale, monkeypatch):
    """Learning rates, clipping, EMAs, a skipped step, the loss scale: the same calls, the same numbers."""
    options = {"kind": kind, "scale": scale, "growth_interval": 3}
    sides = [Side(monkeypatch, which, **options) for which in ("torch", "fused", "offload")]
    for number in range(8):
        for side in sides:
            before = side.tensors()
            side.step(number, spoilt=number == 3)
            same = all(map(torch.equal, before, side.tensors()))
            assert same == (number == 3)
            assert side.optimizer.grad_norm.isfinite() == (number != 3)
    states = [side.optimizer.loss_scale.state_dict() for side in sides]
    assert states[0] == states[1] == states[2]
    assert bool(states[0]) == sides[0].optimizer.loss_scale.is_enabled() == (scale is not None)
    norms = [side.optimizer.grad_norm.item() for side in sides]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)
    for side in sides[1:]:
        for ours, theirs in zip(side.tensors(), sides[0].tensors(), strict=True):
            # A handful of steps, each off by a few roundings of values of size 1.
            torch.testing.assert_close(ours, theirs, rtol=1e-6 * 8, atol=1e-6)


@pytest.mark.parametrize("kind", ["radam", "adam"])
@pytest.mark.parametrize("which", ["torch", pytest.param("fused", marks=needs_extension)])
def test_optimizers_take_the_phases_constants(kind, which, monkeypatch):
    config = EctConfig(optimizer=kind, lr=3e-4, betas=(0.8, 0.95))
    if which == "torch":
        monkeypatch.setattr("tcm_fast.optim.extension_for", lambda name, device: None)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], config)
    assert isinstance(optimizer, FusedOptimizer if which == "fused" else TORCH_KINDS[kind])
    assert kind_of(optimizer) == TORCH_KINDS[kind].__name__
    group = optimizer.param_groups[0]
    values = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
    assert values == [3e-4, (0.8, 0.95), 1e-8, 0.0]
    optimizer.prepare(0.5)
    assert group["lr"] == 0.5
    assert EdmConfig().optimizer == "adam"


def test_what_only_the_extension_can_do_is_refused(monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    weights = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="moments: bf16 needs the extension"):
        build_optimizer(weights, EctConfig(), moments="bf16")
    with pytest.raises(ValueError, match="offload: needs the extension"):
        build_optimizer(weights, EctConfig(), offload=True)


def test_torchs_step_is_torchs(monkeypatch):
    """Bit for bit what its optimizer, GradScaler and clipping do when called one after another."""
    ours = Side(monkeypatch, "torch", scale=8.0, growth_interval=2)
    assert isinstance(ours.optimizer, TorchOptimizer)
    weights = [torch.nn.Parameter(w.detach().clone()) for w in ours.weights]
    plain = torch.optim.RAdam(weights, foreach=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for number in range(7):
        ours.step(number, spoilt=number == 4)
        plain.param_groups[0]["lr"] = 1e-2 / (1 + number)
        plain.zero_grad()
        loss = sum((w * torch.cos(w + number)).sum() for w in weights)
        scaler.scale(loss).backward()
        if number == 4:
            weights[2].grad.view(-1)[7] = math.inf
        scaler.unscale_(plain)
        torch.nn.utils.clip_grad_norm_(weights, 2.0)
        scaler.step(plain)
        scaler.update()
        assert all(map(torch.equal, ours.weights, weights))
        assert ours.optimizer.loss_scale.state_dict() == scaler.state_dict()
    state = copy.deepcopy(plain.state_dict())
    ours.optimizer.load_state_dict(state)
    assert ours.optimizer.state_dict()["state"].keys() == state["state"].keys()


@pytest.mark.parametrize("spoilt", [False, True])
def test_emas_move_once_a_step_whether_run_or_replayed(spoilt, monkeypatch):
    side, twin = (Side(monkeypatch, "torch") for _ in range(2))
    side.step(0, spoilt)
    twin.step(0, spoilt)
    twin.optimizer.after_replay()  # the step was run, not replayed
    assert all(map(torch.equal, side.tensors(), twin.tensors()))
    side.step(1)
    twin.prepare(1)
    with torch.no_grad():  # what a replayed graph does
        for ours, theirs in zip(twin.weights, side.weights, strict=True):
            ours.copy_(theirs)
    twin.optimizer.after_replay()
    assert all(map(torch.equal, side.tensors(), twin.tensors()))


def test_a_step_that_memory_is_short_for_is_not_repeated(monkeypatch):
    side = Side(monkeypatch, "torch", kind="adam")

    def short(self):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.optim.Adam, "step", short)
    with pytest.raises(UnfinishedStepError, match=r"out of memory .* half of which may be done"):
        side.step(0)


@needs_extension
def test_checkpointed_state_goes_from_one_to_the_other(monkeypatch):
    for first, second in (("torch", "fused"), ("fused", "torch"), ("offload", "torch")):
        begun, wanted = Side(monkeypatch, first), Side(monkeypatch, first)
        for number in range(3):
            begun.step(number)
            wanted.step(number)
        goes_on = Side(monkeypatch, second)
        with torch.no_grad():
            for ours, theirs in zip(goes_on.weights, begun.weights, strict=True):
                ours.copy_(theirs)
        names = [[(str(k), w) for k, w in enumerate(s.weights)] for s in (begun, goes_on)]
        begun.optimizer.wait()
        saved = flatten_optimizer(begun.optimizer, names[0])
        restore_optimizer(goes_on.optimizer, names[1], saved)
        assert kind_of(goes_on.optimizer) == kind_of(begun.optimizer) == "RAdam"
        for number in range(3, 6):
            goes_on.step(number)
            wanted.step(number)
        for ours, theirs in zip(goes_on.weights, wanted.weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6 * 6, atol=1e-6)


def test_moments_of_8_bits_are_refused_by_torchs(monkeypatch):
    side = Side(monkeypatch, "torch")
    packed = {"3/exp_avg": torch.zeros(900, dtype=torch.uint8)}
    named = [(str(k), w) for k, w in enumerate(side.weights)]
    with pytest.raises(
        ValueError, match=r"saved state '3/exp_avg' must be \[100, 7\], got \[900\]"
    ):
        restore_optimizer(side.optimizer, named, packed)
