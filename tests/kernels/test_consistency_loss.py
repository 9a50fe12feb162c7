"""The consistency loss against its formulas written out in float64, gradients included."""

import math

import pytest
import torch

from tcm_fast.kernels.consistency_loss import WEIGHTINGS, consistency_loss

SD = 0.5


def inputs(n=5, shape=(3, 8, 8), dtype=torch.float64, gap=0.05, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype)

    t = torch.exp(torch.randn(n, generator=g, dtype=torch.float64))
    r = t * (1 - gap)
    y, noise = randn(), randn()
    x_t = y + t.to(dtype).reshape(-1, 1, 1, 1) * noise
    x_r = y + r.to(dtype).reshape(-1, 1, 1, 1) * noise
    return dict(output=randn(), x_t=x_t, t=t, target_output=randn(), x_r=x_r, r=r, delta=t - r)


def naive(output, x_t, t, target_output, x_r, r, *, delta, c, weighting, is_clean=None):
    """One sample at a time, plain numbers."""
    losses = []
    for i in range(len(t)):
        ti, ri = float(t[i]), float(r[i])

        def denoised(x, f, s):
            v = s * s + SD * SD
            return SD * SD / v * x + s * SD / math.sqrt(v) * f

        target = denoised(x_r[i], target_output[i], ri)
        if is_clean is not None and is_clean[i]:
            target = target_output[i]
        difference = denoised(x_t[i], output[i], ti) - target
        distance = torch.sqrt((difference**2).sum() + c * c) - c
        c_out = ti * SD / math.sqrt(ti * ti + SD * SD)
        weight = {
            "inv_dt": 1 / float(delta[i]),
            "inv_sqrt_dt": float(delta[i]) ** -0.5,
            "inv_cout": 1 / c_out,
            "inv_cout_sq": 1 / c_out**2,
            "one": 1.0,
        }[weighting]
        losses.append(weight * distance)
    return torch.stack(losses)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("c", [1e-8, 0.06])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (3, 5, 7)])
def test_value_and_gradient_are_the_formula(weighting, c, shape):
    values = inputs(shape=shape)
    output = values.pop("output").requires_grad_()
    upstream = torch.randn(5, dtype=torch.float64)
    loss = consistency_loss(output, **values, c=c, weighting=weighting)
    expected = naive(output, **values, c=c, weighting=weighting)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, output, upstream)
    (expected_grad,) = torch.autograd.grad(expected, output, upstream)
    torch.testing.assert_close(grad, expected_grad)


def test_clean_rows_take_the_image_as_their_target():
    values = inputs()
    flags = torch.tensor([True, False, True, False, False])
    loss = consistency_loss(**values, c=0.06, weighting="inv_dt", is_clean=flags)
    expected = naive(**values, c=0.06, weighting="inv_dt", is_clean=flags)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("c", [1e-8, 0.06])
def test_a_zero_difference_has_zero_loss_and_gradient(c):
    values = inputs(dtype=torch.float32)
    values["x_r"], values["target_output"] = values["x_t"].clone(), values["output"].clone()
    values["r"] = values["t"]
    values["output"].requires_grad_()
    loss = consistency_loss(**values, c=c, weighting="inv_dt")
    loss.sum().backward()
    assert loss.tolist() == [0.0] * 5
    assert (values["output"].grad == 0).all()


def test_the_target_has_no_gradient():
    values = inputs()
    values["target_output"].requires_grad_()
    values["output"].requires_grad_()
    consistency_loss(**values, c=0.06, weighting="one").sum().backward()
    assert values["target_output"].grad is None


def with_biases(values, seed=3):
    """With biases [N,C] as they come: a parameter expanded, and one row for each target."""
    g = torch.Generator().manual_seed(seed)
    n, c = values["output"].shape[:2]
    bias = torch.randn(c, generator=g).expand(n, c).to(values["x_t"])
    target_bias = torch.randn(n, c, generator=g).to(values["x_t"])
    return values | {"output_bias": bias, "target_bias": target_bias}


@pytest.mark.parametrize("channels", [3, 17])
def test_biases_are_added_to_the_outputs(channels):
    values = with_biases(inputs(shape=(channels, 5, 7)))
    flags = torch.tensor([True, False, True, False, False])
    options = dict(c=0.06, weighting="inv_dt", is_clean=flags)
    added = {k: v for k, v in values.items() if "bias" not in k}
    added["output"] = values["output"] + values["output_bias"][:, :, None, None]
    by_row = torch.where(flags[:, None], 0, values["target_bias"])
    added["target_output"] = values["target_output"] + by_row[:, :, None, None]
    loss = consistency_loss(**values, **options)
    torch.testing.assert_close(loss, naive(**added, **options))
    for name in ("output_bias", "target_bias"):
        alone = {k: v for k, v in values.items() if k != name}
        none = values | {name: torch.zeros_like(values[name])}
        assert torch.equal(
            consistency_loss(**alone, **options), consistency_loss(**none, **options)
        )


