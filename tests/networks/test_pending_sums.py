"""What EDM's networks leave to others on a GPU: residual sums to the normalisation after them, the first
convolution's bias to its weights, the last one's to the loss."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import parametrize

from tcm_fast import build_network
from tcm_fast.kernels import _triton
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks.layers import Conv2d, PendingSum

SHAPE = dict(img_resolution=4, img_channels=3, model_channels=8, channel_mult=(1, 2), num_blocks=1)


def network(name, device, attn_resolutions=(2,), **options):
    torch.manual_seed(0)
    if name == "adm":  # whose heads have 64 channels
        attn_resolutions, options = (), dict(model_channels=64, channel_mult=(1,))
    net = build_network(
        name, **SHAPE | options, attn_resolutions=attn_resolutions, dropout=0.2
    ).train()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net.to(device, memory_format=torch.channels_last)


def step(net, device):
    """Output, and gradients of all parameters by name."""
    net.zero_grad()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    key = PhiloxKey(seed=3, step=5, sample=torch.arange(2, device=device))
    y = net(x, torch.tensor([0.5, 20.0], device=device), dropout_key=key)
    y.square().mean().backward()
    return {"output": y.detach()} | {name: p.grad for name, p in net.named_parameters()}


def close(found, expected):
    for name, tensor in expected.items():
        atol = 1e-4 * tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", pytest.param("adm", marks=pytest.mark.slow)])
def test_numbers_are_the_references(name, triton_device, monkeypatch):
    monkeypatch.delenv("TCM_FAST_BACKEND")  # the attention of these widths is a library's
    net = network(name, triton_device)
    before = _triton.LAUNCHES.copy()
    ours = step(net, triton_device)
    launched = _triton.LAUNCHES - before
    norms = sum(2 + b.attention for b in net.model.blocks()) + 1
    assert launched["_group_norm_silu_fwd_kernel"] == norms
    convs = [b.skip for b in net.model.blocks() if isinstance(b.skip, Conv2d)]
    convs += [b.proj for b in net.model.blocks() if b.attention]
    assert launched["_residual_conv1x1_kernel"] == len(convs)
    assert launched["_residual_fwd_kernel"] == 0
    # NCSN++ adds its encoder's residual to a sum that so is nobody's to normalise.
    assert launched["_residual_bwd_kernel"] == (name == "ncsnpp")
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    close(ours, step(net, triton_device))


def test_recomputed_they_are_the_same(triton_device, monkeypatch):
    """There sums are carried out before: what is kept is one tensor."""
    monkeypatch.delenv("TCM_FAST_BACKEND")
    net = network("ddpmpp", triton_device, attn_resolutions=(), channel_mult=(1,))
    plain = step(net, triton_device)
    for i, block in enumerate(net.model.blocks()):
        block.recompute_whole, block.recompute_norms = i % 2 == 0, i % 2 == 1
    before = _triton.LAUNCHES["_residual_fwd_kernel"]
    close(step(net, triton_device), plain)
    assert _triton.LAUNCHES["_residual_fwd_kernel"] > before


def test_who_asks_for_no_pending_sum_gets_none(triton_device, monkeypatch):
    monkeypatch.delenv("TCM_FAST_BACKEND")
    block = network("ddpmpp", triton_device).model.dec["2x2_in0"].eval()
    x = torch.randn(2, 16, 2, 2, device=triton_device).to(memory_format=torch.channels_last)
    emb = torch.randn(2, 32, device=triton_device)
    whole = block(x, emb)
    pending, past = block(x, emb, pends=True, returns_x=True)
    assert isinstance(pending, PendingSum)
    assert pending.shape == whole.shape
    assert torch.equal(past, x)
    assert torch.equal(block.norm0(pending), block.norm0(whole))
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    assert isinstance(block(x, emb, pends=True), torch.Tensor)


class Wrapped(torch.nn.Module):
    """A layer in another module's hands."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x, **options):
        return self.layer(x, **options)


def test_a_convolution_that_is_watched_or_replaced_is_called(triton_device, monkeypatch):
    monkeypatch.delenv("TCM_FAST_BACKEND")
    net = network("ddpmpp", triton_device)
    plain = step(net, triton_device)
    called, handles = [], []
    for block in net.model.blocks():
        for layer in (block.skip, *([block.proj] if block.attention else [])):
            if isinstance(layer, Conv2d):
                handles.append(layer.register_forward_hook(lambda layer, *_: called.append(layer)))
    before = _triton.LAUNCHES["_residual_conv1x1_kernel"]
    close(step(net, triton_device), plain)
    assert len(set(called)) == len(handles) > 0
    assert _triton.LAUNCHES["_residual_conv1x1_kernel"] == before
    for handle in handles:
        handle.remove()
    block = net.model.dec["2x2_in0"]
    block.proj = Wrapped(block.proj)
    found = step(net, triton_device)
    close({name.replace("proj.layer", "proj"): v for name, v in found.items()}, plain)


