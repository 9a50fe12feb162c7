"""NCSN++: names, counts, formulas."""

import pytest
import torch
from plain_unets import PlainEdm

from tcm_fast.networks import build_network
from tcm_fast.networks.ddpmpp import NCSNpp
from tcm_fast.networks.layers import FourierEmbedding


def narrow(res=8, channels=2, label_dim=0, **options):
    torch.manual_seed(0)
    options = {
        "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
        "dropout": 0.0,
    } | options  # fmt: skip
    return NCSNpp(res, channels, channels, label_dim, **options)


@pytest.fixture(scope="module")
def cifar10():
    with torch.device("meta"):
        return build_network("ncsnpp", img_resolution=32, img_channels=3)


def test_parameter_count(cifar10):
    assert sum(p.numel() for p in cifar10.parameters()) == 56_395_523


def test_ict_deep_is_twice_as_deep(cifar10):
    with torch.device("meta"):
        deep = build_network("ict-deep", img_resolution=32, img_channels=3)
    assert deep.spec["num_blocks"] == 2 * cifar10.spec["num_blocks"]
    assert deep.spec["fourier_scale"] == 0.02
    assert sum(p.numel() for p in deep.parameters()) > 1.7 * 56_395_523


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("map_noise.freqs", (128,)),
        ("map_layer0.weight", (512, 256)),
        ("map_layer1.bias", (512,)),
        ("enc.32x32_conv.weight", (128, 3, 3, 3)),
        ("enc.16x16_down.conv0.resample_filter", (1, 1, 4, 4)),
        ("enc.16x16_aux_residual.weight", (256, 3, 3, 3)),
        ("enc.16x16_aux_residual.bias", (256,)),
        ("enc.16x16_aux_residual.resample_filter", (1, 1, 4, 4)),
        ("enc.8x8_aux_residual.weight", (256, 256, 3, 3)),
        ("dec.16x16_up.skip.resample_filter", (1, 1, 4, 4)),
        ("dec.32x32_aux_conv.weight", (3, 256, 3, 3)),
    ],
)
def test_state_dict_names(cifar10, name, shape):
    assert cifar10.state_dict()[f"model.{name}"].shape == shape


@pytest.mark.parametrize("label_dim", [0, 3])
@pytest.mark.parametrize("levels", [1, 3])
def test_is_its_formulas(compare_with_plain, label_dim, levels):
    attn = [8 >> levels - 1]
    net = narrow(label_dim=label_dim, channel_mult=[1, 2, 2][:levels], attn_resolutions=attn)
    labels = torch.eye(3)[[2, 0, 1]] if label_dim else None
    shape = {"resolution": 8, "levels": levels, "blocks": 1, "attn": attn, "taps": (1, 3, 3, 1)}
    compare_with_plain(net, lambda state: PlainEdm(state, adm=False, **shape), labels)


def test_fourier_embedding():
    torch.manual_seed(0)
    assert abs(FourierEmbedding(8192).freqs.std() - 16) < 1
    assert abs(FourierEmbedding(8192, 0.02).freqs.std() - 0.02) < 0.002


def test_compiles_to_one_graph():
    net = narrow()
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, c_noise), net(x, c_noise))
