"""The objectives against their formulas written out naively in float64, and against themselves, cut up."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tcm_fast.config import CdConfig, EctConfig, EdmConfig, IctConfig, TcmConfig
from tcm_fast.kernels.noise_pair import NOISE_LAYER
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.networks import build_network
from tcm_fast.networks.precond import Precond
from tcm_fast.objectives import Objective, make_batch, row_granule
from tcm_fast.times import IMAGE, STAGE1, plan_times

SIZE, SEED, STEP = 16, 5, 7
CONFIGS = {"edm": EdmConfig, "ect": EctConfig, "tcm": TcmConfig, "ict": IctConfig, "cd": CdConfig}


def network(seed, dropout=0.0):
    torch.manual_seed(seed)
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=2, model_channels=16, channel_mult=[1, 1],
        num_blocks=1, attn_resolutions=[4], dropout=dropout,
    )  # fmt: skip
    for parameter in net.parameters():  # the output convolution starts at 1e-5
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def problem(name, dropout=0.0, iteration=100_000, **fields):
    config = CONFIGS[name](batch_size=SIZE, **fields)
    plan = plan_times(config, seed=SEED, images_seen=0, iteration=iteration, iterations=200_000)
    frozen = network(2, dropout) if name in ("tcm", "cd") else None
    objective = Objective(name, config, network(1, dropout).train(), frozen)
    images = torch.randint(0, 256, (SIZE, 2, 8, 8), generator=torch.Generator().manual_seed(3))
    return config, plan, objective, images.to(torch.uint8)


def run(objective, plan, images, parts=1, granule=1):
    """Loss, logged means and gradient of a batch cut into parts."""
    objective.zero_grad()
    loss, stats = 0.0, torch.zeros(2)
    for part in plan.parts(parts):
        batch = make_batch(
            plan, part, images[part], None, seed=SEED, step=STEP, granule=granule,
            boundary_weight=getattr(objective.config, "boundary_weight", 0.0),
        )  # fmt: skip
        share, numbers = objective(batch)
        share.backward()
        loss, stats = loss + share.item(), stats + numbers
    grad = torch.cat([p.grad.flatten() for p in objective.parameters()])
    return loss, stats, grad


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def naive_loss(name, config, plan, objective, images):
    """The step of DESIGN section 5, one sample at a time in float64: the means over the batch."""
    student = copy.deepcopy(objective.student).double().eval()
    frozen = copy.deepcopy(objective.frozen).double().eval() if objective.frozen else None
    noise = philox_normal(SEED, STEP, NOISE_LAYER, torch.arange(SIZE), (2, 8, 8)).double()
    sd, total, boundary = 0.5, 0.0, 0.0

    def denoised(net, x, s):
        v = s * s + sd * sd
        raw = net.model((x / math.sqrt(v))[None], torch.tensor([math.log(s) / 4]).double())[0]
        return sd * sd / v * x + s * sd / math.sqrt(v) * raw

    for i in range(SIZE):
        y = images[i].double() / 127.5 - 1
        t = float(plan.t[i])
        x_t = y + t * noise[i]
        if name == "edm":
            weight = (t * t + sd * sd) / (t * sd) ** 2
            total += weight * ((denoised(student, x_t, t) - y) ** 2).sum() / SIZE
            continue
        r = float(plan.r[i])
        x_r = y + r * noise[i]
        net = student
        if name == "cd":
            x_r = x_t + (r - t) * (x_t - denoised(frozen, x_t, t)) / t
        if name == "tcm" and r < config.t_prime:
            net = frozen
        target = denoised(net, x_r, r).detach()
        distance = torch.sqrt(((denoised(student, x_t, t) - target) ** 2).sum() + objective.c**2)
        loss = (distance - objective.c) / (t - r)
        quota = int(config.rho * SIZE) if name == "tcm" else 0
        if name == "tcm" and t == config.t_prime:
            boundary += loss / quota
        else:
            total += loss / (SIZE - quota)
    return total + getattr(config, "boundary_weight", 0) * boundary, student


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("iteration", [0, 100_000])
def test_a_step_is_the_formula(name, iteration):
    fields = {} if name in ("edm", "ict") else {"c": 0.06}
    config, plan, objective, images = problem(name, iteration=iteration, **fields)
    loss, _, grad = run(objective, plan, images)
    expected, student = naive_loss(name, config, plan, objective, images)
    expected_grad = torch.autograd.grad(expected, list(student.parameters()))
    expected_grad = torch.cat([g.flatten() for g in expected_grad])
    # Targets that the plan takes from the image are D(x_r, 1e-6) to within 1e-6 of x_r's scale.
    assert loss == pytest.approx(expected.item(), rel=2e-4)
    assert cosine(grad, expected_grad) > 1 - 1e-4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts", [2, 4, SIZE])
def test_micro_batches_do_not_change_a_step(name, parts):
    fields = {} if name in ("edm", "ict") else {"c": 0.06}
    _, plan, objective, images = problem(name, dropout=0.3, **fields)
    loss, stats, grad = run(objective, plan, images)
    cut_loss, cut_stats, cut_grad = run(objective, plan, images, parts)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(cut_stats, stats, rtol=1e-5, atol=1e-6)
    assert cosine(grad, cut_grad) > 1 - 1e-5


@pytest.mark.parametrize("iteration", [0, 100_000, 10**6])
@pytest.mark.parametrize("c", [1e-8, 0.06])
def test_splitting_targets_changes_nothing(iteration, c):
    """Each network on exactly the rows it has to compute, against both on every row."""
    _, plan, objective, images = problem("tcm", dropout=0.3, iteration=iteration, c=c)
    objective.eval()  # compare targets through the loss: the student's own dropout stays on below
    objective.student.train()
    loss, _, grad = run(objective, plan, images)
    (part,) = plan.parts(1)
    batch = make_batch(
        plan, part, images[part], None, seed=SEED, step=STEP,
        boundary_weight=objective.config.boundary_weight,
    )  # fmt: skip
    whole = unsplit_loss(objective, batch)
    objective.zero_grad()
    whole.backward()
    whole_grad = torch.cat([p.grad.flatten() for p in objective.parameters()])
    assert loss == pytest.approx(whole.item(), rel=1e-6 if c > 1e-3 else 1e-4)
    assert cosine(grad, whole_grad) > 1 - (1e-5 if c > 1e-3 else 1e-3)


def unsplit_loss(objective, batch):
    from tcm_fast.kernels.consistency_loss import consistency_loss
    from tcm_fast.kernels.noise_pair import noise_pair

    config = objective.config
    pair = noise_pair(batch.images, batch.t, batch.r, batch.key)
    t, r = batch.t, batch.r
    output = objective.student.raw(pair.input_t, t, dropout_key=batch.key)
    with torch.no_grad():
        by_student = objective.student.raw(pair.input_r, r, dropout_key=batch.key)
        by_stage1 = objective.frozen.raw(pair.input_r, r, dropout_key=batch.key)
        target = torch.where((batch.r < config.t_prime).reshape(-1, 1, 1, 1), by_stage1, by_student)
        clean = batch.r <= config.r_min
        target = torch.where(clean.reshape(-1, 1, 1, 1), pair.y, target)
    losses = consistency_loss(
        output, pair.x_t, batch.t, target, pair.x_r, batch.r, delta=batch.delta, c=objective.c,
        weighting=config.weighting, is_clean=clean,
    )  # fmt: skip
    return (losses * batch.weights[0]).sum()


def test_a_step_costs_four_network_passes():
    """Counted in rows: forward (1) and backward (2) of the student, and one row of one network for
    each target, none for those that are images."""
    _, plan, objective, images = problem("tcm")
    rows = {"student": 0, "stage1": 0}
    for label, net in (("student", objective.student), ("stage1", objective.frozen)):
        raw = net.raw

        def counted(x, *args, _raw=raw, _label=label, **kwargs):
            rows[_label] += len(x)
            return _raw(x, *args, **kwargs)

        net.raw = counted
    run(objective, plan, images)
    stage1, image = (plan.source == STAGE1).sum(), (plan.source == IMAGE).sum()
    assert rows == {"student": SIZE + SIZE - stage1 - image, "stage1": stage1}


def test_stage_1_keeps_its_dropout_and_a_teacher_does_not():
    assert problem("tcm", dropout=0.3)[2].frozen.training
    assert not problem("cd", dropout=0.3)[2].frozen.training


def test_the_frozen_network_is_no_parameter_of_the_objective():
    _, plan, objective, images = problem("tcm")
    names = {name.split(".")[0] for name, _ in objective.named_parameters()}
    assert names == {"student"}
    run(objective, plan, images)
    assert all(p.grad is None and not p.requires_grad for p in objective.frozen.parameters())


def test_a_missing_or_needless_frozen_network_is_refused():
    with pytest.raises(ValueError, match="tcm needs a frozen network"):
        Objective("tcm", TcmConfig(), network(1))
    with pytest.raises(ValueError, match="ect has no frozen network"):
        Objective("ect", EctConfig(), network(1), network(2))


def test_ict_takes_its_constant_from_the_image_size():
    _, _, objective, _ = problem("ict")
    assert objective.c == pytest.approx(0.00054 * math.sqrt(2 * 8 * 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_losses_are_near_and_fp32(dtype):
    config, plan, objective, images = problem("ect", iteration=0, c=0.06)
    low = Objective("ect", config, objective.student, dtype=dtype)
    loss, _, grad = run(objective, plan, images)
    low_loss, stats, low_grad = run(low, plan, images)
    assert stats.dtype == torch.float32
    assert low_loss == pytest.approx(loss, rel=0.05)
    assert cosine(grad, low_grad) > 0.98


def test_boundary_weight_zero_leaves_the_boundary_out_of_the_gradient():
    _, plan, objective, images = problem("tcm", boundary_weight=0.0)
    loss, stats, _ = run(objective, plan, images)
    assert loss == pytest.approx(stats[0].item())
    assert stats[1] > 0
    assert np.isfinite(loss)


# ---- rounding row counts up, waiting, counting ---------------------------------------------------


@pytest.mark.parametrize("name", ["ect", "tcm"])
@pytest.mark.parametrize("iteration", [0, 30_000, 100_000, 10**6])
@pytest.mark.parametrize("granule", [4, 8, SIZE])
def test_rounding_row_counts_up_changes_nothing(name, iteration, granule):
    """Networks that compute a few rows too many, and targets picked from among them."""
    _, plan, objective, images = problem(name, dropout=0.3, iteration=iteration, c=0.06)
    loss, stats, grad = run(objective, plan, images)
    rounded_loss, rounded_stats, rounded_grad = run(objective, plan, images, granule=granule)
    assert rounded_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(rounded_stats, stats)
    assert cosine(grad, rounded_grad) > 1 - 1e-6


@pytest.mark.parametrize("batch_size", [16, 128, 512, 1024, 2048])
def test_rounding_costs_less_than_3_percent_of_a_step(batch_size):
    granule = row_granule(batch_size, torch.device("cuda"))
    assert granule % 8 == 0
    if batch_size >= 128:
        assert 2 * (granule - 1) < 0.03 * 4 * batch_size
    assert row_granule(batch_size, torch.device("cpu")) == 1


class NoWaiting(TorchDispatchMode):
    """Raises where the host reads a number or a shape that a device would have to compute first."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("iteration", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(name, iteration, dtype):
    config, plan, objective, images = problem(name, dropout=0.3, iteration=iteration)
    objective = Objective(name, config, objective.student, objective.frozen, dtype=dtype)
    (part,) = plan.parts(1)
    with NoWaiting():
        batch = make_batch(plan, part, images[part], None, seed=SEED, step=STEP, granule=8)
        objective(batch)[0].backward()


