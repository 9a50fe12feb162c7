"""The baseline computes what we compute: the same network, the same loss, the same gradients."""

import copy
import dataclasses

import pytest
import torch

from tcm_fast.benchmarks.official_style import (
    OfficialStyleStep,
    OfficialStyleUNet,
    consistency_losses,
    denoise,
    denoising_losses,
    draw,
    stage1_losses,
)
from tcm_fast.config import Config, TcmConfig
from tcm_fast.kernels.dropout import dropout
from tcm_fast.kernels.noise_pair import NOISE_LAYER
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.networks import build_network
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.tcm import Tcm

SHAPE = dict(
    img_resolution=8, img_channels=2, model_channels=16, channel_mult=(1, 2), num_blocks=1,
    attn_resolutions=(4,), dropout=0.3,
)  # fmt: skip
SIZE = 32


def pair(seed):
    """One of our networks and the baseline's with the same weights."""
    torch.manual_seed(seed)
    ours = build_network("ddpmpp", **SHAPE)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs = OfficialStyleUNet(**SHAPE)
    theirs.load_state_dict(ours.model.state_dict(), strict=True)
    return ours.train(), theirs.train()


def test_the_networks_are_the_same_function():
    ours, theirs = pair(0)
    x, t = torch.randn(4, 2, 8, 8), torch.tensor([0.01, 0.5, 2.0, 60.0])
    expected = ours.eval()(x, t)
    torch.testing.assert_close(denoise(theirs.eval(), x, t, None), expected, rtol=1e-4, atol=1e-4)


def test_the_parameter_count_is_the_published_one():
    with torch.device("meta"):
        count = sum(p.numel() for p in OfficialStyleUNet(32, 3).parameters())
    assert count == 55_732_739


@pytest.mark.parametrize("weighting", ["inv_dt", "inv_cout_sq"])
@pytest.mark.parametrize("iteration", [50_000, 100_000])
def test_loss_and_gradients_are_the_same(weighting, iteration):
    """With dropout on: the baseline gets our counter-based masks, for the whole batch in its own order."""
    config = TcmConfig(batch_size=SIZE, huber_c=0.06, weighting=weighting)
    (ours, theirs), (our_stage1, their_stage1) = pair(1), pair(2)
    plan = Tcm.plan(config, seed=4, images_seen=0, iteration=iteration)
    part = plan.parts(1)[0]
    images = torch.randint(0, 256, (SIZE, 2, 8, 8), dtype=torch.uint8)
    batch = make_batch(plan, part, images[part], None, seed=4, step=9)
    loss, stats = Tcm(config, ours, our_stage1)(batch)
    loss.backward()

    noise = philox_normal(4, 9, NOISE_LAYER, batch.key.sample, (2, 8, 8))
    t, r = (torch.from_numpy(v[part]).reshape(-1, 1, 1, 1) for v in (plan.t, plan.r))
    boundary = torch.from_numpy(plan.boundary[part])
    losses = consistency_losses(
        theirs, their_stage1, images[part].float() / 127.5 - 1, t, r, boundary, noise, t_prime=1.0,
        c=0.06, weighting=weighting, boundary_weight=0.1,
        dropout=lambda x, p, layer: dropout(x, p, batch.key.at_layer(layer)),
    )  # fmt: skip
    losses[0].backward()
    assert loss.item() == pytest.approx(losses[0].item(), rel=1e-4)
    torch.testing.assert_close(stats.double(), torch.stack(losses[1:]).detach(), rtol=1e-4, atol=0)
    assert_gradients_agree(ours, theirs)


def assert_gradients_agree(ours, theirs):
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.model.named_parameters():
        grad, other = parameter.grad, expected[name].grad
        error = (grad - other).norm() / other.norm().clamp(min=1e-6)
        assert error < 5e-3, f"{name}: {error:.2e}"


@pytest.mark.parametrize("phase", ["edm", "ect"])
def test_the_other_phases_are_the_same(phase):
    """Pre-training and stage 1, with dropout on."""
    ours, theirs = pair(5)
    changes = {"batch_size": SIZE} | ({} if phase == "edm" else {"huber_c": 0.06})
    config = dataclasses.replace(Config().phase(phase), **changes)
    plan = OBJECTIVES[phase].plan(config, seed=4, images_seen=0, iteration=50_000)
    part = plan.parts(1)[0]
    images = torch.randint(0, 256, (SIZE, 2, 8, 8), dtype=torch.uint8)[part]
    batch = make_batch(plan, part, images, None, seed=4, step=9)
    loss, _ = OBJECTIVES[phase](config, ours)(batch)
    loss.backward()

    noise = philox_normal(4, 9, NOISE_LAYER, batch.key.sample, (2, 8, 8))
    y = images.float() / 127.5 - 1
    masks = lambda x, p, layer: dropout(x, p, batch.key.at_layer(layer))  # noqa: E731
    t = torch.from_numpy(plan.t[part]).reshape(-1, 1, 1, 1)
    if phase == "edm":
        losses = denoising_losses(theirs, y, t.float(), noise, masks)
    else:
        r = torch.from_numpy(plan.r[part]).reshape(-1, 1, 1, 1)
        losses = stage1_losses(
            theirs, y, t, r, noise, c=0.06, weighting=config.weighting, dropout=masks
        )
    losses[0].backward()
    assert loss.item() == pytest.approx(losses[0].item(), rel=1e-4)
    assert_gradients_agree(ours, theirs)


def test_its_draws_are_the_published_ones():
    torch.manual_seed(0)
    t, r, boundary, noise = draw(torch.zeros(400, 1, 8, 8), 1.0, 0.999, 0.25)
    assert boundary.sum() == 100
    assert ((t.flatten() - 1).abs() < 1e-6)[boundary].all()
    assert (t >= 1).all()
    assert t.dtype == torch.float64
    assert (r < t).all()
    assert noise.shape == (400, 1, 8, 8)


def test_a_step_trains():
    _, student = pair(3)
    step = OfficialStyleStep(student, copy.deepcopy(student), ratio=0.9, c=0.06, lr=1e-3)
    before = copy.deepcopy(student.state_dict())
    losses = step(torch.randint(0, 256, (8, 2, 8, 8), dtype=torch.uint8))
    assert losses[0] == pytest.approx(losses[1] + 0.1 * losses[2])
    assert any((before[k] != v).any() for k, v in student.state_dict().items())
    assert any(
        (a != b).any() for a, b in zip(step.average.parameters(), student.parameters(), strict=True)
    )
