"""The weights that a step computes with: 16-bit copies and normalised rows."""

import copy

import pytest
import torch

from tcm_fast.kernels import normalized_copy
from tcm_fast.networks import build_network, force_rows, layers, mp_layers, precision
from tcm_fast.networks.layers import Conv2d
from tcm_fast.networks.mp_layers import MPConv
from tcm_fast.networks.precision import (
    cast_weights,
    in_precision,
    is_derived,
    make_copies,
)


def edm2(**options):
    torch.manual_seed(0)
    net = build_network(
        "edm2", img_resolution=8, img_channels=2, label_dim=3, model_channels=8, channel_mult=[1, 2],
        num_blocks=1, attn_resolutions=[4], channels_per_head=8, **options,
    )  # fmt: skip
    for parameter in net.parameters():  # gains that do something, rows that are not normalised
        parameter.data = parameter.data * 1.3 + (0.5 if parameter.ndim == 0 else 0)
    return net


def batch(n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 8, 8, generator=generator)
    return x, torch.logspace(-1, 1, n), torch.eye(3)[torch.arange(n) % 3]


def test_normalised_weights_give_the_same_output_and_gradients():
    net = edm2()
    x, t, labels = batch()
    weights = cast_weights(net, torch.float32)
    names = {name for name, m in net.model.named_modules() if isinstance(m, MPConv)}
    assert {name.removesuffix(".scaled") for name in weights} == names
    plain, ours = net.raw(x, t, labels), net.raw(x, t, labels, weights=weights)
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(plain)
    parameters = list(net.parameters())
    for a, b in zip(
        *(torch.autograd.grad(out, parameters, upstream) for out in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_explicit_gradient_is_autograds():
    """In float64, rows of zeros and of tiny norm included."""
    net = edm2().double()
    layer = net.model.enc["8x8_block0"].conv_res0
    layer.weight.data[0] = 0
    layer.weight.data[1] *= 1e-5
    weights = cast_weights(net, torch.float32)
    name = "enc.8x8_block0.conv_res0.scaled"
    assert weights[name].dtype == torch.float64
    upstream = torch.randn_like(weights[name])
    (ours,) = torch.autograd.grad(weights[name], layer.weight, upstream)
    live = layer.weight.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(normalized_copy(live), live, upstream)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-9, atol=1e-12)


def test_micro_batches_share_one_normalisation():
    net = edm2()
    x, t, labels = batch(4)
    weights = cast_weights(net, torch.float32)
    for rows in (slice(0, 2), slice(2, 4)):
        net.raw(x[rows], t[rows], labels[rows], weights=weights).square().sum().backward()
    parts = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.raw(x, t, labels).square().sum().backward()
    for part, whole in zip(parts, net.parameters(), strict=True):
        torch.testing.assert_close(part, whole.grad, rtol=1e-3, atol=1e-4)


def test_folded_gradients_are_those_of_the_normalised_weights():
    net = edm2()
    weights = cast_weights(net, torch.float32, folded=True)
    name = "enc.8x8_block0.conv_res0"
    upstream = torch.randn_like(weights[f"{name}.scaled"])
    weight = net.model.get_submodule(name).weight
    (grad,) = torch.autograd.grad(weights[f"{name}.scaled"], weight, upstream)
    assert torch.equal(grad, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_copies_keep_the_islands_wide(dtype):
    net = edm2()
    weights = cast_weights(net, dtype)
    wide = {name for name, value in weights.items() if value.dtype == torch.float32}
    assert wide == {"emb_noise.scaled", "emb_label.scaled"}
    assert all(v.dtype == dtype for name, v in weights.items() if name not in wide)
    assert not any(name.endswith("gain") for name in weights)
    x, t, labels = batch()
    low = net.raw(x.to(dtype), t, labels, weights=weights)
    assert low.dtype == dtype
    exact = net.raw(x, t, labels)
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()


def test_copies_stand_in_for_what_they_are_copies_of():
    net = edm2()
    copies = make_copies(net, torch.bfloat16)
    expected = cast_weights(net, torch.bfloat16)
    found = cast_weights(net, torch.bfloat16, copies)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert [c is None for c in make_copies(net, torch.float32)] == [
        not name.endswith("weight") for name, _ in net.named_parameters()
    ]
    rows = {f"model.{name}" for name in net.model.normalized_names()}
    for copied, (name, _) in zip(
        make_copies(net, torch.bfloat16, rows_too=False), net.named_parameters(), strict=True
    ):
        assert copied is None, name
        assert (name in rows) == name.endswith("weight")


def test_what_needs_nothing_is_left_alone():
    torch.manual_seed(0)
    plain = build_network(
        "ddpmpp", img_resolution=8, img_channels=2, model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    assert not is_derived(plain, torch.float32)
    assert in_precision(plain, torch.float32) is plain
    assert is_derived(plain, torch.bfloat16)
    assert is_derived(edm2(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_for_inference_are_normalised_once(dtype):
    net = edm2()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ready = in_precision(net, dtype)
    x, t, labels = batch()
    weights = cast_weights(net, dtype)
    expected = net.raw(x.to(dtype), t, labels, weights=weights)
    assert torch.equal(ready.raw(x.to(dtype), t, labels), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    layer = ready.model.enc["8x8_block0"].conv_res0
    assert layer.scaled.data_ptr() == layer.weight.data_ptr()  # held once
    assert in_precision(ready, dtype).model.enc["8x8_block0"].conv_res0.scaled.dtype == dtype
    again = in_precision(copy.deepcopy(ready), dtype)
    assert torch.equal(again.raw(x.to(dtype), t, labels), expected)
    torch.testing.assert_close(
        ready(x, t, labels), net(x, t, labels), rtol=0.1, atol=0.1 if dtype != x.dtype else 1e-5
    )


def test_forcing_covers_every_layer_and_writes_what_the_formula_says():
    net = edm2(logvar_channels=4)
    expected = {
        f"{name}.weight": m.weight / (1e-4 + m.weight.square().flatten(1).mean(1).sqrt()).reshape(
            -1, *[1] * (m.weight.ndim - 1)
        )
        for name, m in net.named_modules()
        if isinstance(m, MPConv)
    }  # fmt: skip
    assert "logvar_linear.weight" in expected
    force_rows(net)
    for name, value in expected.items():
        torch.testing.assert_close(net.get_parameter(name), value)


def unet(name):
    if name == "edm2":
        return edm2()
    width = 32 if name == "adm" else 8  # whose heads have 64 channels
    net = build_network(
        name, img_resolution=8, img_channels=2, label_dim=3, model_channels=width, channel_mult=[1, 2],
        num_blocks=1, attn_resolutions=[4],
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval()


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm", "edm2"])
def test_split_convolutions_are_nearly_fp32s(name, monkeypatch):
    """All 3x3 and 1x1 convolutions go by three products, but those that NCSN++ fuses with a filter."""
    calls = []
    for module in (layers, mp_layers):
        convolve = module.conv_bf16x3

        def noted(*args, convolve=convolve, **parts):
            calls.append(parts)
            return convolve(*args, **parts)

        monkeypatch.setattr(module, "conv_bf16x3", noted)
    net, (x, t, labels) = unet(name), batch()
    kinds = {m: isinstance(m, Conv2d) or m.weight.ndim == 4
             for m in net.model.modules() if isinstance(m, Conv2d | MPConv)}  # fmt: skip
    weights = cast_weights(net, torch.float32, split=True)
    split = [key for key in weights if key.endswith(".parts")]
    assert len(split) == sum(kinds.values()) - (1 if name == "ncsnpp" else 0)
    ours, plain = net.raw(x, t, labels, weights=weights), net.raw(x, t, labels)
    assert len(calls) == len(split)
    assert all(call["parts"] is not None for call in calls)
    assert 0 < (ours - plain).abs().max() < 2e-4 * plain.abs().max()
    upstream, parameters = torch.randn_like(plain), list(net.model.parameters())
    for a, b in zip(
        *(
            torch.autograd.grad(out, parameters, upstream, allow_unused=True)
            for out in (ours, plain)
        ),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-5
    ready = in_precision(net, torch.float32, split=True)
    assert torch.equal(ready.raw(x, t, labels), ours)
    assert torch.equal(in_precision(ready, torch.float32, split=True).raw(x, t, labels), ours)
    assert set(ready.state_dict()) == set(net.state_dict())
    ready.to(memory_format=torch.channels_last)
    assert (ready.raw(x, t, labels) - ours).abs().max() < 1e-4 * ours.abs().max()
    assert is_derived(net, torch.float32, split=True)


def test_split_convolutions_take_no_other_dtype():
    net = in_precision(unet("ddpmpp"), torch.float32, split=True)
    layer = next(m for m in net.modules() if getattr(m, "parts", None) is not None)
    with pytest.raises(TypeError, match="conv_bf16x3: x must be fp32"):
        layer(torch.zeros(1, layer.in_channels, 4, 4, dtype=torch.float64))


def test_gradients_that_lie_apart_do_not_hold_up_the_others(monkeypatch):
    """On a GPU `_foreach_copy_` launches once for each tensor where one of them has other strides."""
    wide = torch.randn(4, 3, 2, 2)[:, :2]
    tensors = [torch.randn(3, 5), wide, torch.randn(7)]
    together, foreach = [], torch._foreach_copy_

    def copy(out, given):
        together.extend(a.stride() == b.stride() for a, b in zip(out, given, strict=True))
        foreach(out, given)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    made = precision._cast(tensors, [torch.float16] * 3)
    assert together == [True, True]
    for a, b in zip(made, tensors, strict=True):
        assert torch.equal(a, b.half())
