"""Targets by the posterior mean against the formula written out in float64, and against the usual ones."""

import copy
import math

import pytest
import torch

from tcm_fast.config import Config, EctConfig, TcmConfig, from_dict
from tcm_fast.kernels.noise_pair import NOISE_LAYER
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.kernels.posterior_mean import posterior_mean
from tcm_fast.networks import build_network
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.ect import Ect
from tcm_fast.objectives.noise_levels import IMAGE
from tcm_fast.objectives.tcm import Tcm

SIZE, SEED, STEP, BANK = 16, 5, 7, 24
KINDS = {"ect": (Ect, EctConfig), "tcm": (Tcm, TcmConfig)}


def network(seed, classes=0):
    torch.manual_seed(seed)
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=2, model_channels=16, channel_mult=[1, 1],
        num_blocks=1, attn_resolutions=[4], dropout=0.0, label_dim=classes,
    )  # fmt: skip
    for parameter in net.parameters():  # the output convolution starts at 1e-5
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def problem(name, iteration, classes=0, **fields):
    kind, section = KINDS[name]
    config = section(batch_size=SIZE, huber_c=0.06, target="posterior", bank_size=BANK, **fields)
    plan = kind.plan(config, seed=SEED, images_seen=0, iteration=iteration, iterations=200_000)
    frozen = network(2, classes) if name == "tcm" else None
    objective = kind(config, network(1, classes).train(), frozen)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (SIZE + BANK, 2, 8, 8), generator=generator).byte()
    return config, plan, objective, images[:SIZE], images[SIZE:]


def batches(plan, images, bank, parts=1, classes=0):
    numbers = torch.arange(SIZE) % max(classes, 1)
    for part in plan.parts(parts):
        labels = torch.eye(classes)[numbers[part]] if classes else None
        bank_classes = torch.arange(BANK) % classes if classes else None
        yield make_batch(
            plan, part, images[part], labels, seed=SEED, step=STEP, bank=(bank, bank_classes)
        )


def run(objective, *batches):
    objective.zero_grad()
    loss = 0.0
    for batch in batches:
        share, _ = objective(batch)
        share.backward()
        loss += share.item()
    return loss, torch.cat([p.grad.flatten() for p in objective.parameters()])


def naive(name, config, plan, objective, images, bank, classes):
    """The step, one sample at a time in float64."""
    student = copy.deepcopy(objective.student).double().eval()
    frozen = copy.deepcopy(objective.frozen).double().eval() if objective.frozen else None
    noise = philox_normal(SEED, STEP, NOISE_LAYER, torch.arange(SIZE), (2, 8, 8)).double()
    sd, total, boundary = 0.5, 0.0, 0.0
    quota = int(config.boundary_fraction * SIZE) if name == "tcm" else 0

    def denoised(net, x, s, c):
        v = s * s + sd * sd
        label = torch.eye(classes).double()[c : c + 1] if classes else None
        level = torch.tensor([math.log(s) / 4]).double()
        raw = net.model((x / math.sqrt(v))[None], level, label)[0]
        return sd * sd / v * x + s * sd / math.sqrt(v) * raw

    for i in range(SIZE):
        t, r, c = float(plan.t[i]), float(plan.r[i]), i % max(classes, 1)
        y = images[i].double() / 127.5 - 1
        others = [b.double() / 127.5 - 1 for j, b in enumerate(bank) if j % max(classes, 1) == c]
        x_t = y + t * noise[i]
        candidates = torch.stack([y, *others])
        logits = -(x_t - candidates).square().sum((1, 2, 3)) / (2 * t * t)
        mean = (logits.softmax(0).reshape(-1, 1, 1, 1) * candidates).sum(0)
        x_r = x_t - (t - r) * (x_t - mean) / t
        net = frozen if name == "tcm" and r < config.t_prime else student
        target = x_r if plan.source[i] == IMAGE else denoised(net, x_r, r, c).detach()
        square = (denoised(student, x_t, t, c) - target).square().sum()
        loss = (torch.sqrt(square + config.huber_c**2) - config.huber_c) / (t - r)
        if name == "tcm" and plan.boundary[i]:
            boundary += loss / quota
        else:
            total += loss / (SIZE - quota)
    return total + getattr(config, "boundary_weight", 0) * boundary, student


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("iteration", "classes"), [(0, 0), (100_000, 3)])
def test_loss_and_gradient_are_the_formula(name, iteration, classes):
    config, plan, objective, images, bank = problem(name, iteration, classes)
    loss, grad = run(objective, *batches(plan, images, bank, classes=classes))
    expected, student = naive(name, config, plan, objective, images, bank, classes)
    expected_grad = torch.autograd.grad(
        expected, list(student.parameters()), allow_unused=True, materialize_grads=True
    )
    expected_grad = torch.cat([g.flatten() for g in expected_grad])
    assert loss == pytest.approx(expected.item(), rel=2e-4)
    error = (grad.double() - expected_grad).norm() / expected_grad.norm()
    assert error < 1e-3


