import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks import build_network, layers
from tcm_fast.networks.ddpmpp import SongUNet
from tcm_fast.networks.layers import (
    Conv2d,
    PositionalEmbedding,
)
from tcm_fast.networks.unet_block import UNetBlock


def narrow(res=8, channels=1, label_dim=0, **options):
    torch.manual_seed(0)
    options = {
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
    } | options
    return SongUNet(res, channels, channels, label_dim, **options)


def randomised(net):
    """With every weight large enough to matter: as initialised, most branches end in almost 0."""
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return net


def batch(n=3, res=8, channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, res, res, generator=generator), torch.linspace(-1, 1, n)


def test_upsampling_keeps_the_dtype_where_autocast_does_it_in_fp32(monkeypatch):
    """As CUDA's does, and the CPU's does not: skip and branch are added in one dtype."""
    interpolate = F.interpolate
    wide = lambda x, **options: interpolate(x.float(), **options)  # noqa: E731
    monkeypatch.setattr(layers.F, "interpolate", wide)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float16)
    assert layers.resample_2x(x, None, up=True, is_box=True).dtype == torch.float16


@pytest.fixture(scope="module")
def cifar10():
    with torch.device("meta"):
        return build_network("ddpmpp", img_resolution=32, img_channels=3)


def test_parameter_count(cifar10):
    assert sum(p.numel() for p in cifar10.parameters()) == 55_732_739


def test_attention_sites(cifar10):
    sites = [
        name.removeprefix("model.")
        for name, block in cifar10.named_modules()
        if isinstance(block, UNetBlock) and block.attention
    ]
    encoder = [f"enc.16x16_block{i}" for i in range(4)]
    assert sites == [*encoder, "dec.8x8_in0", "dec.16x16_block4"]


def test_resample_filters(cifar10):
    names = [name for name in cifar10.state_dict() if "resample" in name]
    blocks = ["enc.16x16_down", "enc.8x8_down", "dec.16x16_up", "dec.32x32_up"]
    assert names == [
        f"model.{block}.{layer}.resample_filter" for block in blocks for layer in ("conv0", "skip")
    ]
    net = narrow()
    assert torch.equal(net.enc["4x4_down"].skip.resample_filter, torch.full((1, 1, 2, 2), 0.25))


def test_dropout_layers_are_numbered_in_construction_order(cifar10):
    layers = [block.layer for block in cifar10.modules() if isinstance(block, UNetBlock)]
    assert layers == list(range(len(layers)))
    assert len(layers) == 3 * 4 + 2 + 2 + 3 * 5 + 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("map_layer0.weight", (512, 128)),
        ("map_layer1.bias", (512,)),
        ("enc.32x32_conv.weight", (128, 3, 3, 3)),
        ("enc.32x32_block0.norm0.weight", (128,)),
        ("enc.32x32_block0.conv0.weight", (256, 128, 3, 3)),
        ("enc.32x32_block0.affine.weight", (256, 512)),
        ("enc.32x32_block0.skip.weight", (256, 128, 1, 1)),
        ("enc.16x16_down.conv0.resample_filter", (1, 1, 2, 2)),
        ("enc.16x16_down.skip.weight", (256, 256, 1, 1)),
        ("enc.16x16_block0.norm2.bias", (256,)),
        ("enc.16x16_block0.qkv.weight", (768, 256, 1, 1)),
        ("enc.8x8_block3.conv1.bias", (256,)),
        ("dec.8x8_in0.proj.weight", (256, 256, 1, 1)),
        ("dec.8x8_in1.norm1.weight", (256,)),
        ("dec.8x8_block4.conv0.weight", (256, 512, 3, 3)),
        ("dec.16x16_up.conv1.weight", (256, 256, 3, 3)),
        ("dec.16x16_block4.qkv.bias", (768,)),
        ("dec.32x32_block4.conv0.weight", (256, 384, 3, 3)),
        ("dec.32x32_aux_norm.weight", (256,)),
        ("dec.32x32_aux_conv.weight", (3, 256, 3, 3)),
    ],
)
def test_state_dict_names(cifar10, name, shape):
    assert cifar10.state_dict()[f"model.{name}"].shape == shape


