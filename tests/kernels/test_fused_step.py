"""The optimizer step: against torch's optimizers, clipping and GradScaler, against its reference in
float64, and what it must leave alone."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcm_fast.kernels import StepControl, StepOptions, StepTable, StepTensors, fused_step
from tcm_fast.kernels._backend import extension, extension_for
from tcm_fast.kernels.fused_step import fused_step_reference, store_step_options
from tcm_fast.kernels.normalized_copy import (
    normalized_copy,
    normalized_rows,
    projected_gradient,
    row_size,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHAPES = [(), (1,), (3,), (0,), (5, 0), (33, 7), (4, 3, 3, 3), (128,), (60, 151), (8192,), (16387,)]
KINDS = {
    "adam": StepOptions(1e-3),
    "adam-decay": StepOptions(1e-3, weight_decay=0.1),
    "adamw": StepOptions(1e-3, weight_decay=0.1, decoupled=True),
    "radam": StepOptions(1e-3, kind="radam"),
    "radam-decay": StepOptions(1e-3, betas=(0.8, 0.99), weight_decay=0.1, kind="radam"),
}

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the extension: not built")


def uneven(*shape, dtype=torch.float32, generator=None):
    """Random, and 4 bytes away from any 16-byte boundary."""
    numel = math.prod(shape)
    base = torch.empty(numel + 5, dtype=dtype)
    offset = next(i for i in range(1, 5) if (base.data_ptr() + i * base.itemsize) % 16)
    return base[offset : offset + numel].view(shape).normal_(generator=generator)


def tensors_like(shapes, *, emas=1, copy=torch.float16, dtype=torch.float32, seed=0):
    """Parameters of many shapes and layouts with everything that a step can change."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, shape in enumerate(shapes):
        param = (
            uneven(*shape, generator=generator)
            if i % 3 == 2
            else torch.empty(shape).normal_(generator=generator)
        )
        if param.ndim == 4:
            param = param.to(memory_format=torch.channels_last)
        param = param.to(dtype)
        found.append(
            StepTensors(
                param,
                grad=torch.empty_like(param).normal_(generator=generator),
                exp_avg=torch.zeros_like(param),
                exp_avg_sq=torch.zeros_like(param),
                step=torch.zeros(()),
                emas=tuple(param.clone() for _ in range(emas)),
                copy=None if copy is None else torch.full_like(param, math.nan, dtype=copy),
            )
        )
    return found


def state_of(tensors):
    """Copies of everything that a step may change."""
    return [
        x.clone()
        for t in tensors
        for x in (t.param, t.exp_avg, t.exp_avg_sq, t.step, *t.emas, t.copy)
        if x is not None
    ]


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        a, b = (x.reshape(-1).view(torch.uint8) for x in (a, b))
        assert torch.equal(a, b)


def as_dtype(tensors, dtype):
    """Another copy, in float64 for an oracle."""

    def copied(x):
        return None if x is None else x.detach().clone().to(dtype)

    return [
        StepTensors(
            copied(t.param),
            copied(t.grad),
            copied(t.exp_avg),
            copied(t.exp_avg_sq),
            None if t.step is None else t.step.clone(),
            tuple(copied(a) for a in t.emas),
            None if t.copy is None else t.copy.clone(),
            t.group,
            t.normalized,
        )
        for t in tensors
    ]


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copy", [torch.float16, torch.bfloat16])
def test_against_the_float64_oracle(kind, copy, monkeypatch, check_against_oracle):
    """Twelve steps: RAdam's unadapted ones and some of the others."""
    ours = tensors_like(SHAPES, emas=2, copy=copy)
    plain, oracle = as_dtype(ours, torch.float32), as_dtype(ours, torch.float64)
    controls = [StepControl.on(CPU, 1024.0) for _ in range(3)]
    table = StepTable()
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    options = dict(ema_decays=(0.9, 0.25), max_norm=30.0)
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        for a, b, c in zip(ours, plain, oracle, strict=True):
            a.grad = torch.empty_like(a.param).normal_(generator=generator) * 300
            b.grad, c.grad = a.grad.clone(), a.grad.double()
        fused_step(ours, [KINDS[kind]], controls[0], table=table, **options)
        fused_step_reference(plain, [KINDS[kind]], controls[1], **options)
        fused_step_reference(oracle, [KINDS[kind]], controls[2], **options)
    for i, (a, b, c) in enumerate(zip(ours, plain, oracle, strict=True)):
        for name in ("param", "exp_avg", "exp_avg_sq"):
            got = [getattr(t, name) for t in (a, b, c)]
            check_against_oracle(*got, what=f"{name} of tensor {i}")
        for k in range(2):
            check_against_oracle(a.emas[k], b.emas[k], c.emas[k], what=f"average {k}")
        assert a.step == b.step == 12
        assert torch.equal(a.copy, a.param.to(copy))
    norms = [control.norm.item() for control in controls]
    assert norms[0] == pytest.approx(norms[2], rel=1e-6)
    assert norms[2] > 30 / 1024


