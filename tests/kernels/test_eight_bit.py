"""Moments of 8 bits: the codes themselves, the optimizer's pass over them against its reference, and where
rounding to the nearest would stop."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcm_fast.kernels import StepControl, StepOptions, StepTensors, fused_step
from tcm_fast.kernels._backend import extension
from tcm_fast.kernels.eight_bit import (
    BLOCK,
    TOP,
    can_be_packed,
    pack_8_bits_reference,
    packed_size,
    unpack_8_bits_reference,
)
from tcm_fast.kernels.fused_step import fused_step_reference
from tcm_fast.kernels.normalized_copy import normalized_rows
from tcm_fast.optim.fused import FusedOptimizer

KEYS = list(TOP)
needs_extension = pytest.mark.skipif(extension() is None, reason="needs the extension: not built")


def spread(*shape, seed=0, decades=8.0):
    """Random signs, magnitudes over many decades."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape, generator=generator) * decades - decades
    return torch.randn(shape, generator=generator).sign() * 10**sizes


def there_and_back(x, key, row=0, words=0x8000):
    packed = pack_8_bits_reference(x, TOP[key], row, words)
    return packed, unpack_8_bits_reference(packed, x, TOP[key], row)


# ---- the codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_rounding_to_the_nearest_is_right_to_a_sixteenth(key):
    x = spread(40, BLOCK, decades=4.0 if key == "exp_avg" else 8.0)
    x = x if key == "exp_avg" else x.abs()
    _, y = there_and_back(x, key)
    assert ((x - y).abs() <= x.abs() / 16).all()
    assert (y.sign() == x.sign()).all()


@pytest.mark.parametrize("key", KEYS)
def test_every_code_is_a_value_that_stays(key):
    """Whatever the rest of its block does, and whatever the random bits are."""
    exponents = torch.tensor([32, 32, 200, 200], dtype=torch.uint8)
    codes = torch.arange(256).to(torch.uint8).repeat(2)
    packed = torch.cat([codes, exponents])
    values = unpack_8_bits_reference(packed, torch.empty(512), TOP[key])
    assert values.isfinite().all()
    if key == "exp_avg":  # -0 is 0
        assert (values.view(-1, 256)[:, 128:] == -values.view(-1, 256)[:, :128]).all()
    else:
        assert (values.view(2, 256)[0].diff() > 0).sum() > 250
    for words in (0, 0x8000, 0xFFFF):
        _, again = there_and_back(values, key, words=torch.full((512,), words))
        assert torch.equal(again, values)
    smaller = torch.where(codes & TOP[key] < 90, values, 0.0)  # blocks with other exponents
    assert torch.equal(there_and_back(smaller, key)[1], smaller)


@pytest.mark.parametrize("key", KEYS)
def test_random_rounding_is_unbiased(key):
    """Of 4096 times: to five standard errors, below the least magnitude too (the first moment's)."""
    base = torch.tensor([1.0, 0.3, 1.07, 0.0021, 3e-5, 4e-6, 1.99])
    base = torch.cat([base, -base]) if key == "exp_avg" else base
    times = 4096
    x = torch.zeros(times, BLOCK)
    x[:, : len(base)] = base
    words = torch.randint(0, 65536, x.shape, generator=torch.Generator().manual_seed(1))
    _, y = there_and_back(x, key, words=words)
    found = y[:, : len(base)].double()
    error = (found.mean(0) - base).abs()
    assert (error <= 5 * found.std(0) / math.sqrt(times) + 1e-9 * base.abs()).all()
    assert (found.std(0) > 0).sum() >= len(base) - 2  # 1.0 is a value of its own


def test_a_second_moment_is_never_rounded_to_zero():
    """A step divides by its root."""
    x = torch.full((BLOCK,), 1e-30)
    x[0], x[1] = 1.0, 0.0
    for words in (0, 0xFFFF):
        _, y = there_and_back(x, "exp_avg_sq", words=words)
        assert (y[2:] >= 1e-30).all()
        assert y[1] == 0


