"""Gradients that are summed over the batch for all layers at once."""

import pytest
import torch

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks import build_network, layers, unet, unet_block
from tcm_fast.networks import by_sample as module
from tcm_fast.networks.precision import cast_weights
from tcm_fast.networks.recompute import set_recompute

OPTIONS = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
FAMILIES = {
    "ddpmpp": {},
    "ncsnpp": {},
    "adm": {"model_channels": 64},
    "edm2": {"channels_per_head": 16},
}


def network(family, device="cpu"):
    torch.manual_seed(0)
    options = OPTIONS | FAMILIES[family] | {"dropout": 0.2}
    net = build_network(family, img_resolution=8, img_channels=2, **options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.to(device, memory_format=torch.channels_last).train()


def gradients(net, weights=None, dtype=torch.float32, parts=1):
    """After a pass forward and backward over three samples, in so many parts."""
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(2, 3, 2, 8, 8, generator=generator).to(device, dtype)
    t = torch.tensor([0.3, 1.0, 4.0], device=device)
    net.zero_grad()
    for rows in torch.arange(3).tensor_split(parts):
        key = PhiloxKey(seed=3, step=5, sample=rows.to(device))
        net.raw(x[rows], t[rows], dropout_key=key, weights=weights).backward(upstream[rows])
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["ddpmpp", "ncsnpp", "adm"])
def test_the_names_are_the_networks(family):
    names = network(family).model.by_sample_names()
    assert len(set(names)) == len(names) > 0
    assert set(names) <= {name for name, _ in network(family).model.named_parameters()}
    assert module.by_sample(network(family).model, torch.zeros(2, 2, 8, 8)) == {}  # on a CPU


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The way of a GPU's kernels, with the references in their places."""
    for place in (module, layers, unet_block):
        monkeypatch.setattr(place, "runs_triton", lambda *_: True)


def near(ours, plain, tolerance):
    assert ours.keys() == plain.keys()
    for name in ours:
        error = (ours[name] - plain[name]).norm() / plain[name].norm().clamp(min=1e-6)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_layer(family, as_on_a_gpu, monkeypatch):
    """Over parts of a batch they add up: no two share memory."""
    net = network(family)
    ours = [gradients(net, parts=parts) for parts in (1, 1, 2)]
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])
    monkeypatch.setattr(module, "runs_triton", lambda *_: False)
    plain = gradients(net)
    near(ours[0], plain, 1e-5)
    near(ours[2], plain, 1e-4)


@pytest.mark.parametrize("way", [{"norms": True}, {"blocks_from": 8}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_may_be_computed_again(family, way, as_on_a_gpu):
    net = network(family)
    plain = gradients(net)
    set_recompute(net.model, **way)
    again = gradients(net)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_where_a_sum_has_no_kernel_after_all(as_on_a_gpu, monkeypatch):
    """As in the pass in which it turns out that it does not compile: the convolutions add the biases."""
    net = network("ddpmpp")
    plain = gradients(net)
    for place in (layers, unet_block):
        monkeypatch.setattr(place, "runs_triton", lambda *_: False)
    near(gradients(net), plain, 1e-5)


@pytest.mark.parametrize("family", ["ddpmpp", "edm2"])
def test_in_16_bits_they_reach_the_parameters_in_fp32(family, as_on_a_gpu, monkeypatch):
    net = network(family)
    for parameter in net.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ours = gradients(net, cast_weights(net, torch.bfloat16), torch.bfloat16)
    assert all(grad.dtype == torch.float32 for grad in ours.values())
    monkeypatch.setattr(module, "runs_triton", lambda *_: False)
    plain = gradients(net, cast_weights(net, torch.bfloat16), torch.bfloat16)
    near(ours, plain, 2**-8)  # which the biases' were rounded to


def test_a_parameter_without_a_gradient_is_left_alone(as_on_a_gpu):
    net = network("ddpmpp")
    fixed = "dec.4x4_in0.norm0.weight"
    net.model.get_parameter(fixed).requires_grad_(False)
    found = gradients(net)
    assert f"model.{fixed}" not in found
    assert len(found) == len(list(net.parameters())) - 1
    assert module.by_sample(net.model, torch.zeros(0, 2, 8, 8)) == {}
    with torch.no_grad():
        assert module.by_sample(net.model, torch.zeros(2, 2, 8, 8)) == {}


@pytest.mark.slow
def test_by_the_kernels(triton_device, monkeypatch):
    net = network("ddpmpp", triton_device)
    ours = [gradients(net) for _ in range(2)]
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    near(ours[0], gradients(net), 1e-4)


def test_all_modulations_are_each_blocks(monkeypatch):
    """Of one product, with gradients that add up over parts of a batch."""
    for family in ("ddpmpp", "adm"):
        net = network(family)
        ours = gradients(net, parts=2)
        monkeypatch.setattr(
            unet,
            "modulations",
            lambda blocks, emb: [unet_block.modulations([block], emb)[0] for block in blocks],
        )
        plain = gradients(net, parts=2)
        monkeypatch.undo()
        for name in ours:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["ddpmpp", "ncsnpp", "adm"])
def test_a_network_that_is_bf16_as_a_whole(family, as_on_a_gpu, monkeypatch):
    net = network(family).eval().to(torch.bfloat16)
    ours = gradients(net, dtype=torch.bfloat16)
    assert {grad.dtype for grad in ours.values()} == {torch.bfloat16}
    monkeypatch.setattr(module, "runs_triton", lambda *_: False)
    plain = gradients(net, dtype=torch.bfloat16)
    large = [
        name for name in plain if plain[name].norm() > 0.01 * max(p.norm() for p in plain.values())
    ]
    near({name: ours[name] for name in large}, {name: plain[name] for name in large}, 0.1)


def test_convolutions_without_a_bias(as_on_a_gpu, monkeypatch):
    net = network("ddpmpp").eval()
    for block in net.model.blocks():
        block.conv1.bias = None
    ours = gradients(net)
    monkeypatch.setattr(module, "runs_triton", lambda *_: False)
    near(ours, gradients(net), 1e-4)
