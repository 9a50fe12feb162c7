"""ADM: names, counts, formulas."""

import math

import pytest
import torch
from plain_unets import PlainEdm

from tcm_fast.networks import build_network
from tcm_fast.networks.adm import DhariwalUNet
from tcm_fast.networks.unet_block import UNetBlock


def narrow(res=8, channels=2, label_dim=0, **options):
    torch.manual_seed(0)
    options = {
        "model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
        "dropout": 0.0,
    } | options  # fmt: skip
    return DhariwalUNet(res, channels, channels, label_dim, **options)


@pytest.fixture(scope="module")
def imagenet64():
    with torch.device("meta"):
        return build_network("adm", img_resolution=64, img_channels=3, label_dim=1000)


def test_parameter_count(imagenet64):
    assert sum(p.numel() for p in imagenet64.parameters()) == 295_899_267


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("map_layer0.weight", (768, 192)),
        ("map_layer1.bias", (768,)),
        ("map_label.weight", (768, 1000)),
        ("enc.64x64_conv.weight", (192, 3, 3, 3)),
        ("enc.64x64_block0.affine.weight", (384, 768)),
        ("enc.64x64_block0.norm1.weight", (192,)),
        ("enc.32x32_down.conv0.resample_filter", (1, 1, 2, 2)),
        ("enc.32x32_down.skip.resample_filter", (1, 1, 2, 2)),
        ("enc.32x32_block0.skip.weight", (384, 192, 1, 1)),
        ("enc.32x32_block2.qkv.weight", (1152, 384, 1, 1)),
        ("dec.8x8_in0.proj.bias", (768,)),
        ("dec.8x8_block0.conv0.weight", (768, 1536, 3, 3)),
        ("dec.32x32_up.skip.resample_filter", (1, 1, 2, 2)),
        ("dec.64x64_block3.conv0.weight", (192, 384, 3, 3)),
        ("out_norm.weight", (192,)),
        ("out_conv.weight", (3, 192, 3, 3)),
    ],
)
def test_state_dict_names(imagenet64, name, shape):
    assert imagenet64.state_dict()[f"model.{name}"].shape == shape


def test_state_dict_has_nothing_else(imagenet64):
    state = imagenet64.state_dict()
    assert "model.enc.32x32_down.skip.weight" not in state
    assert "model.map_label.bias" not in state
    assert {name.split(".")[-2] for name in state} == {
        "map_layer0", "map_layer1", "map_label", "64x64_conv", "norm0", "conv0", "affine", "norm1",
        "conv1", "skip", "norm2", "qkv", "proj", "out_norm", "out_conv",
    }  # fmt: skip


def test_attention_sites(imagenet64):
    sites = {
        name.removeprefix("model."): block.num_heads
        for name, block in imagenet64.named_modules()
        if isinstance(block, UNetBlock) and block.attention
    }
    heads = {32: 6, 16: 9, 8: 12}
    expected = {f"enc.{r}x{r}_block{i}": h for r, h in heads.items() for i in range(3)}
    expected |= {f"dec.{r}x{r}_block{i}": h for r, h in heads.items() for i in range(4)}
    assert sites == expected | {"dec.8x8_in0": 12}


@pytest.mark.parametrize("label_dim", [0, 3])
@pytest.mark.parametrize("levels", [1, 3])
def test_is_its_formulas(compare_with_plain, label_dim, levels):
    attn = [8 >> levels - 1]
    net = narrow(label_dim=label_dim, channel_mult=[1, 1, 2][:levels], attn_resolutions=attn)
    labels = torch.eye(3)[[2, 0, 1]] if label_dim else None
    shape = {"resolution": 8, "levels": levels, "blocks": 1, "attn": attn}
    compare_with_plain(net, lambda state: PlainEdm(state, adm=True, **shape), labels)


def test_initialisation():
    net = narrow(label_dim=100, augment_dim=9)
    block = net.enc["4x4_block0"]
    for name in ("conv0", "affine", "skip", "qkv"):
        layer = getattr(block, name)
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert 0.9 * bound < layer.weight.abs().max() <= bound * (1 + 1e-5), name
        assert 0 < layer.bias.abs().max() <= bound * (1 + 1e-5), name
    for name in ("conv1", "proj"):
        layer = getattr(block, name)
        assert not layer.weight.any(), name
        assert not layer.bias.any(), name
    assert not net.out_conv.weight.any()
    assert not net.map_augment.weight.any()
    assert abs(net.map_label.weight.std() - 1) < 0.05
    assert net(torch.randn(2, 2, 8, 8), torch.zeros(2), torch.eye(100)[:2]).abs().max() == 0


def test_augmentation_labels_are_optional():
    net = narrow(augment_dim=9)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    plain = net(x, c_noise)
    assert torch.allclose(plain, net(x, c_noise, augment_labels=torch.zeros(2, 9)), atol=1e-5)
    assert not torch.allclose(plain, net(x, c_noise, augment_labels=torch.ones(2, 9)), atol=1e-3)


def test_layouts_agree():
    net = narrow()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    plain = net(x, c_noise)
    last = net.to(memory_format=torch.channels_last)(x, c_noise)
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-4)


def test_compiles_to_one_graph():
    net = narrow()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, c_noise), net(x, c_noise))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"res": 6, "channel_mult": [1, 1, 1]}, "img_resolution: must be divisible by 4"),
        ({"attn_resolutions": [32]}, "attn_resolutions: .* 8, 4, got 32"),
        ({"model_channels": 48}, "channels_per_head: must divide .* 96, got 64"),
        ({"model_channels": 130, "attn_resolutions": []}, r"min\(32, C/4\) groups divide"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        narrow(**options)