def test_state_dict_has_nothing_else(cifar10):
    state = cifar10.state_dict()
    parts = {name.split(".")[-2] for name in state}
    layers = {"norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj"}
    assert parts == layers | {
        "map_layer0", "map_layer1", "32x32_conv", "32x32_aux_norm", "32x32_aux_conv",
    }  # fmt: skip
    assert {name.split(".")[-1] for name in state} == {"weight", "bias", "resample_filter"}
    labelled = narrow(label_dim=10, augment_dim=9).state_dict()
    assert labelled["map_label.weight"].shape == (8, 10)
    assert labelled["map_label.bias"].shape == (8,)
    assert labelled["map_augment.weight"].shape == (8, 9)
    assert "map_augment.bias" not in labelled


def test_initialisation():
    torch.manual_seed(0)
    block = UNetBlock(64, 128, 256, layer=0, dropout=0.0, attention=True)
    bounds = {
        "conv0": math.sqrt(6 / (9 * (64 + 128))),
        "conv1": math.sqrt(6 / (9 * (128 + 128))) * 1e-5,
        "affine": math.sqrt(6 / (256 + 128)),
        "skip": math.sqrt(6 / (64 + 128)),
        "qkv": math.sqrt(6 / (128 + 3 * 128)) * math.sqrt(0.2),
        "proj": math.sqrt(6 / (128 + 128)) * 1e-5,
    }
    for name, bound in bounds.items():
        layer = getattr(block, name)
        weight = layer.weight / bound
        assert weight.abs().max() <= 1 + 1e-5, name
        # Uniform on [-1,1]: mean 0, variance 1/3, each within five standard errors.
        assert weight.mean().abs() < 5 / math.sqrt(3 * weight.numel()), name
        assert abs(weight.var() - 1 / 3) < 5 * math.sqrt(4 / 45 / weight.numel()), name
        assert (layer.bias == 0).all()
    for name in ("norm0", "norm1", "norm2"):
        assert (getattr(block, name).weight == 1).all()
        assert (getattr(block, name).bias == 0).all()
    net = narrow(model_channels=32)
    bound = math.sqrt(6 / (9 * (32 + 1))) * 1e-5
    assert 0.9 * bound < net.dec["8x8_aux_conv"].weight.abs().max() <= bound * (1 + 1e-5)


def test_positional_embedding():
    c_noise = torch.tensor([0.7, -1.3], dtype=torch.float64)
    emb = PositionalEmbedding(16, endpoint=True)(c_noise)
    for row, value in zip(emb, c_noise.tolist(), strict=True):
        for i in range(8):
            angle = value * 10_000 ** (-i / 7)
            assert row[i].item() == pytest.approx(math.cos(angle))
            assert row[8 + i].item() == pytest.approx(math.sin(angle))


def test_positional_embedding_outlives_casts_and_moves():
    c_noise = torch.tensor([0.7, -1.3])
    layer = PositionalEmbedding(16, endpoint=True)
    assert not layer.state_dict()
    expected = layer(c_noise)
    assert torch.equal(layer.half()(c_noise), expected)
    with torch.device("meta"):
        moved = PositionalEmbedding(16, endpoint=True)
    assert torch.equal(moved(c_noise), expected)
    assert torch.equal(moved.to_empty(device="cpu")(c_noise), expected)
    cos, sin = expected.chunk(2, 1)
    swapped = PositionalEmbedding(16, endpoint=True, sin_first=True)(c_noise)
    assert torch.equal(swapped, torch.cat([sin, cos], 1))


def test_embedding_swaps_its_halves():
    net = narrow()
    _, c_noise = batch()
    emb = PositionalEmbedding(8, endpoint=True)(c_noise)
    swapped = torch.cat([emb[:, 4:], emb[:, :4]], 1)
    silu = nn.functional.silu
    assert torch.allclose(net.embed(c_noise), silu(net.map_layer1(silu(net.map_layer0(swapped)))))


