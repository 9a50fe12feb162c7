"""The fused optimizer beside torch's."""

import copy
import math

import pytest
import torch

from tcm_fast.optim import fused
from tcm_fast.optim.ema import Ema
from tcm_fast.optim.fused import TORCH_KINDS, FusedOptimizer

SHAPES = [(3,), (), (8, 4, 3, 3), (16, 16, 1, 1), (100, 7)]


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    found[2] = found[2].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(value) for value in found]


def set_gradients(weights, step):
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight)


def run(optimizer, weights, first, last):
    for step in range(first, last):
        set_gradients(weights, step)
        optimizer.step()


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}


@pytest.mark.parametrize("kind", TORCH_KINDS)
def test_state_goes_to_torchs_optimizer_and_back(kind, either_backend):
    ours, theirs = parameters(), parameters()
    a = FusedOptimizer(ours, kind, **OPTIONS)
    b = TORCH_KINDS[kind](theirs, **OPTIONS)
    assert a.param_groups[0].keys() == b.param_groups[0].keys()
    run(a, ours, 0, 7)
    run(b, theirs, 0, 7)
    assert_close(ours, theirs)
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in (a, b)]
    assert saved[0]["state"][0].keys() == saved[1]["state"][0].keys()
    # Each continues what the other began, with options of its own that the saved ones replace.
    a, b = FusedOptimizer(ours, kind, lr=1.0), TORCH_KINDS[kind](theirs, lr=1.0)
    a.load_state_dict(saved[1])
    b.load_state_dict(saved[0])
    run(a, ours, 7, 14)
    run(b, theirs, 7, 14)
    assert_close(ours, theirs)
    assert a.state[ours[0]]["step"] == b.state[theirs[0]]["step"] == 14