def test_weights_may_be_a_tensor():
    values = inputs()
    one = consistency_loss(**values, c=0.06, weighting="one")
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    torch.testing.assert_close(consistency_loss(**values, c=0.06, weighting=weight), weight * one)
    by_hand = consistency_loss(**values, c=0.06, weighting=1 / values["delta"])
    by_name = consistency_loss(**values, c=0.06, weighting="inv_dt")
    assert torch.equal(by_hand, by_name)


def test_fp32_is_as_exact_as_fp32_can_be():
    exact = consistency_loss(**inputs(), c=0.06, weighting="inv_dt")
    single = consistency_loss(**inputs(dtype=torch.float32), c=0.06, weighting="inv_dt")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-5, atol=0)


def test_an_empty_batch_works():
    values = {k: v[:0] for k, v in inputs().items()}
    assert consistency_loss(**values, c=0.06, weighting="inv_dt").shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(c=0.0), "c must be positive, got 0.0"),
        (dict(weighting="inv"), "weighting must be one of .* or a tensor, got 'inv'"),
        (dict(weighting=torch.ones(4)), r"weighting must be \[5\], got \[4\]"),
        (dict(r=torch.ones(4)), r"r must be \[5\], got \[4\]"),
        (dict(output_bias=torch.ones(3)), r"output_bias must be \[5, 3\], got \[3\]"),
        (dict(target_bias=torch.ones(5, 1)), r"target_bias must be \[5, 3\], got \[5, 1\]"),
        (dict(x_r=torch.ones(5, 3, 8, 7)), r"x_r must be \[5, 3, 8, 8\], got \[5, 3, 8, 7\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"consistency_loss: {message}"):
        consistency_loss(**(inputs() | dict(c=0.06, weighting="one") | change))


# ---- the Triton kernel --------------------------------------------------------------------------


def on(device, values, dtype=None):
    """Arguments on a device, the network's outputs in `dtype`, the images in fp32."""
    moved = {k: v.to(device) for k, v in values.items()}
    for name in ("x_t", "x_r", "target_output", "output_bias", "target_bias"):
        if name in moved:
            moved[name] = moved[name].to(torch.float32)
    if dtype is not None:
        moved["output"] = moved["output"].to(dtype)
    return moved


def loss_and_grad(values, upstream, **options):
    """The loss, and its gradients at the output and, where there is one, its bias."""
    given = {
        k: values[k].detach().requires_grad_() for k in ("output", "output_bias") if k in values
    }
    loss = consistency_loss(**values | given, **options)
    return loss.detach(), *torch.autograd.grad(loss, list(given.values()), upstream.to(loss))


def compare_with_oracle(monkeypatch, check, values, device, **options):
    """The kernel's loss and gradient beside PyTorch's in the same dtype, by the float64 oracle."""
    upstream = torch.randn(len(values["t"]), device=device)
    kernel = loss_and_grad(values, upstream, **options)
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    plain = loss_and_grad(values, upstream, **options)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    oracle = loss_and_grad(wide, upstream, **options)
    names = ("loss", "grad", "bias's grad")[: len(oracle)]
    for what, ours, theirs, exact in zip(names, kernel, plain, oracle, strict=True):
        check(ours, theirs, exact, what)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("c", [1e-8, 0.06])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (3, 32, 32)])
def test_kernel_matches_the_oracle(
    weighting, c, shape, triton_device, check_against_oracle, monkeypatch, seed
):
    values = on(triton_device, inputs(shape=shape))
    flags = torch.tensor([False, True, False, False, True], device=triton_device)
    compare_with_oracle(
        monkeypatch, check_against_oracle, values | {"is_clean": flags}, triton_device,
        c=c, weighting=weighting,
    )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (3, 32, 32), (4, 16, 24), (17, 3, 5)])