@pytest.mark.slow_emulated
@pytest.mark.parametrize("kind", ["radam", "adam", "adamw"])
def test_two_hundred_steps_equal_torchs(kind):
    """torch's optimizer, clip_grad_norm_, GradScaler and a plain average on recorded gradients."""
    classes = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    ours = tensors_like([s for s in SHAPES if 0 not in s], copy=None)
    theirs = [torch.nn.Parameter(t.param.clone()) for t in ours]
    average = [p.detach().clone() for p in theirs]
    optimizer = classes[kind](theirs, lr=3e-3, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=20)
    scaler.scale(torch.zeros(()))
    control, table = StepControl.on(CPU, 64.0, interval=20), StepTable()
    shared = "radam" if kind == "radam" else "adam"
    generator = torch.Generator().manual_seed(1)
    for step in range(200):
        rate = 3e-3 / math.sqrt(1 + step / 50)
        beta = (1 - 1 / (step + 1)) ** 7.94
        bad = step % 37 == 3
        for t, p in zip(ours, theirs, strict=True):
            t.grad = torch.empty_like(p.detach()).normal_(generator=generator)
            t.grad *= scaler.get_scale() * (1 + step % 5) * 0.02
            if bad and p.ndim == 4:
                t.grad[1, 2, 0, 1] = math.inf if step % 2 else math.nan
            p.grad = t.grad.clone()
        options = StepOptions(rate, weight_decay=0.01, kind=shared, decoupled=kind == "adamw")
        fused_step(ours, [options], control, ema_decays=[beta], max_norm=5.0, table=table)
        optimizer.param_groups[0]["lr"] = rate
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 5.0)
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert control.norm.isnan()
        else:
            assert control.norm.item() == pytest.approx(norm.item(), rel=1e-5)
            torch._foreach_lerp_(average, [p.detach() for p in theirs], 1 - beta)
        assert control.scale.item() == scaler.get_scale()
        assert control.tracker.item() == scaler._growth_tracker.item()
    assert control.skips.item() == 6
    for t, p, a in zip(ours, theirs, average, strict=True):
        assert (t.param - p.detach()).norm() <= 1e-6 * p.detach().norm()
        assert (t.emas[0] - a).norm() <= 1e-6 * a.norm()
        assert t.step == optimizer.state[p]["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            theirs_now = optimizer.state[p][key]
            assert (getattr(t, key) - theirs_now).norm() <= 2e-6 * theirs_now.norm()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_a_gradient_that_is_not_finite_changes_no_bit(bad, where, backend, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", backend)
    tensors = tensors_like(SHAPES)
    control, table = StepControl.on(CPU, 256.0), StepTable()
    options = dict(ema_decays=[0.5], table=table)
    fused_step(tensors, [KINDS["adamw"]], control, **options)
    for t in tensors:
        if t.param.numel() == 0:
            continue
        before = state_of(tensors)
        kept = t.grad.clone()
        t.grad[(where,) * t.param.ndim] = bad
        fused_step(tensors, [KINDS["adamw"]], control, **options)
        assert_same_bits(state_of(tensors), before)
        assert control.norm.isnan()
        t.grad.copy_(kept)
    assert control.skips.item() == sum(t.param.numel() > 0 for t in tensors)
    assert control.scale.item() == 256 * 0.5 ** control.skips.item()
    fused_step(tensors, [KINDS["adamw"]], control, **options)
    assert control.norm.isfinite()
    assert tensors[0].step == 2


def test_squares_that_overflow_are_no_skip():
    """clip_grad_norm_ has an infinite norm there and scales the gradient to nothing."""
    tensors = tensors_like([(100,)], emas=0, copy=None)
    tensors[0].grad.fill_(1e30)
    control = StepControl.on(CPU)
    before = tensors[0].param.clone()
    fused_step(tensors, [KINDS["adam"]], control, max_norm=1.0)
    assert control.norm.item() in (math.inf, pytest.approx(1e31))
    assert control.skips.item() == 0
    assert tensors[0].param.isfinite().all()
    assert (tensors[0].param - before).abs().max() < 2e-3


def test_the_same_bits_whatever_the_threads_and_again():
    results = []
    for threads in (1, 2, 3, 1):
        tensors, control = tensors_like([*SHAPES, (300, 301)]), StepControl.on(CPU)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                fused_step(tensors, [KINDS["radam"]], control, ema_decays=[0.9], max_norm=0.1)
        finally:
            torch.set_num_threads(before)
        results.append([*state_of(tensors), control.norm])
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_copies_round_as_torch_does(dtype):
    """Every exponent, ties and their neighbours, both signs; the weights do not move."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2**31, (200_000,), generator=generator, dtype=torch.int64)
    exact = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()]
    ties = (exact + exact.nextafter(torch.tensor(1e38)).to(dtype).float()) / 2
    halfway = torch.cat([exact.view(torch.int32) + d for d in (4095, 4096, 4097, 32767, 32768)])
    values = torch.cat(
        [bits.to(torch.int32).view(torch.float32), exact, ties, halfway.view(torch.float32)]
    )
    values = torch.cat([values, -values])
    values = values[values.isfinite()]
    tensors = [StepTensors(values.clone(), copy=torch.zeros_like(values, dtype=dtype))]
    fused_step(tensors, [KINDS["adam"]], StepControl.on(CPU))
    assert torch.equal(tensors[0].copy, values.to(dtype))


def test_without_gradient_only_averages_and_copy_follow():
    tensors = tensors_like([(40,), (3, 3)])
    still = tensors[1]
    still.grad = still.exp_avg = still.exp_avg_sq = still.step = None
    still.emas[0].zero_()
    before = still.param.clone()
    fused_step(tensors, [KINDS["radam"]], StepControl.on(CPU), ema_decays=[0.75])
    assert torch.equal(still.param, before)
    torch.testing.assert_close(still.emas[0], 0.25 * before)
    assert torch.equal(still.copy, before.half())
    assert tensors[0].step == 1


def test_groups_have_their_own_options():
    tensors = tensors_like([(50,), (60,)], emas=0, copy=None)
    tensors[1].group = 1
    alone = as_dtype(tensors[1:], torch.float32)
    alone[0].group = 0
    groups = [StepOptions(0.0), StepOptions(1e-2, betas=(0.5, 0.9), eps=1e-3)]
    before = tensors[0].param.clone()
    fused_step(tensors, groups, StepControl.on(CPU))
    fused_step(alone, groups[1:], StepControl.on(CPU))
    assert torch.equal(tensors[0].param, before)
    assert torch.equal(tensors[1].param, alone[0].param)


def test_tensors_that_move_are_found_again():
    tensors, control, table = tensors_like(SHAPES), StepControl.on(CPU), StepTable()
    twin = as_dtype(tensors, torch.float32)
    for step in range(4):
        for t in tensors:
            t.grad = t.grad.clone()
            if step == 2:
                t.param.data = t.param.data.clone()
                t.exp_avg = t.exp_avg.clone()
                t.emas = tuple(a.clone() for a in t.emas)
        fused_step(tensors, [KINDS["radam"]], control, ema_decays=[0.9], table=table)
        fused_step(twin, [KINDS["radam"]], StepControl.on(CPU), ema_decays=[0.9])
    assert_same_bits(state_of(tensors), state_of(twin))
    host = table.host
    fused_step(tensors, [KINDS["radam"]], control, ema_decays=[0.9], table=table)
    assert table.host is host


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
    emas=st.integers(0, 3),
    max_norm=st.sampled_from([1e-3, 1.0, math.inf]),
    scale=st.sampled_from([None, 0.5, 3.0, 65536.0]),
    seed=st.integers(0, 99),
)
def test_any_sizes_and_options_agree_with_the_reference(sizes, kind, emas, max_norm, scale, seed):
    ours = tensors_like([(size,) for size in sizes], emas=emas, seed=seed)
    oracle = as_dtype(ours, torch.float64)
    options = dict(ema_decays=[0.3 * k for k in range(emas)], max_norm=max_norm)
    controls = StepControl.on(CPU, scale), StepControl.on(CPU, scale)
    for _ in range(2):
        fused_step(ours, [KINDS[kind]], controls[0], **options)
        fused_step_reference(oracle, [KINDS[kind]], controls[1], **options)
    for a, b in zip(ours, oracle, strict=True):
        for name in ("param", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                getattr(a, name).double(), getattr(b, name), rtol=1e-4, atol=1e-5
            )
        for x, y in zip(a.emas, b.emas, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


# ---- moments of 16 bits -------------------------------------------------------------------------


def with_short_moments(tensors):
    for t in tensors:
        t.exp_avg, t.exp_avg_sq = t.exp_avg.bfloat16(), t.exp_avg_sq.bfloat16()
    return tensors


@pytest.mark.parametrize("kind", ["adam", "radam-decay"])
def test_short_moments_are_the_references(kind):
    """The same random bits: a moment differs where the arithmetic before differs in its last place."""
    ours = with_short_moments(tensors_like(SHAPES))
    theirs = as_dtype(ours, torch.float32)
    with_short_moments(theirs)
    controls = [StepControl.on(CPU, seed=5) for _ in range(2)]
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.empty_like(a.param).normal_(generator=generator)
            b.grad = a.grad.clone()
            for key in ("exp_avg", "exp_avg_sq", "param"):
                getattr(b, key).copy_(getattr(a, key))
        fused_step(ours, [KINDS[kind]], controls[0], ema_decays=[0.9])
        fused_step_reference(theirs, [KINDS[kind]], controls[1], ema_decays=[0.9])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.param, b.param, rtol=1e-6, atol=1e-7)
            for key in ("exp_avg", "exp_avg_sq"):
                x, y = getattr(a, key), getattr(b, key)
                assert x.dtype == torch.bfloat16
                torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-30)
                assert (x != y).sum() <= 1 + 1e-3 * x.numel()


@pytest.mark.slow_emulated
def test_short_moments_go_on_where_rounding_to_the_nearest_stops():
    """A moving average by steps of 1/1000, in a format whose last place is 1/128."""
    tensors = with_short_moments(tensors_like([(4000,)], emas=0, copy=None))
    (t,) = tensors
    control, options = StepControl.on(CPU), StepOptions(0.0, betas=(0.99, 0.999))
    for _ in range(1000):
        t.grad.fill_(0.5)
        fused_step(tensors, [options], control)
    assert t.exp_avg_sq.float().mean().item() == pytest.approx(0.25 * (1 - 0.999**1000), rel=2e-3)
    assert t.exp_avg.float().mean().item() == pytest.approx(0.5 * (1 - 0.99**1000), rel=1e-3)


def test_short_moments_depend_on_the_seed_alone():
    results = []
    for seed, threads in ((1, 1), (1, 2), (2, 1)):
        tensors = with_short_moments(tensors_like([*SHAPES, (300, 301)]))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                control = StepControl.on(CPU, seed=seed)
                fused_step(tensors, [KINDS["radam"]], control, ema_decays=[0.9])
        finally:
            torch.set_num_threads(before)
        results.append(state_of(tensors))
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0][-5], results[2][-5])


# ---- normalised rows ----------------------------------------------------------------------------

# Rows aligned and not, longer than a run and than what a GPU's block keeps on chip, one and none.
ROWS = [(5, 7, 3, 3), (64, 32), (3, 130, 3, 3), (1, 1025), (2, 13827), (4, 2), (0, 8), (40, 12)]


def with_normalized_rows(tensors, copy=None):
    """Rows normalised as they are when a phase begins."""
    for t in tensors:
        t.normalized = True
        t.param.copy_(normalized_rows(t.param))
        if copy is not None:
            t.copy = torch.full_like(t.param, math.nan, dtype=copy)
    return tensors


class Edm2Layers:
    """What EDM2 does with its weights, by autograd in float64: normalised in place without gradient, then
    in the graph over √fan_in; Adam; EMA of the weights as they are after the update."""

    def __init__(self, tensors, options, beta):
        self.weights = [torch.nn.Parameter(t.param.double().contiguous()) for t in tensors]
        self.emas = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.Adam(self.weights, lr=options.lr, betas=options.betas)
        self.beta = beta

    @staticmethod
    def normalize(w):
        dims = list(range(1, w.ndim))
        return w / (1e-4 + w.square().mean(dims, keepdim=True).sqrt())

    def step(self, upstream, max_norm):
        """upstream: for each weight the loss's gradient with respect to what the layer multiplies by;
        returns the norm."""
        self.optimizer.zero_grad()
        for w, g in zip(self.weights, upstream, strict=True):
            with torch.no_grad():
                w.copy_(self.normalize(w))
            scaled = self.normalize(w) / math.sqrt(w[0].numel())
            (scaled * g).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, max_norm)
        self.optimizer.step()
        for a, w in zip(self.emas, self.weights, strict=True):
            a.lerp_(w.detach(), 1 - self.beta)
        return norm.item()


@pytest.mark.slow_emulated
@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("copy", [torch.float16, torch.bfloat16, torch.float32])
def test_fifty_steps_are_edm2s(copy, backend, monkeypatch):
    """Weights, EMA, moments (so gradients too) and the norm, to fp32's last places."""
    monkeypatch.setenv("TCM_FAST_BACKEND", backend)
    shapes = [shape for shape in ROWS if shape[0]]
    ours = tensors_like(shapes)
    options, table = StepOptions(0.01, betas=(0.9, 0.99)), StepTable()
    theirs, control = Edm2Layers(ours, options, 0.75), StepControl.on(CPU)
    with_normalized_rows(ours, copy)
    generator = torch.Generator().manual_seed(3)
    for step in range(50):
        for t in ours:
            t.grad = torch.empty_like(t.param).normal_(generator=generator)
            t.grad += 0.5 * t.param  # what the projection takes away
        upstream = [t.grad.double() for t in ours]
        norm = theirs.step(upstream, 4.0)
        fused_step(ours, [options], control, ema_decays=[0.75], max_norm=4.0, table=table)
        assert control.norm.item() == pytest.approx(norm, rel=2e-6)
        if step % 10 == 0:
            for t in ours:
                expected = Edm2Layers.normalize(t.param.double()) / math.sqrt(row_size(t.param))
                # Rounding to the copy's format, and of the row's norm: the reference sums n fp32 terms.
                norm_error = 3e-7 if backend == "kernel" else 2e-6
                room = expected.abs() * (torch.finfo(copy).eps / 2 + norm_error)
                fits = (t.copy.double() - expected).abs() <= room + torch.finfo(copy).tiny
                assert fits.all()
    for i, (t, w, a) in enumerate(zip(ours, theirs.weights, theirs.emas, strict=True)):
        state = theirs.optimizer.state[w]
        # Theirs is normalised when the next step begins.
        for got, expected in (
            (t.param, Edm2Layers.normalize(w.detach())),
            (t.emas[0], a),
            (t.exp_avg, state["exp_avg"]),
            (t.exp_avg_sq, state["exp_avg_sq"]),
        ):
            assert (got - expected).norm() <= 2e-6 * expected.norm(), i


@pytest.mark.parametrize("kind", ["adamw", "radam-decay"])
def test_normalized_rows_against_the_float64_oracle(kind, monkeypatch, check_against_oracle):
    """Beside tensors whose rows are not, with decay, a loss scale and clipping."""
    ours = with_normalized_rows(tensors_like(ROWS, emas=2), torch.float32)
    ours += tensors_like(SHAPES, emas=2)
    plain, oracle = as_dtype(ours, torch.float32), as_dtype(ours, torch.float64)
    controls = [StepControl.on(CPU, 64.0) for _ in range(3)]
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    options = dict(ema_decays=(0.9, 0.25), max_norm=2.0)
    table = StepTable()
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        for a, b, c in zip(ours, plain, oracle, strict=True):
            a.grad = torch.empty_like(a.param).normal_(generator=generator) * 50
            b.grad, c.grad = a.grad.clone(), a.grad.double()
        fused_step(ours, [KINDS[kind]], controls[0], table=table, **options)
        for tensors, control in ((plain, controls[1]), (oracle, controls[2])):
            fused_step_reference(tensors, [KINDS[kind]], control, **options)
    assert controls[0].norm.item() == pytest.approx(controls[2].norm.item(), rel=1e-6)
    for i, (a, b, c) in enumerate(zip(ours, plain, oracle, strict=True)):
        for name in ("param", "exp_avg", "exp_avg_sq"):
            got = [getattr(t, name) for t in (a, b, c)]
            check_against_oracle(*got, what=f"{name} of tensor {i}")
        for k in range(2):
            check_against_oracle(a.emas[k], b.emas[k], c.emas[k], what=f"average {k}")
        if a.normalized:
            copies = [normalized_copy(t.param) for t in (b, c)]
            check_against_oracle(a.copy, *copies, what=f"copy of tensor {i}")


def test_averages_see_rows_before_they_are_normalised():
    (t,) = with_normalized_rows(tensors_like([(6, 50)]))
    fused_step([t], [StepOptions(0.1)], StepControl.on(CPU), ema_decays=[0.0])
    torch.testing.assert_close(t.param, normalized_rows(t.emas[0]))
    assert (t.emas[0] - t.param).norm() > 1e-3 * t.param.norm()


def test_the_projected_gradient_is_autograds():
    generator = torch.Generator().manual_seed(0)
    for shape in [(5, 7, 3, 3), (4, 1), (3, 20)]:
        weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        (expected,) = torch.autograd.grad(normalized_copy(weight), weight, grad)
        torch.testing.assert_close(projected_gradient(grad, weight.detach()), expected)
    zero = torch.zeros(2, 3)
    torch.testing.assert_close(
        projected_gradient(zero + 1, zero), (zero + 1) / (1e-4 * math.sqrt(3))
    )


def test_rows_without_gradient_stay_and_are_copied():
    tensors = with_normalized_rows(tensors_like([(7, 33), (3, 8)], copy=torch.float16))
    (still, moved) = tensors
    still.param *= 3
    still.grad = still.exp_avg = still.exp_avg_sq = still.step = None
    before = still.param.clone()
    still.emas[0].zero_()
    fused_step(tensors, [KINDS["adam"]], StepControl.on(CPU), ema_decays=[0.75])
    assert torch.equal(still.param, before)
    torch.testing.assert_close(still.emas[0], 0.25 * before)
    torch.testing.assert_close(still.copy, normalized_copy(before).half())
    again = [StepTensors(moved.param, copy=moved.copy.clone(), normalized=True)]
    fused_step(again, [KINDS["adam"]], StepControl.on(CPU))
    assert torch.equal(again[0].copy, moved.copy)  # a resumed run begins with the same bits


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_row_that_is_not_finite_changes_no_bit(bad):
    tensors = with_normalized_rows(tensors_like(ROWS))
    control, table = StepControl.on(CPU, 8.0), StepTable()
    fused_step(tensors, [KINDS["adam"]], control, ema_decays=[0.5], table=table)
    before = state_of(tensors)
    tensors[4].grad[1, -1] = bad
    fused_step(tensors, [KINDS["adam"]], control, ema_decays=[0.5], table=table)
    assert_same_bits(state_of(tensors), before)
    assert control.skips.item() == 1
    assert control.norm.isnan()
    assert control.scale.item() == 4


def test_rows_whose_squares_overflow_do_not_move():
    tensors = with_normalized_rows(tensors_like([(4, 30)]))
    tensors[0].grad.fill_(1e30)
    before, control = tensors[0].param.clone(), StepControl.on(CPU)
    fused_step(tensors, [KINDS["adam"]], control, ema_decays=[0.5], max_norm=1.0)
    assert control.skips.item() == 0
    assert tensors[0].param.isfinite().all()
    torch.testing.assert_close(tensors[0].param, before, rtol=0, atol=1e-2)


@pytest.mark.slow_emulated
def test_rows_have_the_same_bits_whatever_the_threads_and_again():
    results = []
    for threads in (1, 2, 1):
        tensors = with_normalized_rows(tensors_like([*ROWS, (300, 301)]), torch.bfloat16)
        with_short_moments(tensors[:3])
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                fused_step(tensors, [KINDS["adam"]], StepControl.on(CPU), ema_decays=[0.9])
        finally:
            torch.set_num_threads(before)
        results.append(state_of(tensors))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_short_moments_of_rows_are_the_references():
    ours = with_short_moments(with_normalized_rows(tensors_like(ROWS)))
    theirs = as_dtype(ours, torch.float32)
    with_short_moments(theirs)
    for tensors, step in ((ours, fused_step), (theirs, fused_step_reference)):
        step(tensors, [KINDS["adam"]], StepControl.on(CPU, seed=5), ema_decays=[0.9])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.param, b.param, rtol=1e-6, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            x, y = getattr(a, key), getattr(b, key)
            torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-30)
            assert (x != y).sum() <= 1 + 1e-3 * x.numel()


def test_a_copy_for_frozen_networks():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight.to(memory_format=torch.channels_last)
    for dtype in (None, torch.float16, torch.bfloat16):
        copied = normalized_copy(weight, dtype)
        assert copied.dtype == (dtype or torch.float32)
        assert copied.stride() == weight.stride()
        norms = copied.double().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(6).double(), rtol=3e-3, atol=0)
    short = normalized_copy(weight.half())
    assert short.dtype == torch.float16
    torch.testing.assert_close(short, normalized_copy(weight.half().float()).half())
    for bad in (torch.ones(3), torch.ones(3, 0)):
        with pytest.raises(ValueError, match="normalized_copy: weight must have rows, got"):
            normalized_copy(bad)


