"""The objectives against their formulas written out naively in float64, and against themselves, cut up."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tcm_fast.config import Config, EctConfig, TcmConfig
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.noise_pair import NOISE_LAYER
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.networks import build_network
from tcm_fast.networks.layers import Conv2d
from tcm_fast.networks.precision import make_copies
from tcm_fast.networks.precond import Precond
from tcm_fast.networks.raw_network import RawNetwork
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.base import Objective
from tcm_fast.objectives.batch import make_batch, row_multiple_for
from tcm_fast.objectives.ect import Ect
from tcm_fast.objectives.edm import Edm
from tcm_fast.objectives.noise_levels import IMAGE, STAGE1, STUDENT
from tcm_fast.objectives.tcm import Tcm

SIZE, SEED, STEP = 16, 5, 7
CONFIGS = {name: type(Config().phase(name)) for name in OBJECTIVES}


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
    plan = OBJECTIVES[name].plan(
        config, seed=SEED, images_seen=0, iteration=iteration, iterations=200_000
    )
    frozen = network(2, dropout) if OBJECTIVES[name].frozen_file else None
    objective = OBJECTIVES[name](config, network(1, dropout).train(), frozen)
    images = torch.randint(0, 256, (SIZE, 2, 8, 8), generator=torch.Generator().manual_seed(3))
    return config, plan, objective, images.to(torch.uint8)


def run(objective, plan, images, parts=1, row_multiple=1):
    """Loss, logged means and gradient of a batch cut into parts."""
    objective.zero_grad()
    loss, stats = 0.0, torch.zeros(2)
    for part in plan.parts(parts):
        batch = make_batch(
            plan, part, images[part], None, seed=SEED, step=STEP, row_multiple=row_multiple
        )
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
        quota = int(config.boundary_fraction * SIZE) if name == "tcm" else 0
        if name == "tcm" and t == config.t_prime:
            boundary += loss / quota
        else:
            total += loss / (SIZE - quota)
    return total + getattr(config, "boundary_weight", 0) * boundary, student


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "cmt"])  # test_cmt.py
@pytest.mark.parametrize("iteration", [0, 100_000])
def test_a_step_is_the_formula(name, iteration):
    fields = {} if name in ("edm", "ict") else {"huber_c": 0.06}
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
    fields = {} if name in ("edm", "ict") else {"huber_c": 0.06}
    _, plan, objective, images = problem(name, dropout=0.3, **fields)
    loss, stats, grad = run(objective, plan, images)
    cut_loss, cut_stats, cut_grad = run(objective, plan, images, parts)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(cut_stats, stats, rtol=1e-5, atol=1e-6)
    assert cosine(grad, cut_grad) > 1 - 1e-5


@pytest.mark.parametrize("iteration", [0, 75_000, 10**6])  # ratios 0.5, 0.9375, 0.999
@pytest.mark.parametrize("c", [1e-8, 0.06])
def test_splitting_targets_changes_nothing(iteration, c):
    """Each network on exactly the rows it has to compute, against both on every row."""
    _, plan, objective, images = problem("tcm", dropout=0.3, iteration=iteration, huber_c=c)
    objective.eval()  # compare targets through the loss: the student's own dropout stays on below
    objective.student.train()
    loss, _, grad = run(objective, plan, images)
    (part,) = plan.parts(1)
    batch = make_batch(plan, part, images[part], None, seed=SEED, step=STEP)
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
        Tcm(TcmConfig(), network(1))
    with pytest.raises(ValueError, match="ect has no frozen network"):
        Ect(EctConfig(), network(1), network(2))


def test_ict_takes_its_constant_from_the_image_size():
    _, _, objective, _ = problem("ict")
    assert objective.c == pytest.approx(0.00054 * math.sqrt(2 * 8 * 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_losses_are_near_and_fp32(dtype):
    config, plan, objective, images = problem("ect", iteration=0, huber_c=0.06)
    low = Ect(config, objective.student, dtype=dtype)
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
@pytest.mark.parametrize("row_multiple", [4, 8, SIZE])
def test_rounding_row_counts_up_changes_nothing(name, iteration, row_multiple):
    """Networks that compute a few rows too many, and targets picked from among them."""
    _, plan, objective, images = problem(name, dropout=0.3, iteration=iteration, huber_c=0.06)
    loss, stats, grad = run(objective, plan, images)
    rounded_loss, rounded_stats, rounded_grad = run(
        objective, plan, images, row_multiple=row_multiple
    )
    assert rounded_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(rounded_stats, stats)
    assert cosine(grad, rounded_grad) > 1 - 1e-6


@pytest.mark.parametrize("batch_size", [16, 128, 512, 1024, 2048])
def test_rounding_costs_less_than_3_percent_of_a_step(batch_size):
    row_multiple = row_multiple_for(batch_size, torch.device("cuda"))
    assert row_multiple % 8 == 0
    if batch_size >= 128:
        assert 2 * (row_multiple - 1) < 0.03 * 4 * batch_size
    assert row_multiple_for(batch_size, torch.device("cpu")) == 1


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
    objective = OBJECTIVES[name](config, objective.student, objective.frozen, dtype=dtype)
    (part,) = plan.parts(1)
    with NoWaiting():
        batch = make_batch(plan, part, images[part], None, seed=SEED, step=STEP, row_multiple=8)
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


class Linear(RawNetwork):
    """A network of one operation each way: what is counted is the step's own work."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x, c_noise, labels=None, dropout_key=None):
        return x * self.weight


