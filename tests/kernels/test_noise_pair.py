"""Two noisy versions of an image from one draw."""

import math

import pytest
import torch

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.noise_pair import NOISE_LAYER, noise_pair, to_unit_range
from tcm_fast.kernels.philox import philox_normal


def key(samples, step=3, seed=7):
    return PhiloxKey(seed=seed, step=step, layer=0, sample=torch.as_tensor(samples))


def batch(n=6, shape=(3, 8, 8)):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 256, (n, *shape), generator=g, dtype=torch.uint8)
    t = torch.exp(torch.randn(n, generator=g, dtype=torch.float64))
    return y, t, 0.9 * t


def test_both_levels_share_the_noise():
    y, t, r = batch()
    pair = noise_pair(y, t, r, key(range(6)))
    unit = y.double() / 127.5 - 1
    eps = (pair.x_t.double() - unit) / t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        pair.x_r.double(), unit + r.reshape(-1, 1, 1, 1) * eps, atol=1e-5, rtol=1e-5
    )
    assert abs(eps.mean().item()) < 0.15
    assert abs(eps.std().item() - 1) < 0.1


def test_inputs_are_scaled_and_typed():
    y, t, r = batch()
    pair = noise_pair(y, t, r, key(range(6)), dtype=torch.bfloat16, append_ones=True)
    c_in = (1 / (t**2 + 0.25).sqrt()).reshape(-1, 1, 1, 1)
    assert pair.input_t.dtype == torch.bfloat16
    assert pair.input_t.shape == (6, 4, 8, 8)
    assert (pair.input_t[:, 3] == 1).all()
    torch.testing.assert_close(
        pair.input_t[:, :3].double(), c_in * pair.x_t.double(), atol=0, rtol=2**-7
    )
    assert pair.x_t.dtype == torch.float32


def test_a_sample_does_not_depend_on_its_batch():
    y, t, r = batch()
    whole = noise_pair(y, t, r, key(range(6)))
    order = torch.tensor([4, 0, 3])
    some = noise_pair(y[order], t[order], r[order], key(order))
    for a, b in zip(whole, some, strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("change", [dict(step=4), dict(seed=8)])
def test_noise_changes_with_the_step_and_the_seed(change):
    y, t, r = batch()
    assert not torch.equal(
        noise_pair(y, t, r, key(range(6))).x_t, noise_pair(y, t, r, key(range(6), **change)).x_t
    )


def test_without_an_inner_level():
    y, t, _ = batch()
    pair = noise_pair(y, t, None, key(range(6)))
    assert pair.x_r is None
    assert pair.input_r is None


def test_uint8_spans_the_unit_range():
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_bad_shapes_are_named():
    y, t, r = batch()
    with pytest.raises(ValueError, match=r"noise_pair: r must be \[6\], got \[5\]"):
        noise_pair(y, t, r[:5], key(range(6)))
    with pytest.raises(ValueError, match=r"noise_pair: y must be \[N,C,H,W\]"):
        noise_pair(y[0], t, r, key(range(6)))


# ---- the Triton kernel --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (3, 32, 32)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("append_ones", [False, True])
@pytest.mark.parametrize("images", ["uint8", "float"])
def test_kernel_has_the_references_bits(
    shape, layout, append_ones, images, triton_device, monkeypatch
):
    y, t, r = batch(3, shape)
    y, t, r = (v.to(triton_device) for v in (y.contiguous(memory_format=layout), t, r))
    if images == "float":
        y = to_unit_range(y)
    samples = torch.tensor([0, 7, 2**32 - 1], device=triton_device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for inner in (r, None):
            options = dict(dtype=dtype, append_ones=append_ones)
            big = key(samples, step=2**33 + 1, seed=2**32 - 5)
            monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
            ours = noise_pair(y, t, inner, big, **options)
            monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
            plain = noise_pair(y, t, inner, big, **options)
            for a, b in zip(ours, plain, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    # The reference's c_in takes a root that a GPU rounds differently.
                    exact = a.dtype == torch.float32 and a.shape == y.shape and a.is_cpu
                    last_place = max(1e-3, torch.finfo(a.dtype).eps)
                    torch.testing.assert_close(a, b, atol=0, rtol=0 if exact else last_place)


def test_kernel_against_a_float64_oracle(triton_device, check_against_oracle, monkeypatch):
    y, t, r = (v.to(triton_device) for v in batch(4, (3, 16, 16)))
    ours = noise_pair(y, t, r, key(torch.arange(4, device=triton_device)))
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    plain = noise_pair(y, t, r, key(torch.arange(4, device=triton_device)))
    unit = y.double() / 127.5 - 1
    noise = philox_normal(7, 3, NOISE_LAYER, torch.arange(4, device=triton_device), (3, 16, 16))
    t, r = t.to(torch.float32).double(), r.to(torch.float32).double()
    for level, x, x_in in ((t, "x_t", "input_t"), (r, "x_r", "input_r")):
        level = level.reshape(-1, 1, 1, 1)
        exact = unit + level * noise.double()
        check_against_oracle(getattr(ours, x), getattr(plain, x), exact, x)
        exact = exact / (level**2 + 0.25).sqrt()
        check_against_oracle(getattr(ours, x_in), getattr(plain, x_in), exact, x_in)


def test_kernel_writes_every_element(triton_device, monkeypatch):
    y, t, r = (v.to(triton_device) for v in batch(2, (3, 37, 29)))
    samples = torch.arange(2, device=triton_device)
    first = noise_pair(y, t, r, key(samples), append_ones=True)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    second = noise_pair(y, t, r, key(samples), append_ones=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_kernel_of_an_empty_batch_and_of_strided_images(triton_device):
    y, t, r = (v.to(triton_device) for v in batch(4))
    samples = torch.arange(4, device=triton_device)
    assert noise_pair(y[:0], t[:0], r[:0], key(samples[:0])).x_t.shape == (0, 3, 8, 8)
    strided = y.repeat_interleave(2, 3)[..., ::2]
    for a, b in zip(
        noise_pair(strided, t, r, key(samples)), noise_pair(y, t, r, key(samples)), strict=True
    ):
        assert torch.equal(a, b)


def test_operator_is_well_formed(triton_device):
    y, t, r = (v.to(triton_device) for v in batch(2))
    scalar = torch.zeros((), dtype=torch.int64, device=triton_device)
    sample = torch.arange(2, device=triton_device)
    arguments = (
        y,
        t.float(),
        r.float(),
        sample,
        scalar,
        scalar,
        NOISE_LAYER,
        0.5,
        torch.float16,
        True,
    )
    torch.library.opcheck(torch.ops.tcm_fast.noise_pair.default, arguments)


def test_a_gradient_that_is_not_computed_is_refused():
    y, t, r = batch()
    with pytest.raises(ValueError, match="noise_pair: y has no gradient here"):
        noise_pair(y.float().requires_grad_(), t, r, key(range(6)))