# ---- refusals -----------------------------------------------------------------------------------


def replace_with(**changes):
    def change(tensors):
        for name, value in changes.items():
            setattr(tensors[1], name, value)

    return change


def transposed_rows(t):
    """Everything laid out column by column."""
    for name in ("param", "grad", "exp_avg", "exp_avg_sq", "copy"):
        setattr(t, name, getattr(t, name).t().contiguous().t())
    t.emas, t.normalized = (t.param.clone(),), True


@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_with(grad=torch.zeros(6)), r"grad of tensor 1 must be .*\[4, 6\].* got .*\[6\]"),
        (replace_with(grad=torch.zeros(4, 6).double()), "grad of tensor 1 must be torch.float32"),
        (replace_with(grad=torch.zeros(6, 4).t()), "grad of tensor 1 must have the strides"),
        (replace_with(exp_avg=None), "exp_avg, exp_avg_sq and step of tensor 1 must come with"),
        (
            replace_with(exp_avg=torch.zeros(4, 6).half()),
            "exp_avg of tensor 1 must be torch.float32",
        ),
        (
            replace_with(exp_avg=torch.zeros(4, 6).bfloat16()),
            "exp_avg_sq of tensor 1 must be .*bf?l",
        ),
        (replace_with(step=torch.zeros((), dtype=torch.int64)), "step of tensor 1 must be an fp32"),
        (replace_with(emas=()), "emas of tensor 1 must be 1, got 0"),
        (replace_with(copy=torch.zeros(4, 6)), "copy of tensor 1 must be fp16 or bf16"),
        (replace_with(copy=torch.zeros(6).half()), "copy of tensor 1 must have the shape"),
        (
            replace_with(normalized=True, copy=torch.zeros(4, 6).double()),
            "copy of tensor 1 must be fp16, bf16 or fp32",
        ),
        (replace_with(group=1), "group of tensor 1 must be below 1, got 1"),
        (replace_with(param=torch.zeros(4, 12)[:, ::2]), "param of tensor 1 must be dense"),
        (
            lambda tensors: transposed_rows(tensors[1]),
            r"param of tensor 1 must have rows, one after another in memory, .* got \[4, 6\]",
        ),
        (
            lambda tensors: setattr(tensors[0], "normalized", True),
            "param of tensor 0 must have rows",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, backend, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", backend)
    tensors = tensors_like([(3,), (4, 6)])
    change(tensors)
    with pytest.raises(ValueError, match=f"fused_step: {message}"):
        fused_step(tensors, [KINDS["adam"]], StepControl.on(CPU), ema_decays=[0.9])


@pytest.mark.parametrize(
    ("options", "rest", "message"),
    [
        (StepOptions(-1.0), {}, "lr must be finite and not negative, got -1.0"),
        (StepOptions(math.nan), {}, "lr must be finite and not negative, got nan"),
        (StepOptions(1.0, betas=(0.9, 1.0)), {}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        (StepOptions(1.0, kind="sgd"), {}, "kind must be adam or radam, got sgd"),
        (StepOptions(1.0), {"ema_decays": ()}, "ema_decays must be one for each of 1"),
        (StepOptions(1.0), {"ema_decays": (1.5,)}, r"ema_decays must be in \[0, 1\]"),
        (StepOptions(1.0), {"max_norm": 0.0}, "max_norm must be positive, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, rest, message):
    arguments = {"ema_decays": (0.9,), **rest}
    with pytest.raises(ValueError, match=f"fused_step: {message}"):
        fused_step(tensors_like([(3,)]), [options], StepControl.on(CPU), **arguments)


def test_a_control_that_does_not_fit_is_refused():
    control = StepControl.on(CPU, 1.0)
    control.scale = control.scale.double()
    with pytest.raises(ValueError, match=r"control.scale must be a torch.float32 scalar on cpu"):
        fused_step(tensors_like([(3,)], emas=0), [KINDS["adam"]], control)
    control.scale = None
    with pytest.raises(ValueError, match=r"control.scale and control.tracker must come together"):
        fused_step(tensors_like([(3,)], emas=0), [KINDS["adam"]], control)


def test_no_tensors_is_no_error():
    fused_step([], [], StepControl.on(CPU))
    store_step_options([], [], StepControl.on(CPU), table=StepTable())


def test_the_binding_checks_what_it_is_given():
    from tcm_fast import _C as ext  # itself, whatever stands in for it elsewhere

    row = torch.zeros(1, 11, dtype=torch.int64)
    row[0, 6] = 4
    for change, message in (
        ({}, "addresses must not be null, got 0 in row 0"),
        ({0: 64, 10: 64, 1: 64}, "a gradient needs its moments and step count, got none in row 0"),
        ({0: 64, 10: 64, 7: 2}, "no such group in row 0"),
        ({0: 64, 10: 64, 6: -1}, "sizes must not be negative, got one in row 0"),
        ({0: 68, 10: 64, 8: 1}, "an address is not aligned as the flags say in row 0"),
        ({0: 64, 10: 64, 9: 3}, "elements must be whole rows, got others in row 0"),
        ({0: 64, 10: 64, 6: 6, 8: 1, 9: 3}, "an address is not aligned as the flags say in row 0"),
        ({0: 64, 10: 64, 8: 8}, "only normalised rows have fp32 copies, got one in row 0"),
    ):
        table = row.clone()
        for field, value in change.items():
            table[0, field] = value
        with pytest.raises(ValueError, match=f"fused_step_check: {message}"):
            ext.fused_step_check(table.data_ptr(), 1, 1, 1)
    with pytest.raises(ValueError, match="fused_step_cpu: scale and tracker must come together"):
        ext.fused_step_cpu(0, 0, 0, 64, 0, 64, 64, 64, 0, 1)
    with pytest.raises(ValueError, match="fused_step_cpu: addresses must not be null"):
        ext.fused_step_cpu(0, 0, 0, 0, 0, 64, 64, 0, 0, 1)


# ---- other machines and builds ------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does(monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    cuda = torch.device("cuda")
    assert extension_for("fused_step", cuda) is not None
    ours = tensors_like([*SHAPES, (700, 1001)], emas=2)
    theirs = [
        StepTensors(
            *(x.cuda() for x in (t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.step)),
            emas=tuple(a.cuda() for a in t.emas),
            copy=t.copy.cuda(),
        )
        for t in ours
    ]
    controls, tables = (
        (StepControl.on(CPU, 4.0), StepControl.on(cuda, 4.0)),
        (StepTable(), StepTable()),
    )
    for _ in range(8):
        for tensors, control, table in zip((ours, theirs), controls, tables, strict=True):
            fused_step(
                tensors, [KINDS["radam"]], control, ema_decays=(0.9, 0.2), max_norm=1.0,
                table=table,
            )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(b.param.cpu(), a.param, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(b.emas[1].cpu(), a.emas[1], rtol=1e-6, atol=1e-7)
        assert torch.equal(b.copy, b.param.half())
        assert b.step == a.step
    before = [t.param.clone() for t in theirs]
    theirs[-1].grad[5, 5] = math.inf
    fused_step(theirs, [KINDS["radam"]], controls[1], ema_decays=(0.9, 0.2), table=tables[1])
    assert_same_bits([t.param.cpu() for t in theirs], [x.cpu() for x in before])
    assert controls[1].skips.item() == 1
    assert controls[1].scale.item() == 2.0


@pytest.mark.gpu
def test_a_gpu_normalises_rows_as_the_cpu_does(monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    ours = with_normalized_rows(tensors_like(ROWS, emas=2), torch.float32)
    ours += tensors_like(SHAPES, emas=2)
    theirs = [
        StepTensors(
            *(x.cuda() for x in (t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.step)),
            emas=tuple(a.cuda() for a in t.emas),
            copy=t.copy.cuda(),
            normalized=t.normalized,
        )
        for t in ours
    ]
    controls = StepControl.on(CPU, 4.0), StepControl.on("cuda", 4.0)
    tables = StepTable(), StepTable()
    options = dict(ema_decays=(0.9, 0.2), max_norm=1.0)
    for _ in range(8):
        for tensors, control, table in zip((ours, theirs), controls, tables, strict=True):
            fused_step(tensors, [KINDS["adam"]], control, table=table, **options)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in ((a.param, b.param), (a.emas[0], b.emas[0]), (a.copy, b.copy)):
            torch.testing.assert_close(y.cpu(), x, rtol=1e-5, atol=1e-6)
    before = [t.param.clone() for t in theirs]
    theirs[2].grad[1, 5] = math.nan
    fused_step(theirs, [KINDS["adam"]], controls[1], table=tables[1], **options)
    assert_same_bits([t.param.cpu() for t in theirs], [x.cpu() for x in before])
    assert controls[1].skips.item() == 1


@pytest.mark.gpu
def test_a_captured_step_replays():
    tensors = [
        StepTensors(*(x.cuda() for x in (t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.step)))
        for t in tensors_like(SHAPES, emas=0)
    ]
    control, table = StepControl.on("cuda"), StepTable()
    for _ in range(2):
        fused_step(tensors, [StepOptions(1e-3)], control, table=table)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with table.capturing(), torch.cuda.graph(graph):
        for t in tensors:
            t.grad = t.grad.clone()
        fused_step(tensors, [StepOptions(1e-3)], control, table=table)
    for rate in (1e-3, 0.0):
        before = [t.param.clone() for t in tensors]
        store_step_options(tensors, [StepOptions(rate)], control, table=table)
        graph.replay()
        moved = any(not torch.equal(t.param, b) for t, b in zip(tensors, before, strict=True))
        assert moved == (rate > 0)
    assert tensors[0].step == 4


def build_program(tmp_path, sanitize, *arguments):
    """A C++ program, or a skip where there is no compiler or no library of its sanitizers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: none found")
    flags = f"-std=c++17 -O1 -g -fsanitize={sanitize} -fno-sanitize-recover=all -ffp-contract=off"
    probe, program = tmp_path / "probe.cpp", tmp_path / "program"
    probe.write_text("int main() {}\n")
    if subprocess.run([compiler, *flags.split(), probe, "-o", program]).returncode:
        pytest.skip(f"needs the compiler's sanitizer libraries ({sanitize}): not installed")
    command = [compiler, *flags.split(), f"-I{ROOT / 'csrc'}", *arguments, "-o", program]
    subprocess.run(command, check=True)
    return program


@pytest.mark.slow
def test_the_cpu_half_is_clean_under_the_sanitizers(tmp_path):
    sources = [ROOT / "tests/kernels/sanitized.cpp", *sorted(ROOT.glob("csrc/*_cpu.cpp"))]
    program = build_program(tmp_path, "address,undefined", "-fopenmp", *sources)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "clean\n"), ran.stderr


def emulated(folder, name, *sources):
    """A program with the CUDA half's source compiled for the host, threads in the place of a GPU's."""
    cuda = (ROOT / "csrc/fused_step_cuda.cu").read_text()
    cuda, launches = re.subn(r"(\w+)<<<(.*?)>>>\(", r"emulate(\1, \2)(", cuda)
    assert launches == 5
    cuda = cuda.replace(
        "extern __shared__ float4 kept[];",
        "float4* kept = reinterpret_cast<float4*>(dynamic_shared);",
    )
    (folder / "fused_step_cuda.inc").write_text(cuda)
    headers = ROOT / "tests/kernels/emulated"
    return build_program(
        folder,
        "undefined",
        *("-DTCM_FAST_WITH_CUDA", "-pthread", f"-I{headers}", f"-I{folder}"),
        *(headers / name, *sources),
    )


@pytest.mark.slow
def test_the_cuda_half_computes_what_the_cpu_half_does_where_threads_stand_for_a_gpus(tmp_path):
    """The same bits, but for orders of summation."""
    program = emulated(tmp_path, "fused_step.cpp", ROOT / "csrc/fused_step_cpu.cpp")
    ran = subprocess.run([program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "equal\n"), ran.stdout + ran.stderr


@pytest.mark.slow
def test_the_bytes_that_a_parameter_moves(tmp_path):
    """42 for fp32 Adam or RAdam with clipping, an average and a 16-bit copy, 46 where rows are normalised:
    the norm needs gradients twice, and projected ones weights too."""
    ran = subprocess.run([emulated(tmp_path, "bytes.cpp")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    counted = [line.split() for line in ran.stdout.splitlines()]
    assert len(counted) == 8
    assert {int(count) for rows, count in counted if rows == "0"} == {42}
    assert {int(count) for rows, count in counted if rows == "1"} == {46}