@pytest.mark.parametrize("iteration", [30_000, 10**6])
def test_a_step_launches_at_most_ten_times_outside_the_networks(iteration, triton_device):
    config = TcmConfig(batch_size=SIZE, huber_c=0.06)
    plan = Tcm.plan(config, seed=SEED, images_seen=0, iteration=iteration)
    student, frozen = (
        Precond(Linear(), img_resolution=8, img_channels=2, spec={}).to(triton_device)
        for _ in range(2)
    )
    objective = Tcm(config, student, frozen)
    (part,) = plan.parts(1)
    images = torch.randint(0, 256, (SIZE, 2, 8, 8), dtype=torch.uint8, device=triton_device)
    with Launches() as counted:
        batch = make_batch(plan, part, images, None, seed=SEED, step=STEP, row_multiple=8)
        loss, _ = objective(batch)
        loss.backward()
    # Each pass: the logarithm and the quarter of the noise level, and the one product; its gradient
    # (product, sum). The trainer adds the step's means to those of others: one more.
    networks = 3 * 3 + 2
    assert len(counted.names) - networks + 1 <= 10, " ".join(counted.names)


@pytest.mark.parametrize(
    ("name", "target", "dtype"),
    [
        ("ect", "image", torch.float32),
        pytest.param("ect", "image", torch.float16, marks=pytest.mark.slow),
        pytest.param("tcm", "image", torch.float32, marks=pytest.mark.slow),
        ("tcm", "posterior", torch.bfloat16),
    ],
)
def test_biases_that_a_gpu_adds_elsewhere(name, target, dtype, triton_device, monkeypatch):
    """The first convolution's times a channel of ones and the last one's in the loss, of targets of all
    kinds: loss and gradients are those with convolutions that add their own."""
    monkeypatch.delenv("TCM_FAST_BACKEND")
    shape = dict(img_resolution=4, img_channels=2, model_channels=8, channel_mult=[1], num_blocks=1)
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = build_network("ddpmpp", **shape, attn_resolutions=[], dropout=0.0)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        nets.append(net.to(triton_device, memory_format=torch.channels_last).train())
    fields = {"target": target, "bank_size": 4} if target == "posterior" else {}
    # Far from 0, where a difference of nearly equal numbers would show rounding.
    config = CONFIGS[name](batch_size=8, huber_c=0.06, **fields)
    objective = OBJECTIVES[name](config, *nets[: 1 + (name == "tcm")], dtype=dtype)
    kinds = {STUDENT, IMAGE} | ({STAGE1} if name == "tcm" else set())
    plans = (
        OBJECTIVES[name].plan(config, seed=SEED, images_seen=seen, iteration=0, iterations=1)
        for seen in range(100)
    )
    plan = next(plan for plan in plans if set(plan.source) == kinds)
    images = torch.randint(0, 256, (12, 2, 4, 4), dtype=torch.uint8, device=triton_device)
    (part,) = plan.parts(1)
    bank = (images[8:], None) if fields else None
    batch = make_batch(
        plan, part, images[part], None, seed=SEED, step=STEP, row_multiple=2, bank=bank
    )

    def step():
        objective.zero_grad()
        objective.forget_weights()
        loss, _ = objective(batch)
        loss.backward()
        return loss.item(), {n: p.grad for n, p in objective.student.named_parameters()}

    over_ones, passes = Conv2d.over_ones, []
    monkeypatch.setattr(Conv2d, "over_ones", lambda *a: passes.append(1) or over_ones(*a))
    loss, grads = step()
    assert len(passes) == len(kinds)  # of the student twice, of the stage-1 network
    monkeypatch.setattr(Objective, "append_ones", False)
    monkeypatch.setattr(Precond, "raw_and_bias", lambda self, *a, **k: (self.raw(*a, **k), None))
    expected, expected_grads = step()
    rounding = 1e-4 if dtype == torch.float32 else 0.05
    assert loss == pytest.approx(expected, rel=rounding)
    for n, grad in expected_grads.items():
        torch.testing.assert_close(
            grads[n], grad, rtol=0, atol=rounding * grad.abs().max().item(), msg=n
        )


