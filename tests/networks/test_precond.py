import copy
import json
import math

import pytest
import torch

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks import Precond, build_network
from tcm_fast.networks.raw_network import RawNetwork

SMALL = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
}


def build(label_dim=0, **options):
    torch.manual_seed(0)
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=1, label_dim=label_dim, **(SMALL | options)
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return net


def batch(n=3):
    generator = torch.Generator().manual_seed(1)
    return 5 * torch.randn(n, 1, 8, 8, generator=generator), torch.logspace(-2, 1.9, n)


class Constant(RawNetwork):
    """F = the network's input times c_noise: shows both."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, c_noise, labels=None, dropout_key=None):
        return x * c_noise.reshape(-1, 1, 1, 1) * self.one


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_forward_is_the_preconditioning(sigma_data):
    net = Precond(Constant(), img_resolution=8, img_channels=1, sigma_data=sigma_data, spec={})
    x, t = batch(5)
    denoised = net(x, t)
    assert denoised.dtype == torch.float32
    for i, level in enumerate(t.double().tolist()):
        variance = level**2 + sigma_data**2
        image = x[i].double()
        raw = image / math.sqrt(variance) * math.log(level) / 4
        expected = sigma_data**2 / variance * image + level * sigma_data / math.sqrt(variance) * raw
        assert torch.allclose(denoised[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_forward_is_made_of_raw():
    net = build()
    x, t = batch()
    wide_t = t.double().reshape(-1, 1, 1, 1)
    variance = wide_t**2 + 0.25
    raw = net.raw((x / variance.sqrt()).float(), t)
    assert raw.dtype == torch.float32
    expected = 0.25 / variance * x + wide_t * 0.5 / variance.sqrt() * raw
    assert torch.allclose(net(x, t).double(), expected, rtol=1e-4, atol=1e-4)


def test_float64_network_is_an_oracle():
    net = build()
    x, t = batch()
    oracle = copy.deepcopy(net).double()(x.double(), t.double())
    assert oracle.dtype == torch.float64
    assert (net(x, t) - oracle).abs().max() < 1e-4 * oracle.abs().max()
    assert net(x.double(), t.double()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_denoises_in_fp32(dtype):
    net = build()
    x, t = batch()
    with torch.autocast("cpu", dtype=dtype):
        raw, denoised = net.raw(x, t), net(x, t)
    assert raw.dtype == dtype
    assert denoised.dtype == torch.float32
    assert raw.isfinite().all()
    reference = net.raw(x, t)
    error = (raw - reference).norm() / reference.norm()
    assert 0 < error < (0.05 if dtype == torch.bfloat16 else 0.01)
    raw.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_empty_batch():
    net = build(label_dim=3, dropout=0.2).train()
    x, t = batch(0)
    denoised = net(x, t, torch.zeros(0, 3))
    assert denoised.shape == (0, 1, 8, 8)
    denoised.sum().backward()


def test_spec_rebuilds_the_network():
    net = build(label_dim=2, attn_resolutions=(4,), channel_mult=(1, 2))
    assert net.spec == {
        "name": "ddpmpp", "img_resolution": 8, "img_channels": 1, "label_dim": 2, "sigma_data": 0.5,
        "augment_dim": 0, "model_channels": 8, "channel_mult": [1, 2], "channel_mult_emb": 4,
        "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0, "dropout_resolutions": None,
        "label_dropout": 0.0, "embedding_type": "positional", "fourier_scale": 16.0,
        "channel_mult_noise": 1, "encoder_type": "standard", "resample_filter": [1, 1],
    }  # fmt: skip
    again = build_network(**json.loads(json.dumps(net.spec)))
    assert again.spec == net.spec
    again.load_state_dict(net.state_dict(), strict=True)
    x, t = batch()
    labels = torch.eye(2)[[0, 1, 1]]
    assert torch.equal(net(x, t, labels), again(x, t, labels))


def test_defaults_are_the_recipes():
    with torch.device("meta"):
        spec = build_network("ddpmpp", img_resolution=32, img_channels=3).spec
        preset = build_network("cifar10", img_resolution=32, img_channels=3, dropout=0.13).spec
    expected = {
        "model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4,
        "attn_resolutions": [16], "dropout": 0.13,
    }  # fmt: skip
    assert expected.items() <= spec.items()
    assert preset == spec


def test_deep_copy_and_functional_call():
    net = build()
    x, t = batch()
    twin = copy.deepcopy(net)
    assert torch.equal(net(x, t), twin(x, t))
    halves = {name: p.detach() / 2 for name, p in net.named_parameters()}
    called = torch.func.functional_call(net, halves, (x, t))
    assert torch.equal(net(x, t), twin(x, t))
    twin.load_state_dict(halves, strict=False)
    assert torch.equal(called, twin(x, t))


def test_compiles_to_one_graph():
    net = build(dropout=0.2).train()
    x, t = batch()
    key = PhiloxKey(seed=1, step=2, layer=0, sample=torch.arange(3))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x, t, dropout_key=key), net(x, t, dropout_key=key), atol=1e-5)


@pytest.mark.parametrize("method", ["forward", "raw"])
def test_refuses_shapes(method):
    x, t = batch()
    plain, conditional = getattr(build(), method), getattr(build(label_dim=4), method)
    for bad in (x[..., :4], x[:, :, :4, :4], torch.cat([x, x], 1), x[0]):
        with pytest.raises(ValueError, match=r"x: must be \[N,1,8,8\] for this network, got \["):
            plain(bad, t)
    for bad in (t[:2], t[0], t.reshape(-1, 1)):
        with pytest.raises(ValueError, match=r"t: must hold one noise level per image, \[3\], got"):
            plain(x, bad)
    with pytest.raises(ValueError, match=r"labels: required by a class-conditional .* \[3,4\]"):
        conditional(x, t)
    with pytest.raises(ValueError, match=r"labels: must be one-hot \[3,4\], got \[3\]"):
        conditional(x, t, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"labels: the network is unconditional"):
        plain(x, t, torch.eye(4)[:3])


@pytest.mark.parametrize("name", ["ncsnpp", "adm", "edm2"])
def test_every_network_is_rebuilt_from_its_spec(name):
    options = {
        "model_channels": 64,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    sizes = {"img_resolution": 8, "img_channels": 1, "label_dim": 2, "logvar_channels": 4}
    net = build_network(name, **sizes, **options)
    again = build_network(**json.loads(json.dumps(net.spec)))
    again.load_state_dict(net.state_dict(), strict=True)
    x, t = batch()
    labels = torch.eye(2)[[0, 1, 1]]
    net, again = net.eval(), again.eval()
    assert torch.equal(net(x, t, labels), again(x, t, labels))
    assert torch.equal(net.log_variance(t), again.log_variance(t))


def test_log_variance():
    net = build(logvar_channels=16).double()
    assert {n for n, _ in net.named_parameters() if "logvar" in n} == {"logvar_linear.weight"}
    assert {n for n, _ in net.named_buffers() if "logvar" in n} == {
        "logvar_fourier.freqs", "logvar_fourier.phases",
    }  # fmt: skip
    t = torch.tensor([0.1, 3.0], dtype=torch.float64)
    w = net.logvar_linear.weight[0]
    w = w / (1e-4 + w.square().mean().sqrt()) / 4
    for u, level in zip(net.log_variance(t), t, strict=True):
        fourier = net.logvar_fourier
        features = math.sqrt(2) * torch.cos(fourier.freqs * level.log() / 4 + fourier.phases)
        assert torch.allclose(u, (features * w).sum())
    assert build().log_variance(t) is None


def test_augment_labels_reach_the_network():
    net = build(augment_dim=9)
    x, t = batch()
    plain = net(x, t)
    assert torch.allclose(net(x, t, augment_labels=torch.zeros(3, 9)), plain)
    assert not torch.allclose(net(x, t, augment_labels=torch.ones(3, 9)), plain, atol=1e-3)
    with pytest.raises(ValueError, match=r"augment_labels: must be \[3,9\], got \[3, 8\]"):
        net(x, t, augment_labels=torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"augment_labels: the network has no input for them"):
        build()(x, t, augment_labels=torch.ones(3, 9))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'ddpmpp', got 'ddpmp'"):
        build_network("ddpmp", img_resolution=8, img_channels=1)
    with pytest.raises(ValueError, match="model_chanels: unknown, did you mean 'model_channels'"):
        build_network("ddpmpp", img_resolution=8, img_channels=1, model_chanels=8)
    with pytest.raises(ValueError, match="in_channels: unknown"):
        build_network("ddpmpp", img_resolution=8, img_channels=1, in_channels=8)
    with pytest.raises(ValueError, match="img_channels: must be at least 1, got 0"):
        build_network("ddpmpp", img_resolution=8, img_channels=0)
    with pytest.raises(ValueError, match="label_dim: must be at least 0, got -1"):
        build_network("ddpmpp", img_resolution=8, img_channels=1, label_dim=-1)