def test_the_boundary_and_rows_of_the_image_are_there():
    """What the test above compares: rows at t', and rows whose target is x_r."""
    _, plan, *_ = problem("tcm", 0)
    assert plan.boundary.any()
    _, plan, *_ = problem("ect", 0)
    assert (plan.source == IMAGE).any()
    assert (plan.source != IMAGE).any()


def test_micro_batches_make_no_difference():
    _, plan, objective, images, bank = problem("tcm", 100_000)
    whole = run(objective, *batches(plan, images, bank))
    cut = run(objective, *batches(plan, images, bank, parts=4))
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-3, atol=1e-4 * whole[1].abs().max().item())


def test_a_bank_of_the_own_class_alone_changes_nothing_at_small_noise():
    """x_r by the posterior mean is x_r by the image where the image is alone."""
    _, plan, objective, images, _ = problem("ect", 100_000)
    alone = images.repeat(2, 1, 1, 1)[:BANK] * 0 + images[:1]  # the first image, again and again
    (batch,) = batches(plan, images, alone)
    first = int((batch.key.sample == 0).nonzero())
    with torch.no_grad():
        found = objective.losses(batch)
        usual = Ect(EctConfig(batch_size=SIZE, huber_c=0.06), objective.student).losses(batch)
    torch.testing.assert_close(found[first], usual[first], rtol=2e-3, atol=0)


def test_the_mean_of_x_r_is_the_usual_one_and_its_variance_smaller():
    """With x_t made from each of a set's images by its posterior, over banks of one other image."""
    images = problem("ect", 100_000)[3]
    y = images[:4].double() / 127.5 - 1
    y[1:] = y[0] + 0.05 * (y[1:] - y[0])  # so near that all count
    own = ((y + 1) * 127.5).round().byte()
    y = own.double() / 127.5 - 1
    t = torch.tensor([0.6])
    x_t = (y[0] + 0.6 * torch.randn(2, 8, 8)).float()
    chance = (-(x_t - y).square().sum((1, 2, 3)) / (2 * 0.36)).softmax(0)
    mean, second = 0, 0
    for i in range(4):
        for j in range(4):
            if i != j:
                found = posterior_mean(x_t[None], t, own[i : i + 1], own[j : j + 1])[0].double()
                mean = mean + chance[i] / 3 * found
                second = second + chance[i] / 3 * found.square()
    exact = (chance.reshape(-1, 1, 1, 1) * y).sum(0)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-6)
    usual = (chance.reshape(-1, 1, 1, 1) * y.square()).sum(0) - exact.square()
    assert (second - mean.square()).sum() < 0.95 * usual.sum()


def test_the_image_remains_the_default_and_its_bits_the_same():
    _, plan, objective, images, bank = problem("ect", 100_000)
    plain = Ect(EctConfig(batch_size=SIZE, huber_c=0.06), objective.student)
    (with_bank,) = batches(plan, images, bank)
    (part,) = plan.parts(1)
    without = make_batch(plan, part, images[part], None, seed=SEED, step=STEP)
    first, second = (run(plain, batch) for batch in (with_bank, without))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    with pytest.raises(ValueError, match=r"ect\.target: posterior needs a batch with a bank"):
        objective(without)


def test_a_batch_finds_its_bank_in_other_memory():
    _, plan, _, images, bank = problem("ect", 100_000, classes=3)
    (batch,) = batches(plan, images, bank, classes=3)
    copies = [v.clone() for v in batch.tensors]
    moved = batch.at(*copies)
    assert [v.data_ptr() for v in moved.tensors] == [v.data_ptr() for v in copies]
    assert torch.equal(moved.bank, bank)
    assert torch.equal(moved.bank_classes, torch.arange(BANK) % 3)


@pytest.mark.parametrize("name", KINDS)
def test_bad_fields_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}\.bank_size: must be at least 2, got 1"):
        from_dict(Config, {name: {"bank_size": 1}})
    with pytest.raises(ValueError, match=rf"{name}\.target: must be one of image, posterior, got"):
        from_dict(Config, {name: {"target": "mean"}})
    with pytest.raises(ValueError, match=r"cd\.target: unknown"):
        from_dict(Config, {"cd": {"target": "posterior"}})
