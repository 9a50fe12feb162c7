"""Activations computed again: the same numbers, less memory, in every precision."""

import pytest
import torch

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks import build_network
from tcm_fast.networks.precision import cast_weights, is_derived
from tcm_fast.networks.raw_network import RawNetwork
from tcm_fast.networks.recompute import run_block, set_recompute

WAYS = [{"norms": True}, {"blocks_from": 1}, {"blocks_from": 8}, {"norms": True, "blocks_from": 8}]


def network(name="ddpmpp", **options):
    torch.manual_seed(0)
    width = {"adm": 64, "edm2": 64}.get(name, 16)
    options = {"model_channels": width, "channel_mult": [1, 2], "attn_resolutions": [4]} | options
    options |= {"num_blocks": 1} if width > 16 else {}
    net = build_network(name, img_resolution=8, img_channels=3, dropout=0.2, **options)
    with torch.no_grad():  # what starts at zero would hide wrong gradients
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def step(net, dtype=torch.float32, n=3):
    """Output and gradients, and the bytes that autograd keeps."""
    kept = {}

    def pack(x):
        if not any(x.untyped_storage()._cdata == p.untyped_storage()._cdata for p in own):
            kept[x.untyped_storage()._cdata] = x  # held: addresses must not be used again
        return x

    net.zero_grad()
    torch.manual_seed(1)
    x, t = torch.randn(n, 3, 8, 8), torch.rand(n) + 0.5
    key = PhiloxKey(seed=3, step=5, sample=torch.arange(n))
    weights = cast_weights(net, dtype) if is_derived(net, dtype) else None
    own = [*net.parameters(), *(weights or {}).values()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = net.raw(x.to(dtype), t, dropout_key=key, weights=weights)
    size = sum(x.untyped_storage().nbytes() for x in kept.values())
    kept.clear()
    out.float().square().sum().backward()
    return out.detach(), [p.grad for p in net.parameters()], size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm", "edm2"])
def test_the_numbers_stay_and_the_memory_falls(name, way, dtype):
    net = network(name)
    out, grads, size = step(net, dtype)
    set_recompute(net.model, **way)
    again, again_grads, again_size = step(net, dtype)
    assert torch.equal(out, again)
    assert all(g.abs().max() > 0 for g in grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))
    assert again_size < size


def test_more_is_recomputed_from_a_lower_resolution_on():
    net = network()
    counts = [set_recompute(net.model, blocks_from=r) for r in (1, 8, 16, None)]
    assert counts[0] == sum(hasattr(m, "recompute_whole") for m in net.modules()) > counts[1] > 0
    assert counts[2:] == [0, 0]
    set_recompute(net.model, norms=True, blocks_from=8)
    blocks = [m for m in net.modules() if hasattr(m, "recompute_whole")]
    assert all(b.recompute_whole != b.recompute_norms for b in blocks)


def test_norms_alone_do_not_repeat_a_convolution(monkeypatch):
    net = network()
    calls = []
    convolve = torch.nn.Conv2d._conv_forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "_conv_forward", lambda self, *a: (calls.append(1), convolve(self, *a))[1]
    )
    step(net)
    plain = len(calls)
    finished = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda *a: (conv2d(*a), finished.append(1))[0]
    )
    set_recompute(net.model, norms=True)
    step(net)
    # Asked for again, but stopped before it computes: its input was all that the gradient lacked.
    assert len(finished) == plain


def test_without_gradients_nothing_is_kept_or_repeated():
    net = network()
    set_recompute(net.model, blocks_from=1)
    with torch.no_grad():
        assert not net.raw(torch.randn(2, 3, 8, 8), torch.ones(2)).requires_grad


@pytest.mark.parametrize("way", [{"norms": True}, {"blocks_from": 1}], ids=str)
def test_the_kernels_numbers_stay_too(way, triton_device):
    net = network(model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]).model
    block = net.dec["8x8_in0"].to(triton_device)
    wrapper = RawNetwork()
    wrapper.block = block
    x = torch.randn(2, 8, 8, 8, device=triton_device).to(memory_format=torch.channels_last)
    emb = torch.randn(2, 32, device=triton_device)
    key = PhiloxKey(seed=3, step=5, sample=torch.arange(2, device=triton_device))

    def grads():
        block.zero_grad()
        y = run_block(block, [x.clone().requires_grad_()], emb, key)
        y.square().sum().backward()
        return {"y": y.detach()} | {name: p.grad for name, p in block.named_parameters()}

    plain = grads()
    set_recompute(wrapper, **way)
    for name, found in grads().items():
        if name == "conv1.bias" and "norms" in way:  # summed by the sum's kernel, not the norm's
            torch.testing.assert_close(found, plain[name])
        else:
            assert torch.equal(found, plain[name]), name