@pytest.mark.slow
def test_compiled_and_with_other_weights(triton_device, monkeypatch):
    monkeypatch.delenv("TCM_FAST_BACKEND")
    net = network("ddpmpp", triton_device, attn_resolutions=(), channel_mult=(1,)).eval()
    x, t = torch.randn(2, 3, 4, 4, device=triton_device), torch.ones(2, device=triton_device)
    weights = {name: 0.9 * p.detach() for name, p in net.named_parameters()}
    found = functional_call(net, weights, (x, t))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(x, t)
    torch.testing.assert_close(compiled, net(x, t))
    net.load_state_dict(net.state_dict() | weights)
    torch.testing.assert_close(net(x, t), found)


# ---- the first and the last convolution's biases -------------------------------------------------


@pytest.mark.parametrize("name", ["ddpmpp", "adm"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_channel_of_ones_brings_the_first_bias(name, layout):
    """In float64: the result, and all gradients."""
    net = network(name, "cpu").double().to(memory_format=layout).eval()
    x, t = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0.5, 20.0]).double()
    x = x.contiguous(memory_format=layout)
    upstream = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = net.raw(x, t)
    grads = torch.autograd.grad(expected, list(net.parameters()), upstream)
    ones = torch.ones(2, 1, 4, 4, dtype=torch.float64)
    found = net.raw(torch.cat([x, ones], 1), t, with_ones=True)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, list(net.parameters()), upstream), grads, strict=True
    ):
        torch.testing.assert_close(a, b)


def test_who_takes_a_channel_of_ones():
    takes = {name: network(name, "cpu").model.takes_ones for name in ("ddpmpp", "ncsnpp", "adm")}
    assert takes == {"ddpmpp": True, "ncsnpp": False, "adm": True}
    net = network("ddpmpp", "cpu")
    with pytest.raises(ValueError, match=r"x: must be \[N,3,4,4\] .* got \[1, 4, 4, 4\]"):
        net.raw(torch.zeros(1, 4, 4, 4), torch.ones(1))


@pytest.mark.parametrize("name", ["ddpmpp", "adm"])
@pytest.mark.parametrize("training", [False, True])
def test_the_last_bias_comes_apart(name, training, triton_device, monkeypatch):
    monkeypatch.delenv("TCM_FAST_BACKEND")
    net = network(name, triton_device, attn_resolutions=(), channel_mult=(1,)).eval()
    x, t = torch.randn(2, 3, 4, 4, device=triton_device), torch.ones(2, device=triton_device)
    bias = net.model.get_parameter(net.model.last_bias)
    with torch.set_grad_enabled(training):
        whole = net.raw(x, t)
        output, apart = net.raw_and_bias(x, t)
    assert apart.shape == (2, 3)
    assert torch.equal(apart, bias.expand(2, 3))
    torch.testing.assert_close(output + apart[:, :, None, None], whole)
    if training:
        (grad,) = torch.autograd.grad(apart, bias, torch.ones_like(apart))
        assert torch.equal(grad, torch.full_like(bias, 2))
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    output, apart = net.raw_and_bias(x, t)
    assert apart is None
    assert torch.equal(output, net.raw(x, t))


class Apart(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net.raw_and_bias(x, t)


def test_a_last_bias_that_is_no_parameter(triton_device, monkeypatch):
    """Plain tensors of a functional call go out apart as well, what is computed (or None) does not."""
    monkeypatch.delenv("TCM_FAST_BACKEND")
    net = network("ddpmpp", triton_device, attn_resolutions=(), channel_mult=(1,)).eval()
    *_, last = net.model.dec.values()
    x, t = torch.randn(2, 3, 4, 4, device=triton_device), torch.ones(2, device=triton_device)
    plain = {name: 0.5 * p.detach() for name, p in Apart(net).named_parameters()}
    _, apart = functional_call(Apart(net), plain, (x, t))
    assert torch.equal(apart, 0.5 * last.bias.expand(2, 3))
    parametrize.register_parametrization(last, "bias", torch.nn.Tanh())
    output, apart = net.raw_and_bias(x, t)
    assert apart is None
    assert torch.equal(output, net.raw(x, t))
    parametrize.remove_parametrizations(last, "bias")
    last.bias = None
    output, apart = net.raw_and_bias(x, t)
    assert apart is None
    assert torch.equal(output, net.raw(x, t))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp", "edm2"])
def test_compiled_with_and_without_gradients(name, triton_device, monkeypatch):
    monkeypatch.delenv("TCM_FAST_BACKEND")
    options = {"channels_per_head": 8} if name == "edm2" else {}
    net = network(name, triton_device, attn_resolutions=(), channel_mult=(1,), **options).eval()
    x, t = torch.randn(2, 3, 4, 4, device=triton_device), torch.ones(2, device=triton_device)
    expected = step(net, triton_device)
    with torch.no_grad():
        output, bias = net.raw_and_bias(x, t)
    net.model.compile(backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(net.raw_and_bias(x, t), (output, bias))
    close(step(net, triton_device), expected)