def flops(objective, plan, images, row_multiple):
    """Floating-point operations of a step."""
    (part,) = plan.parts(1)
    batch = make_batch(
        plan, part, images[part], None, seed=SEED, step=STEP, row_multiple=row_multiple
    )
    with FlopCounterMode(display=False) as counter:
        objective(batch)[0].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("batch_size", "allowed"), [(128, 4.12), (16, 5.0)])
def test_a_step_costs_four_passes_in_operations(batch_size, allowed):
    """Beside one forward pass of the whole batch. The first convolution has no gradient to its input:
    a little less than 2 for the backward pass. At batch 16 rounding up costs most of what the split
    saves."""
    config = TcmConfig(batch_size=batch_size, huber_c=0.06)
    plan = Tcm.plan(config, seed=SEED, images_seen=0, iteration=10**6)
    objective = Tcm(config, network(1).train(), network(2))
    images = torch.randint(0, 256, (batch_size, 2, 8, 8)).to(torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective.student.raw(torch.zeros(batch_size, 2, 8, 8), torch.ones(batch_size))
    once = counter.get_total_flops()
    row_multiple = row_multiple_for(batch_size, torch.device("cuda"))
    passes = flops(objective, plan, images, row_multiple) / once
    assert 3.8 < passes < allowed
    if batch_size >= 128:
        unsplit = flops(objective, plan, images, batch_size) / once
        assert unsplit - passes > 0.9


def test_networks_compile_without_a_graph_break():
    net = network(1, dropout=0.3).train()
    key = PhiloxKey(seed=torch.tensor(3), step=torch.tensor(4), sample=torch.arange(4))
    x, t = torch.randn(4, 2, 8, 8), torch.rand(4)
    compiled = torch.compile(net.model, fullgraph=True, backend="eager")
    expected = net.model(x, t, dropout_key=key)
    found = compiled(x, t, dropout_key=key)
    torch.testing.assert_close(found, expected)
    found.sum().backward()


def test_frozen_weights_are_cast_once_and_the_students_once_a_step():
    config, plan, objective, images = problem("tcm", huber_c=0.06)
    low = Tcm(config, objective.student, objective.frozen, dtype=torch.bfloat16)
    kinds = {p.dtype for p in low.frozen.parameters()}
    assert kinds == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in objective.frozen.parameters()} == {torch.float32}
    run(low, plan, images, parts=4)
    cast = low._cast[1]
    run(low, plan, images, parts=2)
    assert low._cast[1] is cast
    with torch.no_grad():
        next(low.student.parameters()).add_(1)
    run(low, plan, images)
    assert low._cast[1] is not cast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_that_an_optimizer_keeps_are_used_instead_of_casts(dtype):
    config, plan, objective, images = problem("tcm", huber_c=0.06)
    cast = Tcm(config, objective.student, objective.frozen, dtype=dtype)
    kept = Tcm(config, objective.student, objective.frozen, dtype=dtype)
    kept.copies = make_copies(kept.student, dtype)
    for (name, _), copied in zip(kept.student.named_parameters(), kept.copies, strict=True):
        assert (copied is None) == ("norm" in name or "map_" in name), name
    expected, found = run(cast, plan, images), run(kept, plan, images)
    assert found[0] == expected[0]
    assert torch.equal(found[2], expected[2])


# ---- EDM2 ---------------------------------------------------------------------------------------


def edm2(seed, dropout=0.0, **options):
    torch.manual_seed(seed)
    net = build_network(
        "edm2", img_resolution=8, img_channels=2, label_dim=3, model_channels=16,
        channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4], channels_per_head=16,
        dropout=dropout, **options,
    )  # fmt: skip
    for parameter in net.parameters():
        if parameter.ndim == 0:
            parameter.data.fill_(0.7)
    return net