def test_the_mode_notices_a_wait():
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoWaiting():
        torch.ones(3).sum().item()


class Launches(TorchDispatchMode):
    """Counts operations that would start work on a device; views and allocations do not."""

    FREE = (
        "view", "_unsafe_view", "slice", "select", "detach", "t", "transpose", "permute", "expand",
        "unsqueeze", "squeeze", "as_strided", "empty", "empty_like", "new_empty", "alias", "split",
        "reshape", "unbind", "empty_strided", "new_empty_strided", "lift_fresh", "promote_types",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Linear(torch.nn.Module):
    """A network of one operation each way: what is counted is the step's own work."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x, c_noise, labels=None, dropout_key=None):
        return x * self.weight


@pytest.mark.parametrize("iteration", [30_000, 10**6])
def test_a_step_launches_at_most_ten_times_outside_the_networks(iteration, triton_device):
    config = TcmConfig(batch_size=SIZE, c=0.06)
    plan = plan_times(config, seed=SEED, images_seen=0, iteration=iteration)
    student, frozen = (
        Precond(Linear(), img_resolution=8, img_channels=2, spec={}).to(triton_device)
        for _ in range(2)
    )
    objective = Objective("tcm", config, student, frozen)
    (part,) = plan.parts(1)
    images = torch.randint(0, 256, (SIZE, 2, 8, 8), dtype=torch.uint8, device=triton_device)
    with Launches() as counted:
        batch = make_batch(plan, part, images, None, seed=SEED, step=STEP, granule=8)
        loss, _ = objective(batch)
        loss.backward()
    # Each pass: the logarithm and the quarter of the noise level, and the one product; its gradient
    # (product, sum). The trainer adds the step's means to those of others: one more.
    networks = 3 * 3 + 2
    assert len(counted.names) - networks + 1 <= 10, " ".join(counted.names)
