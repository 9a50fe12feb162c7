import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tcm_fast.kernels.dropout import DropoutKey, dropout_mask
from tcm_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Relative to the largest element of the result: a few rounding steps of the output's dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def naive(x, num_groups, weight, bias, eps, silu=True, add=None, scale=None, shift=None):
    """The formula in float64, term by term."""
    n, c, height, width = x.shape
    x = x.double()
    if add is not None:
        x = x + add.double().reshape(n, c, 1, 1)
    groups = x.reshape(n, num_groups, c // num_groups * height * width)
    mean = groups.mean(-1, keepdim=True)
    variance = (groups - mean).square().mean(-1, keepdim=True)
    y = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape)
    y = y * weight.double().reshape(1, c, 1, 1) + bias.double().reshape(1, c, 1, 1)
    if scale is not None:
        y = y * (1 + scale.double().reshape(n, c, 1, 1))
    if shift is not None:
        y = y + shift.double().reshape(n, c, 1, 1)
    return y * torch.sigmoid(y) if silu else y


def case(n=3, c=12, height=5, width=7, dtype=torch.float32, layout=torch.channels_last, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = (3 * draw(n, c, height, width) + 1).to(dtype).contiguous(memory_format=layout)
    affine_dtype = torch.promote_types(dtype, torch.float32)
    affine = [draw(c).to(affine_dtype) for _ in range(2)]
    modulation = {name: draw(n, c).to(dtype) for name in ("add", "scale", "shift")}
    return x, affine, modulation


def key(n, seed=5):
    return DropoutKey(seed=seed, step=2, layer=1, sample=torch.arange(n))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("modulated", [False, True])
def test_forward_is_the_formula(dtype, layout, modulated):
    x, (weight, bias), modulation = case(dtype=dtype, layout=layout)
    modulation = modulation if modulated else {}
    y = group_norm_silu(x, 3, weight, bias, 1e-6, silu=modulated, **modulation)
    expected = naive(x, 3, weight, bias, 1e-6, silu=modulated, **modulation)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCES[dtype]


@given(
    n=st.integers(0, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 5),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=40, deadline=None)
def test_any_size(n, groups, width, size, layout):
    x, (weight, bias), modulation = case(n, groups * width, *size, layout=layout)
    y = group_norm_silu(x, groups, weight, bias, **modulation)
    assert y.shape == x.shape
    expected = naive(x, groups, weight, bias, 1e-5, **modulation)
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_by_finite_differences(layout):
    x, affine, modulation = case(2, 4, 2, 3, dtype=torch.float64, layout=layout)
    tensors = [v.requires_grad_() for v in (x, *affine, *modulation.values())]

    def function(x, weight, bias, add, scale, shift):
        return group_norm_silu_reference(
            x, 2, weight, bias, add=add, scale=scale, shift=shift, dropout_p=0.3, dropout_key=key(2)
        )

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("asked", ["x", "weight", "bias", "affine"])
def test_any_subset_of_gradients_on_channels_last(asked):
    # On a CPU, torch 2.13's own backward pass kills the process for all but the first of these.
    x, (weight, bias), _ = case()
    chosen = {"x": [x], "weight": [weight], "bias": [bias], "affine": [weight, bias]}[asked]
    for tensor in chosen:
        tensor.requires_grad_()
    grads = torch.autograd.grad(group_norm_silu(x, 3, weight, bias).square().sum(), chosen)
    expected = torch.autograd.grad(naive(x, 3, weight, bias, 1e-5).square().sum(), chosen)
    for grad, reference in zip(grads, expected, strict=True):
        assert torch.allclose(grad, reference, rtol=1e-4, atol=1e-4)

    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    some = torch.autograd.grad(group_norm_silu(x, 3, weight, bias).square().sum(), chosen)
    for grad, reference in zip(some, expected, strict=True):
        assert torch.allclose(grad, reference, rtol=1e-4, atol=1e-4)


def test_layouts_agree_with_dropout_and_a_split_batch():
    x, (weight, bias), modulation = case()
    arguments = {"dropout_p": 0.4, "dropout_key": key(3)}
    whole = group_norm_silu(x, 3, weight, bias, **modulation, **arguments)
    assert torch.allclose(
        whole,
        group_norm_silu(x.contiguous(), 3, weight, bias, **modulation, **arguments),
        atol=1e-5,
    )
    rows = torch.tensor([2, 0])
    part = group_norm_silu(
        x[rows], 3, weight, bias, **{k: v[rows] for k, v in modulation.items()},
        dropout_p=0.4, dropout_key=key(3).select(rows),
    )  # fmt: skip
    assert torch.allclose(whole[rows], part, atol=1e-6)

    kept = dropout_mask(key(3), 0.4, tuple(x.shape), x.device)
    plain = group_norm_silu(x, 3, weight, bias, **modulation)
    assert torch.allclose(whole, plain * kept / (1 - round(0.4 * 65536) / 65536), atol=1e-5)


def test_non_contiguous_input():
    x, (weight, bias), _ = case(width=14)
    x.requires_grad_()
    y = group_norm_silu(x[..., ::2], 3, weight, bias)
    assert torch.allclose(y.double(), naive(x[..., ::2], 3, weight, bias, 1e-5), atol=1e-4)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    expected = naive(x[..., ::2], 3, weight, bias, 1e-5).square().sum()
    assert torch.allclose(grad, torch.autograd.grad(expected, x)[0], rtol=1e-3, atol=1e-4)


def test_autocast_keeps_the_dtype_of_the_input():
    x, (weight, bias), modulation = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_norm_silu(x, 3, weight, bias, add=modulation["add"].bfloat16())
    assert y.dtype == torch.float32
    expected = naive(x, 3, weight, bias, 1e-5, add=modulation["add"].bfloat16())
    assert torch.allclose(y.double(), expected, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_large_mean_leaves_the_variance_exact(layout, dtype):
    # E[x²] - E[x]² would lose it entirely.
    x, (weight, bias), _ = case(height=16, width=16, layout=layout)
    x = (x / 10 + 500).to(dtype)
    y = group_norm_silu(x, 3, weight, bias)
    assert (y.double() - naive(x, 3, weight, bias, 1e-5)).abs().max() < 3e-3


def test_compiles_to_one_graph():
    x, (weight, bias), modulation = case()
    x.requires_grad_()
    weight.requires_grad_()
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    outputs = [f(x, 3, weight, bias, **modulation) for f in (compiled, group_norm_silu)]
    assert torch.allclose(*outputs, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in outputs]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "num_groups must divide C=12, got 5"),
        ({"num_groups": 0}, "num_groups must divide C=12, got 0"),
        ({"weight": torch.ones(11)}, r"weight must be \[12\], got \[11\]"),
        ({"bias": torch.ones(12, 1)}, r"bias must be \[12\], got \[12, 1\]"),
        ({"add": torch.ones(3, 12, 1, 1)}, r"add must be \[3,12\]"),
        ({"scale": torch.ones(12)}, r"scale must be \[3,12\], got \[12\]"),
        ({"x": torch.ones(3, 12)}, r"x must be \[N,C,H,W\], got \[3, 12\]"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0,1\), got 1.0"),
        ({"dropout_p": 0.5}, "dropout_key is required"),
    ],
)
def test_refuses(change, message):
    x, (weight, bias), _ = case()
    arguments = {"x": x, "num_groups": 3, "weight": weight, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments)


def test_refuses_integers():
    with pytest.raises(TypeError, match=r"x must be floating, got torch\.uint8"):
        group_norm_silu(torch.ones(1, 4, 2, 2, dtype=torch.uint8), 1, torch.ones(4), torch.ones(4))


def test_silu_of_torch_is_the_one_meant():
    x, (weight, bias), _ = case(dtype=torch.float64)
    plain = group_norm_silu(x, 3, weight, bias, silu=False)
    assert torch.allclose(group_norm_silu(x, 3, weight, bias), F.silu(plain))