@pytest.mark.parametrize("key", KEYS)
def test_extremes(key):
    largest = torch.finfo(torch.float32).max
    for value in (0.0, 1e-45, 1e-38, 2.0**-95, 1.0, 3e38, largest, math.inf):
        x = torch.full((5,), value)
        _, y = there_and_back(x, key)
        if value <= 1e-38:
            assert (y.abs() <= 2.0**-95).all()
        elif value < 3e38:
            assert torch.equal(x, y)
        else:
            assert (y >= 2.9e38).all()


@given(
    numel=st.integers(0, 700),
    rows=st.integers(1, 5),
    key=st.sampled_from(KEYS),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_rows(numel, rows, key, seed):
    """Blocks are counted from each row's first element; a row is packed as if it were alone."""
    x = spread(rows, numel, seed=seed)
    x = x.abs() if key == "exp_avg_sq" else x
    packed, y = there_and_back(x, key, row=numel)
    assert packed.shape == (packed_size(x.numel(), numel),)
    assert packed.dtype == torch.uint8
    for row, back in zip(x, y, strict=True):
        assert torch.equal(there_and_back(row.contiguous(), key)[1], back)


def test_layout():
    x = spread(6, 8, 3, 3).to(memory_format=torch.channels_last)
    packed, y = there_and_back(x, "exp_avg")
    assert y.stride() == x.stride()
    flat = x.permute(0, 2, 3, 1).contiguous().flatten()
    assert torch.equal(packed, pack_8_bits_reference(flat, 127))


# ---- the pass -----------------------------------------------------------------------------------

SHAPES = [(4,), (128,), (8192,), (24, 16, 3, 3), (16388,), (60, 152)]
ROWS = [(5, 12), (3, 4, 3, 3), (7, 1028), (2, 13828), (4, 128)]
ADAM = StepOptions(1e-3)


def packed_tensors(shapes, *, normalized=False, copy=torch.float16):
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes:
        param = torch.randn(shape, generator=generator)
        param = param.to(memory_format=torch.channels_last) if param.ndim == 4 else param
        if normalized:
            param = normalized_rows(param)
        t = StepTensors(param, step=torch.zeros(()), emas=(param.clone(),), normalized=normalized)
        t.copy = torch.full_like(param, math.nan, dtype=copy)
        t.exp_avg, t.exp_avg_sq = (
            torch.zeros(packed_size(param.numel(), t.row), dtype=torch.uint8) for _ in KEYS
        )
        found.append(t)
    return found


def draw_gradients(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    for t in tensors:
        t.grad = torch.empty_like(t.param).normal_(generator=generator)


@needs_extension
@pytest.mark.parametrize("normalized", [False, True])
def test_the_pass_is_the_references(normalized):
    """The same random bits: a code differs where the arithmetic before differs in its last place, which
    happens to some two in a million (on two instruction sets)."""
    shapes = ROWS if normalized else SHAPES
    ours, theirs = (packed_tensors(shapes, normalized=normalized) for _ in range(2))
    controls = [StepControl.on("cpu", seed=5) for _ in range(2)]
    for step in range(6):
        draw_gradients(ours, step)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
            for key in ("param", *KEYS):
                getattr(b, key).copy_(getattr(a, key))
        fused_step(ours, [ADAM], controls[0], ema_decays=[0.9])
        fused_step_reference(theirs, [ADAM], controls[1], ema_decays=[0.9])
        codes = different = 0
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.param, b.param, rtol=2e-6, atol=1e-6)
            for key in KEYS:
                x, y = getattr(a, key), getattr(b, key)
                codes, different = codes + x.numel(), different + int((x != y).sum())
                x, y = (unpack_8_bits_reference(z, a.param, TOP[key], a.row) for z in (x, y))
                torch.testing.assert_close(x, y, rtol=1 / 7, atol=1e-5)
        assert different <= 3 + 1e-4 * codes


@needs_extension
def test_the_same_bits_whatever_the_threads():
    results = []
    for seed, threads in ((1, 1), (1, 2), (2, 1)):
        tensors = packed_tensors([*SHAPES, (300, 304)]) + packed_tensors(ROWS, normalized=True)
        control = StepControl.on("cpu", seed=seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for step in range(3):
                draw_gradients(tensors, step)
                fused_step(tensors, [ADAM], control, ema_decays=[0.9])
        finally:
            torch.set_num_threads(before)
        results.append([getattr(t, key) for t in tensors for key in ("param", *KEYS)])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


@pytest.mark.slow_emulated
@needs_extension
def test_moments_go_on_where_rounding_to_the_nearest_stops():
    """A moving average by steps of 1/1000, in a format whose last place is 1/8."""
    (t,) = packed_tensors([(16384,)])
    options = StepOptions(0.0, betas=(0.99, 0.999))
    control = StepControl.on("cpu")
    for _ in range(1000):
        t.grad = torch.full_like(t.param, 0.5)
        fused_step([t], [options], control, ema_decays=[0.9])
    first, second = (unpack_8_bits_reference(getattr(t, key), t.param, TOP[key]) for key in KEYS)
    assert second.mean().item() == pytest.approx(0.25 * (1 - 0.999**1000), rel=1e-2)
    assert first.mean().item() == pytest.approx(0.5, rel=1e-2)


@needs_extension
def test_a_gradient_that_is_not_finite_changes_nothing():
    tensors = packed_tensors(SHAPES)
    draw_gradients(tensors, 0)
    control = StepControl.on("cpu")
    fused_step(tensors, [ADAM], control, ema_decays=[0.9])
    before = [getattr(t, key).clone() for t in tensors for key in ("param", *KEYS)]
    tensors[2].grad[77] = math.nan
    fused_step(tensors, [ADAM], control, ema_decays=[0.9])
    after = [getattr(t, key) for t in tensors for key in ("param", *KEYS)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert control.skips == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: setattr(t, "exp_avg", t.exp_avg[:-1]),
            r"exp_avg of tensor 0 must be uint8 \[8256\]",
        ),
        (
            lambda t: setattr(t, "exp_avg_sq", torch.zeros(8192)),
            "exp_avg_sq of tensor 0 must be uint8",
        ),
        (
            lambda t: setattr(t, "exp_avg_sq", None),
            "exp_avg_sq of tensor 0 must be uint8 .* got none",
        ),
    ],
)
def test_refusals(change, message):
    tensors = packed_tensors([(8192,)])
    draw_gradients(tensors, 0)
    change(tensors[0])
    with pytest.raises(ValueError, match=message):
        fused_step(tensors, [ADAM], StepControl.on("cpu"), ema_decays=[0.9])