def test_kernel_adds_biases(
    layout, dtype, shape, triton_device, check_against_oracle, monkeypatch, seed
):
    values = on(triton_device, with_biases(inputs(shape=shape)), dtype)
    values |= {k: v.contiguous(memory_format=layout) for k, v in values.items() if v.ndim == 4}
    flags = torch.tensor([False, True, False, False, True], device=triton_device)
    compare_with_oracle(
        monkeypatch, check_against_oracle, values | {"is_clean": flags}, triton_device,
        c=0.06, weighting="inv_dt",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [0.5, 0.001])
def test_kernel_takes_16_bit_outputs_and_small_gaps(
    dtype, gap, triton_device, check_against_oracle, monkeypatch, seed
):
    values = on(triton_device, inputs(n=3, shape=(3, 64, 64), gap=gap), dtype)
    compare_with_oracle(
        monkeypatch, check_against_oracle, values, triton_device, c=0.06, weighting="inv_cout_sq"
    )


def test_kernel_reads_channels_last_and_any_strides(triton_device, monkeypatch, seed):
    values = on(triton_device, inputs(shape=(3, 5, 7)))
    upstream = torch.randn(5, device=triton_device)
    options = dict(c=0.06, weighting="inv_dt")
    expected = loss_and_grad(values, upstream, **options)
    last = {
        k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
        for k, v in values.items()
    }
    mixed = last | {"x_t": values["x_t"], "output": values["output"].mT.contiguous().mT}
    for other in (last, mixed):
        loss, grad = loss_and_grad(other, upstream, **options)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(grad, expected[1])


def test_kernel_writes_every_element_and_repeats_its_bits(triton_device, monkeypatch, seed):
    values = on(triton_device, with_biases(inputs(n=2, shape=(3, 37, 41))), torch.float16)
    upstream = torch.randn(2, device=triton_device)
    first = loss_and_grad(values, upstream, c=1e-8, weighting="inv_dt")
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    second = loss_and_grad(values, upstream, c=1e-8, weighting="inv_dt")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_kernel_does_not_read_the_noisy_image_of_a_clean_row(triton_device):
    values = on(triton_device, inputs())
    flags = torch.tensor([True] * 5, device=triton_device)
    values = with_biases(values)
    expected = consistency_loss(**values, c=0.06, weighting="one", is_clean=flags)
    values["x_r"].fill_(math.nan)
    values["target_bias"].fill_(math.nan)
    loss = consistency_loss(**values, c=0.06, weighting="one", is_clean=flags)
    assert torch.equal(loss, expected)


def test_kernel_of_a_zero_difference_and_of_an_empty_batch(triton_device):
    values = on(triton_device, inputs())
    values["x_r"], values["target_output"] = values["x_t"].clone(), values["output"].float()
    values["r"] = values["t"]
    loss, grad = loss_and_grad(values, torch.ones(5), c=1e-8, weighting="inv_dt")
    assert loss.tolist() == [0.0] * 5
    assert (grad == 0).all()
    empty = {k: v[:0] for k, v in values.items()}
    loss, grad = loss_and_grad(empty, torch.ones(0), c=1e-8, weighting="inv_dt")
    assert loss.shape == (0,)
    assert grad.shape == (0, 3, 8, 8)


def test_kernel_takes_weights(triton_device):
    values = on(triton_device, inputs())
    one = consistency_loss(**values, c=0.06, weighting="one")
    weight = torch.arange(1.0, 6.0, device=triton_device)
    torch.testing.assert_close(consistency_loss(**values, c=0.06, weighting=weight), weight * one)
    by_hand = consistency_loss(**values, c=0.06, weighting=1 / values["delta"].float())
    by_name = consistency_loss(**values, c=0.06, weighting="inv_dt")
    assert torch.equal(by_hand, by_name)


def test_operators_are_well_formed(triton_device):
    values = on(triton_device, inputs(n=2), torch.float16)
    levels = [values[k].to(torch.float32) for k in ("t", "r", "delta")]
    t, r, delta = levels
    output = values["output"].requires_grad_()
    biased = on(triton_device, with_biases(values))
    for biases in (
        (None, None),
        (biased["output_bias"].clone().requires_grad_(), biased["target_bias"]),
    ):
        arguments = (
            output, values["x_t"], t, values["target_output"], values["x_r"], r, 1 / delta, None,
            *biases, 0.06, 0.5,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.tcm_fast.consistency_loss_fwd.default, arguments)


def test_a_gradient_that_is_not_computed_is_refused():
    values = inputs()
    values["x_t"].requires_grad_()
    with pytest.raises(
        ValueError, match="consistency_loss: only output and output_bias have a gradient, got x_t"
    ):
        consistency_loss(**values, c=0.06, weighting="one")