def test_block_is_its_formula():
    torch.manual_seed(0)
    block = randomised(UNetBlock(8, 12, 16, layer=0, dropout=0.0, down=True))
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    conv, norm, silu = nn.functional.conv2d, nn.functional.group_norm, nn.functional.silu
    pooled = nn.functional.avg_pool2d
    h = silu(norm(x, 2, block.norm0.weight, block.norm0.bias, 1e-6))
    h = conv(pooled(h, 2), block.conv0.weight, block.conv0.bias, padding=1)
    h = h + block.affine(emb)[:, :, None, None]
    h = silu(norm(h, 3, block.norm1.weight, block.norm1.bias, 1e-6))
    h = conv(h, block.conv1.weight, block.conv1.bias, padding=1)
    h = (h + conv(pooled(x, 2), block.skip.weight, block.skip.bias)) / math.sqrt(2)
    assert torch.allclose(block(x, emb), h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_resampling_is_a_strided_convolution_with_the_filter(taps, kernel_size, direction):
    torch.manual_seed(0)
    layer = Conv2d(3, 5, kernel_size, resample_filter=taps, **{direction: True}).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weight = layer.resample_filter.expand(3, 1, -1, -1)
    options = {"stride": 2, "padding": (len(taps) - 1) // 2, "groups": 3}
    if direction == "up":
        x_resampled = nn.functional.conv_transpose2d(x, 4 * weight, **options)
    else:
        x_resampled = nn.functional.conv2d(x, weight, **options)
    expected = nn.functional.conv2d(x_resampled, layer.weight, layer.bias, padding=kernel_size // 2)
    assert torch.allclose(layer(x), expected)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_depth_and_odd_widths(levels, channels):
    net = narrow(
        12, channels, model_channels=12, channel_mult=[1, 2, 3][:levels], num_blocks=2,
        attn_resolutions=[12 >> levels - 1],
    )  # fmt: skip
    x, c_noise = batch(2, 12, channels)
    y = net(x, c_noise)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_layouts_agree_and_activations_follow_the_weights():
    net = randomised(narrow())
    x, c_noise = batch()
    plain = net(x, c_noise)
    seen = []
    net.dec["8x8_block0"].register_forward_hook(lambda *args: seen.append(args[-1]))
    last = net.to(memory_format=torch.channels_last)(x, c_noise)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(plain, last, rtol=1e-4, atol=1e-4)


def test_same_key_same_masks_whatever_the_layout_and_the_split():
    net = randomised(narrow(dropout=0.3)).train()
    x, c_noise = batch(4)
    key = PhiloxKey(seed=7, step=3, layer=0, sample=torch.arange(4))
    whole = net(x, c_noise, dropout_key=key)
    rows = torch.tensor([3, 1])
    part = net(x[rows], c_noise[rows], dropout_key=key.select(rows))
    assert torch.allclose(whole[rows], part, rtol=1e-4, atol=1e-4)
    last = net.to(memory_format=torch.channels_last)(x, c_noise, dropout_key=key)
    assert torch.allclose(whole, last, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, net(x, c_noise, dropout_key=replace(key, step=4)), atol=1e-2)


def test_train_mode_without_a_key_draws_one_from_the_default_generator():
    net = randomised(narrow(dropout=0.3)).train()
    x, c_noise = batch()
    torch.manual_seed(1)
    first, second = net(x, c_noise), net(x, c_noise)
    torch.manual_seed(1)
    again = net(x, c_noise)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second, atol=1e-2)
    net.eval()
    assert torch.equal(net(x, c_noise), net(x, c_noise))


def test_labels():
    net = randomised(narrow(label_dim=4))
    _, c_noise = batch()
    labels = torch.eye(4)[:3]
    emb = PositionalEmbedding(8, endpoint=True)(c_noise)
    swapped = torch.cat([emb[:, 4:], emb[:, :4]], 1) + net.map_label(labels * 2)
    silu = nn.functional.silu
    expected = silu(net.map_layer1(silu(net.map_layer0(swapped))))
    assert torch.allclose(net.embed(c_noise, labels), expected, atol=1e-5)


def test_label_dropout_zeroes_whole_labels():
    net = randomised(narrow(label_dim=4, label_dropout=0.5)).train()
    n = 64
    labels = torch.eye(4)[torch.arange(n) % 4]
    c_noise = torch.zeros(n)
    key = PhiloxKey(seed=0, step=0, layer=0, sample=torch.arange(n))
    emb = net.embed(c_noise, labels, dropout_key=key)
    net.eval()
    with_label, without = net.embed(c_noise, labels), net.embed(c_noise, 0 * labels)
    kept = torch.isclose(emb, with_label, atol=1e-5).all(1)
    dropped = torch.isclose(emb, without, atol=1e-5).all(1)
    assert (kept ^ dropped).all()
    assert 16 <= kept.sum() <= 48


def test_augmentation_labels_are_optional():
    net = randomised(narrow(augment_dim=9))
    x, c_noise = batch()
    plain = net(x, c_noise)
    assert torch.allclose(plain, net(x, c_noise, augment_labels=torch.zeros(3, 9)), atol=1e-5)
    assert not torch.allclose(plain, net(x, c_noise, augment_labels=torch.ones(3, 9)), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"res": 30, "channel_mult": [1, 1, 1]},
            "img_resolution: must be divisible by 4 .* got 30",
        ),
        ({"res": 0}, "img_resolution: .* got 0"),
        ({"model_channels": 7}, "model_channels: must be even and at least 4, got 7"),
        ({"model_channels": 130}, r"min\(32, C/4\) groups divide, got C=130"),
        ({"num_blocks": 0}, "num_blocks: must be at least 1, got 0"),
        ({"channel_mult": []}, "channel_mult: needs at least one level"),
        ({"channel_mult": [1, 0]}, r"channel_mult: must be positive, got \[1, 0\]"),
        (
            {"attn_resolutions": [16, 4]},
            "attn_resolutions: must be among the resolutions of the levels, 8, 4, got 16",
        ),
        ({"dropout_resolutions": [2]}, "dropout_resolutions: must be among .* 8, 4, got 2"),
        (
            {"embedding_type": "sine"},
            "embedding_type: must be positional or fourier, got 'sine'",
        ),
        ({"encoder_type": "skip"}, "encoder_type: must be standard or residual, got 'skip'"),
        ({"dropout": 1.0}, r"dropout: must lie in \[0, 1\), got 1.0"),
        ({"label_dropout": -0.1}, "label_dropout: must lie in"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message) as error:
        narrow(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": 24},
        {"up": True},
        {"up": True, "resample_filter": (1, 3, 3, 1)},
        {"down": True},
        {"in_channels": 24, "adaptive_scale": True, "skip_scale": 1.0, "attention": True},
        {"down": True, "adaptive_scale": True, "skip_scale": 1.0, "resample_proj": False},
    ],
    ids=str,
)
def test_a_block_with_kernels_is_the_reference(options, triton_device, monkeypatch):
    """Its biases go into the sums there. What leaves it is joined with something, as in the decoder."""
    c_in = options.get("in_channels", 16)
    options = {"layer": 0, "dropout": 0.0} | options | {"in_channels": c_in}
    block = randomised(UNetBlock(out_channels=16, emb_channels=8, **options)).to(triton_device)
    x, emb = torch.randn(2, c_in, 4, 4), torch.randn(2, 8)
    x = x.to(triton_device).contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), emb.to(triton_device).requires_grad_(), *block.parameters()]

    def numbers():
        y = block(*leaves[:2])
        joined = torch.cat([y, 2 * y], 1)
        upstream = torch.linspace(-1, 1, joined.numel(), device=triton_device).view(joined.shape)
        upstream = upstream.contiguous(memory_format=torch.channels_last)
        return y.detach(), *torch.autograd.grad(joined, leaves, upstream)

    ours = numbers()
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    for a, b in zip(ours, numbers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
