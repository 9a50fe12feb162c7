"""Two noisy versions of an image from one draw."""

import pytest
import torch

from tcm_fast.kernels.dropout import DropoutKey
from tcm_fast.kernels.noise_pair import noise_pair, to_unit_range


def key(samples, step=3, seed=7):
    return DropoutKey(seed=seed, step=step, layer=0, sample=torch.as_tensor(samples))


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
