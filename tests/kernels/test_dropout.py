"""Counter-based dropout: the rule of its masks, and that nothing else decides them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcm_fast.kernels import _backend
from tcm_fast.kernels.dropout import PhiloxKey, dropout, dropout_mask
from tcm_fast.kernels.philox import philox4x32

with_extension = pytest.mark.skipif(
    _backend.extension() is None, reason="tcm_fast._C was not built"
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=["reference", pytest.param("kernel", marks=with_extension)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", request.param)
    return request.param


def make_key(samples=5, **fields):
    sample = torch.arange(samples) if isinstance(samples, int) else torch.as_tensor(samples)
    return PhiloxKey(**{**dict(seed=3, step=4, layer=2, sample=sample), **fields})


def make_x(shape, dtype=torch.float32, layout=torch.contiguous_format):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[x == 0] = 1
    return x.contiguous(memory_format=layout) if len(shape) == 4 else x


def test_the_rule_of_the_mask(backend):
    """Element by element, in integers."""
    n, c, h, w, p = 2, 3, 4, 5, 0.3
    key = make_key([6, 2**31], seed=7, step=(1 << 32) + 9, layer=5)
    mask = dropout_mask(key, p, (n, c, h, w))
    assert mask.dtype == torch.bool
    assert mask.is_contiguous(memory_format=torch.channels_last)
    for i, channel, y, x in np.ndindex(n, c, h, w):
        e = (y * w + x) * c + channel
        counter = [torch.tensor(v) for v in (e // 8, int(key.sample[i]), 9, 1)]
        word = int(philox4x32(tuple(counter), (torch.tensor(7), torch.tensor(5)))[e % 8 // 2])
        lane = word >> 16 if e % 2 else word & 0xFFFF
        assert mask[i, channel, y, x].item() == (lane >= round(p * 65536))


@pytest.mark.parametrize("p", [2**-16, 0.05, 0.13, 0.5, 0.99])
def test_the_rate(p, backend):
    mask = dropout_mask(make_key(16), p, (16, 64, 32, 32))
    spread = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(1 - mask.double().mean().item() - p) < 4 * spread + 2**-17


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 16, 5, 7), (5, 10, 3, 3), (5, 24, 1, 1), (5, 13)])
def test_values(shape, layout, dtype, backend):
    x, key, p = make_x(shape, dtype, layout), make_key(), 0.13
    y = dropout(x, p, key)
    assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, x.stride())
    kept = dropout_mask(key, p, shape)
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(y != 0, kept)
    scaled = x.double() / (1 - round(p * 65536) / 65536)
    info = torch.finfo(dtype)
    torch.testing.assert_close(
        y.double()[kept], scaled[kept], atol=info.smallest_normal * info.eps, rtol=info.eps
    )


@with_extension
@given(
    n=st.integers(0, 4),
    c=st.integers(1, 20),
    pixels=st.integers(0, 40),
    p=st.floats(0.01, 0.99),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_the_extension_equals_the_reference(n, c, pixels, p, layout, dtype):
    x, key = make_x((n, c, pixels, 1), dtype, layout), make_key(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCM_FAST_BACKEND", "kernel")
        kernel = dropout(x, p, key)
        patch.setenv("TCM_FAST_BACKEND", "reference")
        assert torch.equal(kernel, dropout(x, p, key))


@with_extension
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [16, 20])
def test_long_and_threaded_samples(layout, channels, monkeypatch):
    x, key = make_x((6, channels, 32, 32), layout=layout), make_key(6)
    alone = dropout(x, 0.2, key)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(alone, dropout(x, 0.2, key))
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    assert torch.equal(alone, dropout(x, 0.2, key))


def test_a_row_does_not_depend_on_its_batch(backend):
    x, key = make_x((12, 10, 4, 4)), make_key(12)
    whole = dropout(x, 0.3, key)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropout(x[order], 0.3, key.select(order)), whole[order])
    for rows in (slice(0, 5), slice(5, 12)):
        assert torch.equal(dropout(x[rows], 0.3, key.select(rows)), whole[rows])


@pytest.mark.parametrize(
    "change", [dict(seed=9), dict(step=5), dict(step=4 + 2**32), dict(layer=3)]
)
def test_other_keys_give_other_masks(change):
    shape = (5, 64, 8, 8)
    a = dropout_mask(make_key(), 0.5, shape)
    b = dropout_mask(make_key(**change), 0.5, shape)
    agreement = (a == b).double().mean().item()
    assert abs(agreement - 0.5) < 4 * 0.5 / math.sqrt(a.numel())


def test_at_layer_changes_the_layer_alone():
    key = make_key()
    other = key.at_layer(11)
    assert (other.layer, other.seed, other.step) == (11, key.seed, key.step)
    assert other.sample is key.sample
    assert make_key(layer=0).layer == PhiloxKey(seed=3, step=4, sample=key.sample).layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(dtype, layout, backend):
    x, key, p = make_x((5, 16, 4, 4), dtype, layout).requires_grad_(), make_key(), 0.25
    y = dropout(x, p, key)
    upstream = make_x(x.shape, dtype).flip(0)
    (grad_x,) = torch.autograd.grad(y, x, upstream)
    assert grad_x.dtype == dtype
    assert torch.equal(grad_x, dropout(upstream, p, key))
    assert torch.equal(grad_x != 0, dropout_mask(key, p, x.shape))


def test_gradcheck_to_second_order():
    x = make_x((2, 3, 2, 2), torch.float64).requires_grad_()
    key = make_key(2)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, key), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.4, key).sin(), x)


def test_only_the_key_is_saved():
    saved = []
    x = make_x((5, 64, 8, 8)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.2, make_key()).sum()
    assert sum(t.numel() for t in saved) <= 5 + 2


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:, ::2],
        lambda x: x[:, :, 1:],
        lambda x: x[:1].expand(5, -1, -1, -1),
        lambda x: x.flip(1).permute(0, 2, 1, 3),
    ],
)
def test_non_contiguous_input(make, backend):
    x = make(make_x((5, 16, 6, 6)))
    y = dropout(x, 0.2, make_key())
    assert torch.equal(y, dropout(x.contiguous(), 0.2, make_key()))
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (5, 0, 4, 4), (5, 8, 0, 4), (0, 6)])
def test_empty(shape, backend):
    x = torch.empty(shape, requires_grad=True)
    y = dropout(x, 0.5, make_key(shape[0]))
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape


def test_dropped_infinities_are_zero(backend):
    x, key = torch.full((5, 8, 4, 4), math.inf), make_key()
    y = dropout(x, 0.5, key)
    assert torch.equal(y == 0, ~dropout_mask(key, 0.5, x.shape))
    assert not y.isnan().any()


def test_nothing_is_dropped_at_zero():
    x = make_x((5, 8, 4, 4))
    assert dropout(x, 0.0, make_key()) is x
    assert dropout_mask(make_key(), 0.0, x.shape).all()


def test_rows_of_features_share_the_rule():
    mask = dropout_mask(make_key(), 0.5, (5, 12))
    assert torch.equal(mask, dropout_mask(make_key(), 0.5, (5, 12, 1, 1))[:, :, 0, 0])


def test_compiled_without_a_break():
    def step(x, seed, number, sample):
        key = PhiloxKey(seed=seed, step=number, sample=sample)
        for layer in range(2):
            x = dropout(x, 0.2, key.at_layer(layer)) * 2
        return x, dropout_mask(key, 0.2, x.shape)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in (1, 2):
        results = []
        for function in (step, compiled):
            x = make_x((5, 8, 4, 4), layout=torch.channels_last).requires_grad_()
            y, mask = function(x, torch.tensor(3), torch.tensor(number), torch.arange(5))
            y.square().sum().backward()
            results.append((y.detach(), mask, x.grad))
        for eager, graph in zip(*results, strict=True):
            assert torch.equal(eager, graph)


@pytest.mark.parametrize("name", ["dropout", "dropout_mask"])
def test_registered_operations_are_consistent(name):
    sample, seed, step = torch.arange(5), torch.tensor(3), torch.tensor(4)
    if name == "dropout":
        x = make_x((5, 8, 4, 4)).requires_grad_()
        arguments = (x, sample, seed, step, 2, 8520)
    else:
        arguments = (sample, seed, step, 2, 8520, 128)
    torch.library.opcheck(getattr(torch.ops.tcm_fast, name).default, arguments)


def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dropout(make_x((5, 8, 4, 4)), 0.2, make_key()).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, dict(p=1.0), r"dropout: p must be in \[0, 1\) and not round to 1, got 1.0"),
        (ValueError, dict(p=-0.1), r"dropout: p must be in \[0, 1\) and not round to 1, got -0.1"),
        (ValueError, dict(p=1 - 1e-9), r"dropout: p must be in \[0, 1\) and not round to 1"),
        (
            ValueError,
            dict(x=torch.ones(5)),
            r"dropout: x must be \[N,C,H,W\] or \[N,C\], got \[5\]",
        ),
        (ValueError, dict(x=torch.ones(4, 3)), r"dropout: key.sample must have N=4 entries, got 5"),
        (TypeError, dict(x=torch.ones(5, 3, dtype=torch.int32)), r"dropout: x must be floating"),
        (TypeError, dict(key=None), r"dropout: key must be a PhiloxKey, got NoneType"),
        (
            ValueError,
            dict(key=make_key(seed=-1)),
            r"dropout: seed must be in \[0, 2\*\*32\), got -1",
        ),
    ],
)
def test_bad_arguments_are_named(error, arguments, message):
    with pytest.raises(error, match=message):
        dropout(**{**dict(x=torch.ones(5, 3), p=0.5, key=make_key()), **arguments})


def test_bad_masks_are_named():
    with pytest.raises(ValueError, match=r"dropout_mask: shape must be \(N,C,H,W\) or \(N,C\)"):
        dropout_mask(make_key(), 0.5, (5,))
    with pytest.raises(ValueError, match=r"dropout_mask: key\.sample must have N=3 entries, got 5"):
        dropout_mask(make_key(), 0.5, (3, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("forced", ["reference", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_device_gives_the_hosts_values(forced, dtype, layout, monkeypatch):
    x, key = make_x((5, 10, 6, 6), dtype, layout), make_key()
    host = dropout(x, 0.2, key)
    monkeypatch.setenv("TCM_FAST_BACKEND", forced)
    device = dropout(x.cuda(), 0.2, make_key(sample=key.sample.cuda()))
    assert device.stride() == host.stride()
    assert torch.equal(device.cpu(), host)


@pytest.mark.gpu
def test_a_key_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"dropout: key\.sample must be on cuda:0, got cpu"):
        dropout(torch.ones(5, 3, device="cuda"), 0.5, make_key())
