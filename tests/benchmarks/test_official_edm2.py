"""The plainly written EDM2: the same numbers as ours, and what ours saves beside it, counted."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tcm_fast.benchmarks.official_edm2 import OfficialStyleEdm2, PlainBlock, weighted_cat
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks import build_network, force_rows
from tcm_fast.networks.edm2 import EDM2Block
from tcm_fast.networks.mp_layers import MPConv

SHAPE = dict(
    img_resolution=8, img_channels=2, label_dim=3, model_channels=16, channel_mult=(1, 2),
    num_blocks=1, attn_resolutions=(4,), channels_per_head=16, dropout=0.0,
)  # fmt: skip


def test_outputs_and_gradients_are_ours():
    torch.manual_seed(0)
    ours = build_network("edm2", **SHAPE)
    plain = OfficialStyleEdm2(**SHAPE)
    for parameter in ours.parameters():
        parameter.data += 0.5 * (parameter.ndim == 0)
    force_rows(ours)
    plain.load_state_dict(ours.model.state_dict(), strict=True)
    x, noise, plain.labels = torch.randn(3, 2, 8, 8), torch.randn(3), torch.eye(3)
    outputs = [ours.model(x, noise, torch.eye(3)), plain.train()(x, noise)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(outputs[0])
    grads = [
        dict(zip([n for n, _ in net.named_parameters()],
                 torch.autograd.grad(out, list(net.parameters()), upstream), strict=True))
        for net, out in zip((ours.model, plain), outputs, strict=True)
    ]  # fmt: skip
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=2e-3, atol=1e-4, msg=name)


# ---- bytes and launches of a block --------------------------------------------------------------

OPERATIONS = (
    *("pixel_norm_mp_silu", "mp_cat_mp_silu", "modulate_mp_silu", "mp_sum", "resample"),
    "qkv_attention",
)
MATMULS = ("convolution", "mm", "bmm", "addmm")
FREE = (  # views, and memory that nothing has written yet
    *(
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose",
        "t",
        "expand",
        "unsqueeze",
        "squeeze",
    ),
    *(
        "select",
        "slice",
        "unbind",
        "detach",
        "alias",
        "empty",
        "empty_like",
        "new_empty",
        "as_strided",
    ),
    *("split", "chunk", "narrow", "empty_strided", "new_empty_strided", "flatten"),
)


class Counting(TorchDispatchMode):
    """Counts the operations that start kernels, and the bytes that those other than matrix products and
    convolutions read and write; of our own operations what they are made of."""

    def __init__(self):
        super().__init__()
        self.bytes, self.launches, self.names = 0, 0, []

    def add(self, name, *tree):
        if name in FREE:
            return
        self.launches += 1
        self.names.append(name)
        if not any(name.startswith(m) or name.endswith(f"_{m}") for m in MATMULS):
            moved = {id(v): v.numel() * v.element_size() for v in tensors(tree)}
            self.bytes += sum(moved.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "tcm_fast":
            operation, _, part = name.rpartition("_")
            module = importlib.import_module(f"tcm_fast.kernels.{operation}")
            with self:
                return getattr(module, f"_{part}")(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.add(name, args, kwargs, out)
        return out


def tensors(tree):
    return [v for v in tree_leaves(tree) if torch.is_tensor(v)]


@pytest.fixture
def cost(monkeypatch):
    """What a forward and a backward pass of one block of EDM2-S costs at batch 16 in fp16, on tensors that
    have only a shape: the kernels in the place of their references, each launch noted. The plain block
    normalises its weights; ours finds them normalised, as a step does once for all of its passes."""
    pytest.importorskip("triton")
    count = None
    for name in OPERATIONS:
        module = importlib.import_module(f"tcm_fast.kernels.{name}")
        monkeypatch.setattr(module, "runs_triton", lambda *_: True)
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, *args, **_: count.add(kernel.__name__, args)
        )
        if name == "qkv_attention":
            monkeypatch.setattr(module, "_capability", lambda device: 90)

    def run(kind, name):
        nonlocal count
        count = Counting()
        block_pass(kind, count, *BLOCKS[name])
        return count

    return run


def block_pass(kind, count, size, inputs, outputs, encoder, attention, skip):
    n, p, layout = 16, 0.4 if size <= 16 else 0.0, torch.channels_last
    inputs, outputs, skip = 192 * inputs, 192 * outputs, 192 * skip
    options = {"layer": 0, "encoder": encoder, "attention": attention}
    with torch.device("meta"):
        if kind == "plain":
            block = PlainBlock(inputs + skip, outputs, 768, p=p, **options)
        else:
            block = EDM2Block(inputs + skip, outputs, 768, dropout=p, **options)
            for layer in block.modules():
                if isinstance(layer, MPConv):
                    layer.scaled = layer.weight.detach().half().requires_grad_()
        block.train().to(memory_format=layout)

        def features(channels):
            x = torch.randn(n, channels, size, size).half()
            return x.contiguous(memory_format=layout).requires_grad_()

        x, upstream = features(inputs), features(outputs).detach()
        merged = features(skip) if skip else None
        emb = torch.randn(n, 768).half().requires_grad_()
        zero = torch.zeros((), dtype=torch.int64)
        key = PhiloxKey(seed=zero, step=zero, sample=torch.arange(n))
    with count:
        if kind == "plain":
            y = x if merged is None else weighted_cat(x, merged)
            y = block(y, emb, lambda v, p, _: torch.native_dropout(v, p, True)[0])
        else:
            y, _ = block(x, emb, key, skip=merged)
        y.backward(upstream)


BLOCKS = {  # resolution, width in and out over EDM2-S's 192, side, attention, width of what it merges
    "enc.64x64_block1": (64, 1, 1, True, False, 0),
    "enc.32x32_block0": (32, 1, 2, True, False, 0),
    "enc.16x16_block1": (16, 3, 3, True, True, 0),
    "dec.64x64_block1": (64, 1, 1, False, False, 1),
    "dec.16x16_block1": (16, 3, 3, False, True, 3),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_moves_at_most_45_percent_of_the_bytes_in_35_percent_of_the_launches(name, cost):
    plain, ours = cost("plain", name), cost("ours", name)
    assert "_modulate_mp_silu_bwd_kernel" in ours.names
    megabytes = [count.bytes / 1e6 for count in (ours, plain)]
    print(f"{name}: {megabytes[0]:.0f} of {megabytes[1]:.0f} MB")
    print(f"{ours.launches} of {plain.launches} launches")
    assert megabytes[0] < 0.45 * megabytes[1]
    assert ours.launches < 0.35 * plain.launches