def edm2_step(objective, plan, images, parts=1):
    """Loss and gradient of a step with labels."""
    labels = torch.eye(3)[torch.arange(SIZE) % 3]
    objective.zero_grad()
    loss = 0.0
    for part in plan.parts(parts):
        batch = make_batch(plan, part, images[part], labels[part], seed=SEED, step=STEP)
        share, _ = objective(batch)
        share.backward()
        loss += share.item()
    grads = [p.grad for p in objective.parameters() if p.grad is not None]
    return loss, torch.cat([g.flatten() for g in grads])


def edm2_problem(name, **fields):
    config = CONFIGS[name](batch_size=SIZE, **fields)
    plan = OBJECTIVES[name].plan(
        config, seed=SEED, images_seen=0, iteration=100_000, iterations=200_000
    )
    images = torch.randint(0, 256, (SIZE, 2, 8, 8), generator=torch.Generator().manual_seed(3))
    return config, plan, images.to(torch.uint8)


@pytest.mark.parametrize("name", ["edm", "ect", "tcm"])
def test_normalising_once_a_step_does_not_change_it(name, monkeypatch):
    """Against a network that normalises in every forward, in the graph."""
    config, plan, images = edm2_problem(name, **({} if name == "edm" else {"huber_c": 0.06}))
    frozen = edm2(2, 0.2) if name == "tcm" else None
    once = OBJECTIVES[name](config, edm2(1, 0.2).train(), frozen)
    each = OBJECTIVES[name](config, edm2(1, 0.2).train(), frozen)
    monkeypatch.setattr(each, "_derives", False)
    each._frozen = (frozen,)
    loss, grad = edm2_step(once, plan, images, parts=2)
    expected, expected_grad = edm2_step(each, plan, images, parts=2)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert cosine(grad, expected_grad) > 1 - 1e-4


def test_a_step_normalises_each_weight_once_and_writes_none(monkeypatch):
    from tcm_fast.networks import precision

    config, plan, images = edm2_problem("tcm", huber_c=0.06)
    objective = Tcm(config, edm2(1).train(), edm2(2))
    before = {name: p.clone() for name, p in objective.student.named_parameters()}
    seen = []
    scaled = precision.normalized_copy
    monkeypatch.setattr(precision, "normalized_copy", lambda w: seen.append(w) or scaled(w))
    edm2_step(objective, plan, images, parts=4)
    rows = objective.student.model.normalized_names()
    assert len(seen) == len(rows)  # for two networks, three passes and four micro-batches
    assert not objective.frozen.model.normalized_names()
    edm2_step(objective, plan, images)
    assert len(seen) == len(rows)
    assert all(torch.equal(p, before[name]) for name, p in objective.student.named_parameters())


def test_learned_variance_is_the_formula():
    config, plan, images = edm2_problem("edm")
    net = edm2(1, logvar_channels=8).train()
    plain = Edm(config, edm2(1).train())
    labels = torch.eye(3)[torch.arange(SIZE) % 3]
    (part,) = plan.parts(1)
    batch = make_batch(plan, part, images, labels, seed=SEED, step=STEP)
    net.model.load_state_dict(plain.student.model.state_dict())
    learned = Edm(config, net)
    squared = plain.losses(batch).detach()
    u = net.log_variance(batch.t)
    expected = squared * (-u).exp() + u * (2 * 8 * 8)
    torch.testing.assert_close(learned.losses(batch), expected)
    learned(batch)[0].backward()
    assert net.logvar_linear.weight.grad.any()


def test_augmented_images_and_their_labels_reach_the_network():
    config, plan, images = edm2_problem("edm", augment=0.5)
    torch.manual_seed(0)
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=2, model_channels=16, channel_mult=[1],
        num_blocks=1, attn_resolutions=[], dropout=0.0, augment_dim=9,
    ).train()  # fmt: skip
    torch.nn.init.normal_(net.model.dec["8x8_aux_conv"].weight)
    objective = Edm(config, net)
    (part,) = plan.parts(1)
    batch = make_batch(plan, part, images, None, seed=SEED, step=STEP)
    objective(batch)[0].backward()
    assert net.model.map_augment.weight.grad.any()
    whole = objective.losses(batch)
    pieces = [
        objective.losses(make_batch(plan, rows, images[rows], None, seed=SEED, step=STEP))
        for rows in plan.parts(4)
    ]
    found = torch.empty_like(whole)
    for rows, piece in zip(plan.parts(4), pieces, strict=True):
        found[torch.from_numpy(rows)] = piece
    order = torch.from_numpy(part)
    torch.testing.assert_close(found[order], whole, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"edm.augment: needs .* got 0"):
        Edm(config, network(1))