def test_sizes_that_the_kernels_do_not_take():
    assert not can_be_packed(8191)
    assert not can_be_packed(8192, 2)
    tensors = packed_tensors([(4098,)])
    draw_gradients(tensors, 0)
    with pytest.raises(ValueError, match="in rows of a multiple of 4 elements, got"):
        fused_step(tensors, [ADAM], StepControl.on("cpu"), ema_decays=[0.9])


@needs_extension
def test_a_place_that_is_not_aligned_is_refused():
    (t,) = packed_tensors([(8192,)])
    t.grad = torch.randn(8193)[1:]
    with pytest.raises(ValueError, match="8-bit moments must be aligned, got others in row 0"):
        fused_step([t], [ADAM], StepControl.on("cpu"), ema_decays=[0.9])


# ---- the optimizer ------------------------------------------------------------------------------


def weights_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(64, 64), (80, 9, 3, 3), (7,), (4099,), (4,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def run(optimizer, weights, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_small_and_uneven_tensors_keep_fp32(either_backend):
    weights = weights_of()
    optimizer = FusedOptimizer(weights, "adam", moments="8bit")
    run(optimizer, weights, 0, 1)
    kinds = [optimizer.state[w]["exp_avg"].dtype for w in weights]
    assert kinds == [torch.uint8, torch.uint8] + [torch.float32] * 3


def test_saved_loaded_and_given_to_torchs(either_backend):
    """A state dict is torch's, in fp32, and becomes the same values again."""
    weights, twins = weights_of(), weights_of()
    a = FusedOptimizer(weights, "adam", lr=1e-2, moments="8bit", seed=3)
    run(a, weights, 0, 5)
    for weight, twin in zip(weights, twins, strict=True):
        twin.data.copy_(weight.data)
    saved = copy.deepcopy(a.state_dict())
    assert all(saved["state"][k]["exp_avg"].shape == w.shape for k, w in enumerate(weights))
    assert a.state[weights[0]]["exp_avg"].dtype == torch.uint8
    b = FusedOptimizer(twins, "adam", moments="8bit", seed=3)
    b.load_state_dict(saved)
    run(a, weights, 5, 9)
    run(b, twins, 5, 9)
    for weight, twin in zip(weights, twins, strict=True):
        assert torch.equal(weight, twin)
        assert all(torch.equal(a.state[weight][key], b.state[twin][key]) for key in KEYS)
    theirs = torch.optim.Adam(twins)
    theirs.load_state_dict(a.state_dict())
    run(theirs, twins, 9, 10)
    b.load_state_dict(theirs.state_dict())
    run(b, twins, 10, 11)
    assert b.state[twins[0]]["exp_avg"].dtype == torch.uint8
    wide = FusedOptimizer(twins, "adam")
    wide.load_state_dict(b.state_dict())
    run(wide, twins, 11, 12)


def test_a_gradient_at_an_uneven_address_is_moved(either_backend):
    """As a bucket of DDP's may place it."""
    results = []
    for offset in (0, 1):
        weight = weights_of()[0]
        optimizer = FusedOptimizer([weight], "adam", moments="8bit")
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            place = torch.empty(weight.numel() + 1)[offset:][: weight.numel()]
            weight.grad = place.view_as(weight).normal_(generator=generator)
            optimizer.step()
        results.append(weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("normalized", [False, True])
def test_a_gpu_computes_what_the_cpu_does(normalized, monkeypatch):
    """Flat tensors bit for bit; along rows sums have another order, and a code may differ by it."""
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    shapes = ROWS if normalized else [*SHAPES, (700, 1000)]
    ours = packed_tensors(shapes, normalized=normalized)
    theirs = [
        StepTensors(
            t.param.cuda(), exp_avg=t.exp_avg.cuda(), exp_avg_sq=t.exp_avg_sq.cuda(),
            step=t.step.cuda(), emas=tuple(a.cuda() for a in t.emas), copy=t.copy.cuda(),
            normalized=normalized,
        )
        for t in ours
    ]  # fmt: skip
    controls = StepControl.on("cpu", seed=5), StepControl.on("cuda", seed=5)
    for step in range(6):
        draw_gradients(ours, step)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.empty_like(b.param).copy_(a.grad)
            for key in ("param", *KEYS):
                getattr(b, key).copy_(getattr(a, key))
        for tensors, control in zip((ours, theirs), controls, strict=True):
            fused_step(tensors, [ADAM], control, ema_decays=[0.9])
        for a, b in zip(ours, theirs, strict=True):
            if not normalized:
                assert all(
                    torch.equal(getattr(a, k), getattr(b, k).cpu()) for k in ("param", *KEYS)
                )
            torch.testing.assert_close(b.param.cpu(), a.param, rtol=2e-6, atol=1e-6)
            for key in KEYS:
                x, y = getattr(a, key), getattr(b, key).cpu()
                assert (x != y).sum() <= 1 + 2e-3 * x.numel()