def test_groups_schedulers_closures_and_missing_gradients(either_backend):
    ours, theirs = parameters(), parameters()
    optimizers = []
    for cls, weights in ((FusedOptimizer, ours), (torch.optim.RAdam, theirs)):
        groups = [{"params": weights[:2], "lr": 1e-3}, {"params": weights[2:], "betas": (0.5, 0.9)}]
        optimizer = cls(groups, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        optimizers.append(optimizer)
        for step in range(9):
            set_gradients(weights, step)
            if step % 2:
                weights[0].grad = weights[3].grad = None
            assert optimizer.step(lambda: 3.5) == 3.5
            schedule.step()
    assert_close(ours, theirs)
    assert [o.state[w[0]]["step"].item() for o, w in zip(optimizers, (ours, theirs), strict=True)] == [
        5, 5,
    ]  # fmt: skip
    extra = torch.nn.Parameter(torch.ones(4))
    optimizers[0].add_param_group({"params": [extra], "lr": 0.5})
    extra.grad = torch.ones(4)
    optimizers[0].step()
    assert (extra < 1).all()


def test_emas_and_copies_follow_in_the_same_step(either_backend):
    weights = parameters()
    emas = [Ema(rule, weights) for rule in ("constant:0.9", "power:6.94")]
    plain = [Ema(rule, weights) for rule in ("constant:0.9", "power:6.94")]
    copies = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights[:-1]] + [None]
    optimizer = FusedOptimizer(
        weights, "adam", lr=0.1, emas=[ema.average for ema in emas], copies=copies
    )
    for step in range(1, 6):
        set_gradients(weights, step)
        optimizer.ema_betas = [ema.rule.beta(step, 0, 0) for ema in emas]
        optimizer.step()
        for ema in plain:
            ema.update(step, 0, 0)
    for ours, theirs in zip(emas, plain, strict=True):
        for a, b in zip(ours.average, theirs.average, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for copied, weight in zip(copies[:-1], weights, strict=False):
        assert torch.equal(copied, weight.detach().bfloat16())


def test_gradients_and_moments_in_another_layout(either_backend):
    ours, theirs = parameters(), parameters()
    a, b = FusedOptimizer(ours), torch.optim.RAdam(theirs)
    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        ours[2].grad = ours[2].grad.contiguous()
        a.step()
        b.step()
        state = a.state[ours[2]]
        if step == 3:
            state["exp_avg"] = state["exp_avg"].contiguous()
    assert_close(ours, theirs)
    assert state["exp_avg"].stride() == ours[2].stride()


def test_the_loss_scale_is_a_grad_scalers(either_backend):
    """Its scale, its rules and its state dict, both ways."""
    ours, theirs = parameters(), parameters()
    a = FusedOptimizer(ours, "adam", max_norm=2.0, scale=8.0, growth_interval=3)
    b = torch.optim.Adam(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    for step in range(12):
        for weights, scale in ((ours, a.loss_scale), (theirs, scaler)):
            loss = sum((w * torch.cos(w + step)).sum() for w in weights)
            for weight in weights:
                weight.grad = None
            scale.scale(loss).backward()
            if step in (4, 5):
                weights[1].grad.fill_(math.inf)
        a.step()
        scaler.unscale_(b)
        torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        scaler.step(b)
        scaler.update()
        assert a.loss_scale.state_dict() == scaler.state_dict()
        if step == 7:
            saved = a.loss_scale.state_dict(), scaler.state_dict()
            a.loss_scale.load_state_dict(saved[1])
            scaler.load_state_dict(saved[0])
    assert_close(ours, theirs)
    assert a.skips == 2
    assert a.grad_norm.item() > 0


def test_state_of_the_loss_scale_fits_its_use():
    scaled = FusedOptimizer(parameters(), scale=8.0).loss_scale
    unscaled = FusedOptimizer(parameters()).loss_scale
    assert unscaled.state_dict() == {}
    assert unscaled.get_scale() == 1.0
    unscaled.load_state_dict({})
    for scale, state in ((unscaled, scaled.state_dict()), (scaled, {})):
        with pytest.raises(ValueError, match="loss scale: must be saved and in use alike"):
            scale.load_state_dict(state)


def test_gradients_are_not_held_between_steps():
    weights = parameters()
    optimizer = FusedOptimizer(weights)
    set_gradients(weights, 0)
    optimizer.step()
    optimizer.zero_grad()
    assert all(t.grad is None for t in optimizer._tensors)


def test_short_moments_are_saved_and_loaded(either_backend):
    """Bit for bit into another with short moments, widened into torch's, rounded from torch's."""
    weights, twins = parameters(), parameters()
    a = FusedOptimizer(weights, "adam", lr=1e-2, moments="bf16", seed=3)
    run(a, weights, 0, 5)
    for weight, twin in zip(weights, twins, strict=True):
        twin.data.copy_(weight.data)
    b = FusedOptimizer(twins, "adam", moments="bf16", seed=3)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    run(a, weights, 5, 9)
    run(b, twins, 5, 9)
    for weight, twin in zip(weights, twins, strict=True):
        assert torch.equal(weight, twin)
        for key in ("exp_avg", "exp_avg_sq"):
            assert a.state[weight][key].dtype == torch.bfloat16
            assert torch.equal(a.state[weight][key], b.state[twin][key])
    theirs = torch.optim.Adam(twins)
    theirs.load_state_dict(a.state_dict())
    assert theirs.state[twins[0]]["exp_avg"].dtype == torch.float32
    run(theirs, twins, 9, 10)
    b.load_state_dict(theirs.state_dict())
    run(b, twins, 10, 11)
    assert b.state[twins[0]]["exp_avg"].dtype == torch.bfloat16


def test_a_step_that_memory_is_short_for_can_be_repeated(monkeypatch):
    """Running out between a tensor's two moments leaves no half of a state."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = FusedOptimizer(weights, "adam", lr=0.1)
    for weight in weights:
        weight.grad = torch.ones(3)
    make, calls = fused.no_moment, []

    def short(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("full")
        return make(*arguments)

    monkeypatch.setattr(fused, "no_moment", short)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert torch.equal(weights[0], torch.ones(3))
    optimizer.step()
    for weight in weights:
        torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize(("short", "size"), [("bf16", 40), ("8bit", 64)])
def test_short_moments_train_as_well(short, size):
    """A least-squares problem: the loss after 300 steps is that of fp32 moments within 5 %."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(512, size, generator=generator) for _ in range(2))
    target = x @ torch.randn(size, size, generator=generator) + 0.3 * noise
    losses = {}
    for moments in ("fp32", short):
        weight = torch.nn.Parameter(torch.zeros(size, size))
        optimizer = FusedOptimizer([weight], "adam", lr=3e-2, betas=(0.9, 0.99), moments=moments)
        for _ in range(300):
            optimizer.zero_grad()
            rows = torch.randint(512, (64,), generator=generator)
            loss = (x[rows] @ weight - target[rows]).square().mean()
            loss.backward()
            optimizer.step()
        losses[moments] = (x @ weight - target).square().mean().item()
    assert losses[short] == pytest.approx(losses["fp32"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moments": "fp16"}, "optimizer: moments must be fp32, bf16 or 8bit, got fp16"),
        ({"kind": "sgd"}, "optimizer: kind must be radam, adam or adamw, got sgd"),
        ({"emas": [[]]}, r"optimizer: emas\[0\] must be 5 tensors, got 0"),
        ({"copies": [None]}, "optimizer: copies must be 5 tensors, got 1"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_what_the_fused_optimizer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedOptimizer(parameters(), **arguments)


def test_options_that_it_does_not_know_are_refused():
    weights = parameters()
    theirs = torch.optim.Adam(parameters(), amsgrad=True)
    ours = FusedOptimizer(weights, "adam")
    with pytest.raises(ValueError, match="optimizer: amsgrad must be false, got True"):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="optimizer: must have parameters, got none"):
        FusedOptimizer([])
    weights[0].grad = torch.zeros(3).to_sparse()
    with pytest.raises(ValueError, match="optimizer: gradients must be dense, got a sparse one"):
        ours.step()
    ema = Ema("constant:0.9", weights)
    ours = FusedOptimizer(weights, emas=[ema.average])
    with pytest.raises(ValueError, match="optimizer: a group must be there when emas"):
        ours.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    weights[0].grad = None
    with pytest.raises(ValueError, match="fused_step: ema_decays must be one for each of 1"):
        ours.step()
