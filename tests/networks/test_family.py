"""A family of networks that is added from outside: one class and one entry in `NETWORKS`."""

import pytest
import torch
from torch import nn

from tcm_fast.checkpoint.format import load_network, save_network
from tcm_fast.config import TcmConfig
from tcm_fast.networks import NETWORKS, build_network
from tcm_fast.networks.mp_layers import MPConv
from tcm_fast.networks.precision import make_copies
from tcm_fast.networks.raw_network import Block, RawNetwork
from tcm_fast.networks.recompute import after_norm, run_block, set_recompute
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.tcm import Tcm


class Residual(Block):
    def __init__(self, width, resolution):
        super().__init__()
        self.resolution = resolution
        self.norm, self.rows = nn.GroupNorm(2, width), MPConv(width, width, 3)

    def forward(self, x, emb):
        h = after_norm(self.norm, self.rows, x, recompute=self.recompute_norms)
        return x + h * emb[:, :, None, None]


class Toy(RawNetwork):
    """Its names are nobody else's."""

    fp32_modules = ("level",)

    def __init__(
        self, img_resolution, in_channels, out_channels, label_dim, width=8, depth=3, dropout=0.0
    ):
        super().__init__()
        self.level = nn.Linear(1, width)
        self.entry = nn.Conv2d(in_channels, width, 3, padding=1)
        self.trunk = nn.ModuleList([Residual(width, img_resolution) for _ in range(depth)])
        self.leave = nn.Conv2d(width, out_channels, 1)

    def forward(self, x, noise_labels, class_labels=None, dropout_key=None):
        emb = self.level(noise_labels[:, None]).to(x.dtype)
        x = self.entry(x)
        for block in self.trunk:
            x = run_block(block, [x], emb)
        return self.leave(x)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(NETWORKS, "toy", Toy)
    torch.manual_seed(0)
    return build_network("toy", img_resolution=8, img_channels=2, depth=2)


def test_what_it_declares_is_what_is_asked_for(toy):
    model = toy.model
    assert toy.spec["name"] == "toy"
    assert toy.spec["depth"] == 2
    assert model.blocks() == list(model.trunk)
    assert [block.resolution for block in model.blocks()] == [8, 8]
    assert model.normalized_names() == ["trunk.0.rows.weight", "trunk.1.rows.weight"]
    assert not any(name.startswith(("level", "trunk.0.norm")) for name in model.cast_names())
    assert {"entry.weight", "leave.bias", "trunk.1.rows.weight"} < set(model.cast_names())
    assert model.augmentation is None
    with pytest.raises(ValueError, match="augment_labels: the network has no input"):
        toy(torch.zeros(1, 2, 8, 8), torch.ones(1), augment_labels=torch.zeros(1, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_trains_with_16_bit_copies_and_activation_checkpointing(toy, dtype):
    config = TcmConfig(batch_size=8)
    objective = Tcm(config, toy.train(), toy, dtype=dtype)
    objective.copies = make_copies(toy, dtype, rows_too=False)
    copied = [c for c in objective.copies if c is not None]
    assert len(copied) == (4 if dtype == torch.bfloat16 else 0)  # two convolutions, biases too
    plan = objective.plan(config, seed=5, images_seen=0, iteration=0, iterations=100)
    (part,) = plan.parts(1)
    images = torch.randint(0, 256, (8, 2, 8, 8), dtype=torch.uint8)
    batch = make_batch(plan, part, images, None, seed=5, step=7)

    def gradients():
        toy.zero_grad()
        loss, _ = objective(batch)
        loss.backward()
        return [loss.detach(), *(p.grad for p in toy.parameters())]

    plain = gradients()
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in plain)
    assert set_recompute(toy.model, norms=True) == 0
    assert all(block.recompute_norms for block in toy.model.blocks())
    assert all(map(torch.equal, plain, gradients()))
    assert set_recompute(toy.model, blocks_from=9) == 0
    assert set_recompute(toy.model, blocks_from=8) == 2
    assert all(map(torch.equal, plain, gradients()))


def test_it_is_saved_and_loaded(toy, tmp_path):
    save_network(tmp_path / "toy.safetensors", toy, metadata={})
    loaded = load_network(tmp_path / "toy.safetensors")
    assert isinstance(loaded.model, Toy)
    x, t = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    assert torch.equal(loaded(x, t), toy.eval()(x, t))
