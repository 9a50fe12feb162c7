"""EDM2: names, counts, formulas, magnitudes."""

import copy
import math

import pytest
import torch
from plain_unets import PlainEdm2

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks import build_network, force_rows
from tcm_fast.networks.edm2 import EDM2Block, EDM2UNet
from tcm_fast.networks.mp_layers import MPConv, MPFourier, joined, mp_silu, side_by_side
from tcm_fast.networks.precision import in_precision, make_copies

SIZES = {"XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384}
COUNTS = {"XS": 124.7, "S": 280.2, "M": 497.8, "L": 777.5, "XL": 1119.3}


def narrow(res=8, channels=2, label_dim=0, **options):
    torch.manual_seed(0)
    options = {
        "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [4],
        "channels_per_head": 8,
    } | options  # fmt: skip
    return EDM2UNet(res, channels, channels, label_dim, **options)


def build(size, **options):
    with torch.device("meta"):
        return build_network(
            "edm2", img_resolution=64, img_channels=3, label_dim=1000,
            model_channels=SIZES[size], **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return build("S")


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    count = sum(p.numel() for p in build(size).parameters())
    assert round(count / 1e6, 1) == COUNTS[size]


def test_default_size_is_s(small):
    with torch.device("meta"):
        net = build_network("edm2", img_resolution=64, img_channels=3, label_dim=1000)
    assert {n: p.shape for n, p in net.state_dict().items()} == {
        n: p.shape for n, p in small.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("out_gain", ()),
        ("emb_fourier.freqs", (192,)),
        ("emb_fourier.phases", (192,)),
        ("emb_noise.weight", (768, 192)),
        ("emb_label.weight", (768, 1000)),
        ("enc.64x64_conv.weight", (192, 4, 3, 3)),
        ("enc.64x64_block0.emb_gain", ()),
        ("enc.64x64_block0.conv_res0.weight", (192, 192, 3, 3)),
        ("enc.64x64_block0.emb_linear.weight", (192, 768)),
        ("enc.64x64_block0.conv_res1.weight", (192, 192, 3, 3)),
        ("enc.32x32_down.conv_res0.weight", (192, 192, 3, 3)),
        ("enc.32x32_block0.conv_skip.weight", (384, 192, 1, 1)),
        ("enc.32x32_block0.conv_res0.weight", (384, 384, 3, 3)),
        ("enc.16x16_block1.attn_qkv.weight", (1728, 576, 1, 1)),
        ("enc.8x8_block2.attn_proj.weight", (768, 768, 1, 1)),
        ("dec.8x8_in0.attn_qkv.weight", (2304, 768, 1, 1)),
        ("dec.8x8_in1.conv_res1.weight", (768, 768, 3, 3)),
        ("dec.8x8_block3.conv_skip.weight", (768, 1344, 1, 1)),
        ("dec.16x16_up.conv_res0.weight", (768, 768, 3, 3)),
        ("dec.16x16_block3.conv_res0.weight", (576, 960, 3, 3)),
        ("dec.64x64_block3.conv_res0.weight", (192, 384, 3, 3)),
        ("out_conv.weight", (3, 192, 3, 3)),
    ],
)
def test_state_dict_names(small, name, shape):
    assert small.state_dict()[f"model.{name}"].shape == shape


def test_state_dict_has_nothing_else(small):
    state = small.state_dict()
    assert {name.split(".")[-1] for name in state} == {
        "weight", "emb_gain", "out_gain", "freqs", "phases",
    }  # fmt: skip
    assert {name.split(".")[-2] for name in state if name.endswith("weight")} == {
        "emb_noise", "emb_label", "64x64_conv", "conv_res0", "emb_linear", "conv_res1", "conv_skip",
        "attn_qkv", "attn_proj", "out_conv",
    }  # fmt: skip
    assert "model.dec.8x8_in1.conv_skip.weight" not in state
    assert "model.enc.32x32_down.conv_skip.weight" not in state


def test_attention_sites(small):
    sites = [
        n.removeprefix("model.") for n, b in small.named_modules() if getattr(b, "num_heads", 0)
    ]
    encoder = [f"enc.{r}x{r}_block{i}" for r in (16, 8) for i in range(3)]
    decoder = [f"dec.{r}x{r}_block{i}" for r in (8, 16) for i in range(4)]
    assert sites == [*encoder, "dec.8x8_in0", *decoder]


def test_dropout_only_where_chosen():
    net = build("S", dropout=0.4, dropout_resolutions=[16, 8])
    for name, block in net.named_modules():
        if isinstance(block, EDM2Block):
            resolution = int(name.split(".")[-1].split("x")[0])
            assert block.dropout == (0.4 if resolution <= 16 else 0), name
    layers = [b.layer for b in net.modules() if isinstance(b, EDM2Block)]
    assert layers == list(range(len(layers)))


@pytest.mark.parametrize("label_dim", [0, 3])
@pytest.mark.parametrize("levels", [1, 3])
def test_is_its_formulas(compare_with_plain, label_dim, levels):
    attn = [8 >> levels - 1]
    net = narrow(
        label_dim=label_dim, channel_mult=[1, 2, 3][:levels], num_blocks=1, attn_resolutions=attn
    )
    labels = torch.eye(3)[[2, 0, 1]] if label_dim else None
    shape = {"resolution": 8, "levels": levels, "blocks": 1, "attn": attn, "head": 8}
    compare_with_plain(net, lambda state: PlainEdm2(state, **shape), labels)


def test_block_with_fused_kernels_is_its_formula(triton_device):
    """The kernels in place of their references, forward and every gradient."""
    torch.manual_seed(0)
    options = {"encoder": True, "layer": 0, "dropout": 0.0, "attention": True}
    block = EDM2Block(16, 24, 32, **options, channels_per_head=8).to(triton_device)
    torch.nn.init.constant_(block.emb_gain, 0.5)
    x = torch.randn(2, 16, 4, 4, device=triton_device, requires_grad=True)
    emb = torch.randn(2, 32, device=triton_device)
    state = {f"enc.{name}": p for name, p in block.named_parameters()}
    plain = PlainEdm2({n.replace("enc.", "enc.b."): p for n, p in state.items()}, resolution=4,
                      levels=1, blocks=1, attn=[], head=8)  # fmt: skip
    ours, _ = block(x, emb)
    theirs = plain.block(x, emb, "enc.b", attend=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(ours)
    leaves = [x, *block.parameters()]
    for a, b in zip(
        *(torch.autograd.grad(y, leaves, upstream) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_images_may_have_the_channel_of_ones():
    net = narrow_denoiser()
    x, t = torch.randn(3, 2, 8, 8), torch.tensor([0.5, 1.0, 2.0])
    whole = torch.cat([x, torch.ones(3, 1, 8, 8)], 1)
    assert torch.equal(net.raw(whole, t, with_ones=True), net.raw(x, t))
    with pytest.raises(ValueError, match=r"x: must be \[N,2,8,8\] .* got \[3, 3, 8, 8\]"):
        net.raw(whole, t)


def narrow_denoiser():
    torch.manual_seed(0)
    net = build_network(
        "edm2", img_resolution=8, img_channels=2, model_channels=8, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[4], channels_per_head=8,
    )  # fmt: skip
    for p in net.parameters():
        p.data = torch.full_like(p, 0.7) if p.ndim == 0 else p.data
    return net


def test_matrices_that_lie_side_by_side_are_joined_without_a_copy():
    torch.manual_seed(0)
    apart = [torch.randn(n, 6) for n in (3, 1, 5)]
    whole = side_by_side(apart)
    upstream = torch.randn(9, 6)
    ways = [
        (whole, True),
        (whole[:1], True),
        (apart, False),
        (whole[::2], False),
        (whole[::-1], False),
    ]
    for matrices, is_view in ways:
        matrices = [matrix.detach().requires_grad_() for matrix in matrices]
        one = joined(matrices)
        assert torch.equal(one, torch.cat(matrices))
        assert (one.data_ptr() == matrices[0].data_ptr()) == is_view
        grads = torch.autograd.grad(one, matrices, upstream[: len(one)])
        assert torch.equal(torch.cat(grads), upstream[: len(one)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_embeddings_product_takes_the_weights_where_they_lie(dtype):
    net = narrow_denoiser()
    names = [name for name, _ in net.named_parameters()]
    copies = make_copies(net, dtype)
    matrices = [copies[names.index(f"model.{name}")] for name in net.model.joined_names()]
    assert joined(matrices).data_ptr() == matrices[0].data_ptr()
    ready = in_precision(net, dtype).model
    layers = [block.emb_linear for block in ready.blocks()]
    assert len(layers) == len(matrices) > 3
    assert (
        joined([layer.normalized(dtype) for layer in layers]).data_ptr()
        == layers[0].scaled.data_ptr()
    )
    for layer, matrix in zip(layers, matrices, strict=True):
        assert torch.equal(layer.scaled, matrix)


def test_magnitudes_stay_at_one():
    """Through the whole network at initialisation, in train and eval mode alike."""
    torch.manual_seed(0)
    net = EDM2UNet(32, 3, 3, 10, model_channels=32, channel_mult=[1, 2, 2], num_blocks=2,
                   attn_resolutions=[8], channels_per_head=32)  # fmt: skip
    seen = {}
    for name, module in net.named_modules():
        if isinstance(module, EDM2Block):
            for gain in (module.emb_gain,):
                gain.data.fill_(0.3)
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.update(
                    {name: out[0].square().mean().sqrt().item()}
                )
            )
    x, c_noise = torch.randn(8, 3, 32, 32), torch.randn(8) / 4
    labels = torch.eye(10)[torch.arange(8)]
    net(x, c_noise, labels)
    assert len(seen) == 6 + 2 + 2 + 2 + 9
    for name, rms in seen.items():
        assert 0.8 < rms < 1.2, (name, rms)  # zeros beyond the borders take 8 % of a 3x3 at 8x8
    emb = net.embed(c_noise, labels).square().mean().sqrt().item()
    assert 0.85 < emb < 1.15
    assert net(x, c_noise, labels).abs().max() == 0  # out_gain
    net.out_gain.data.fill_(1)
    assert 0.8 < net(x, c_noise, labels).square().mean().sqrt() < 1.2


def test_layers_preserve_magnitude_whatever_their_weights():
    torch.manual_seed(0)
    layer = MPConv(64, 128, 3)
    layer.weight.data *= torch.logspace(-2, 2, 128)[:, None, None, None]
    y = layer(torch.randn(4, 64, 16, 16))[..., 1:-1, 1:-1]
    assert (y.square().mean((0, 2, 3)).sqrt() - 1).abs().max() < 0.15
    assert MPFourier(256)(torch.randn(64)).square().mean().sqrt().item() == pytest.approx(
        1, abs=0.05
    )
    z = torch.randn(10**5, generator=torch.Generator().manual_seed(0))
    assert mp_silu(z).square().mean().sqrt().item() == pytest.approx(1, abs=0.01)


def test_weights_count_by_their_direction_and_forcing_does_not_change_them():
    net = narrow()
    net.out_gain.data.fill_(1)
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    before = net(x, c_noise)
    forced = copy.deepcopy(net)
    for module in forced.modules():
        if isinstance(module, MPConv):
            module.weight.data *= 3
    weights = {n: p.clone() for n, p in forced.named_parameters()}
    torch.testing.assert_close(forced(x, c_noise), before, rtol=1e-2, atol=1e-2)
    assert all(
        torch.equal(p, weights[n]) for n, p in forced.named_parameters()
    )  # no forward writes
    force_rows(forced)
    torch.testing.assert_close(forced(x, c_noise), before, rtol=1e-2, atol=1e-2)
    for module in forced.modules():
        if isinstance(module, MPConv):
            rms = module.weight.square().flatten(1).mean(1).sqrt()
            assert (rms - 1).abs().max() < 1e-3


def test_gradients_are_orthogonal_to_the_rows():
    net = narrow(label_dim=3)
    for p in net.parameters():
        p.data = torch.ones_like(p) if p.ndim == 0 else p.data
    labels = torch.eye(3)[[0, 1]]
    net(torch.randn(2, 2, 8, 8), torch.zeros(2), labels).square().sum().backward()
    for name, p in net.named_parameters():
        if p.ndim:
            along = (p * p.grad).flatten(1).sum(1).abs()
            lengths = p.flatten(1).norm(dim=1) * p.grad.flatten(1).norm(dim=1)
            assert (along <= 1e-3 * lengths + 1e-6).all(), name


def test_initialisation():
    net = narrow(label_dim=3)
    gains = [p for n, p in net.named_parameters() if n.endswith("gain")]
    assert len(gains) == 1 + len([b for b in net.modules() if isinstance(b, EDM2Block)])
    assert not any(gain.any() for gain in gains)
    torch.manual_seed(0)
    fourier = MPFourier(4096)
    assert abs(fourier.freqs.std() / (2 * math.pi) - 1) < 0.05
    assert fourier.phases.min() >= 0
    assert fourier.phases.max() <= 2 * math.pi


def test_layouts_agree_and_activations_follow_the_weights():
    net = narrow()
    net.out_gain.data.fill_(1)
    x, c_noise = torch.randn(3, 2, 8, 8), torch.zeros(3)
    plain = net(x, c_noise)
    seen = []
    net.dec["8x8_block0"].register_forward_hook(lambda *args: seen.append(args[-1][0]))
    last = net.to(memory_format=torch.channels_last)(x, c_noise)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-4)


def test_same_key_same_masks_whatever_the_split():
    net = narrow(dropout=0.3).train()
    net.out_gain.data.fill_(1)
    x, c_noise = torch.randn(4, 2, 8, 8), torch.zeros(4)
    key = PhiloxKey(seed=7, step=3, sample=torch.arange(4))
    whole = net(x, c_noise, dropout_key=key)
    rows = torch.tensor([3, 1])
    part = net(x[rows], c_noise[rows], dropout_key=key.select(rows))
    torch.testing.assert_close(whole[rows], part, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, net(x, c_noise), atol=1e-2)  # a fresh key
    net.eval()
    assert torch.equal(net(x, c_noise), net(x, c_noise))


def test_label_dropout_zeroes_whole_labels():
    net = narrow(label_dim=3, label_dropout=0.5).train()
    labels, c_noise = torch.eye(3)[torch.arange(64) % 3], torch.zeros(64)
    key = PhiloxKey(seed=0, step=0, sample=torch.arange(64))
    emb = net.embed(c_noise, labels, key)
    net.eval()
    kept = torch.isclose(emb, net.embed(c_noise, labels), atol=1e-5).all(1)
    dropped = torch.isclose(emb, net.embed(c_noise, 0 * labels), atol=1e-5).all(1)
    assert (kept ^ dropped).all()
    assert 16 <= kept.sum() <= 48


def test_a_network_in_16_bits_is_near():
    torch.manual_seed(0)
    net = narrow(model_channels=32, channels_per_head=32)
    net.out_gain.data.fill_(1)
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    exact = net(x, c_noise)
    low = net(x.bfloat16(), c_noise)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_compiles_to_one_graph():
    net = narrow(dropout=0.2, label_dim=3).train()
    x, c_noise, labels = torch.randn(3, 2, 8, 8), torch.zeros(3), torch.eye(3)
    key = PhiloxKey(seed=torch.tensor(1), step=torch.tensor(2), sample=torch.arange(3))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    expected = net(x, c_noise, labels, dropout_key=key)
    torch.testing.assert_close(compiled(x, c_noise, labels, dropout_key=key), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"res": 6, "channel_mult": [1, 1, 1]}, "img_resolution: must be divisible by 4"),
        ({"attn_resolutions": [16]}, "attn_resolutions: .* 8, 4, got 16"),
        ({"dropout_resolutions": [16]}, "dropout_resolutions: .* 8, 4, got 16"),
        ({"channels_per_head": 5}, "channels_per_head: must divide .* 16, got 5"),
        ({"label_dropout": 1.0}, r"label_dropout: must lie in \[0, 1\)"),
        ({"num_blocks": 0}, "num_blocks: must be at least 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message) as error:
        narrow(**options)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_xl_runs_forward_and_backward_of_one_image():
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = build_network(
            "edm2", img_resolution=64, img_channels=3, label_dim=1000, model_channels=SIZES["XL"]
        )
    net.to(memory_format=torch.channels_last)
    net.model.out_gain.data.fill_(1)
    from tcm_fast.networks.precision import cast_weights

    weights = cast_weights(net, torch.float16)
    x = torch.randn(1, 3, 64, 64, device="cuda", dtype=torch.float16)
    labels = torch.nn.functional.one_hot(torch.tensor([7], device="cuda"), 1000).float()
    out = net.raw(x, torch.ones(1, device="cuda"), labels, weights=weights)
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
