"""Mid-training: trajectories against their formula and the exact flow, the step against a naive one, runs."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_manifold import feature_network, naive_features, write
from tiny_runs import (
    PHASE,
    assert_equal,
    assert_same_run,
    events,
    relative_difference,
    run_ranks,
    tiny,
    train,
    weights,
    write_images,
)

from tcm_fast.checkpoint.format import load_checkpoint, load_network
from tcm_fast.checkpoint.run_folder import newest_checkpoint, read_state
from tcm_fast.cli.main import main
from tcm_fast.config import CmtConfig, Config, from_dict, load_config, load_preset, save_config
from tcm_fast.kernels.noise_pair import NOISE_LAYER
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.networks import build_network
from tcm_fast.networks.precond import Precond
from tcm_fast.networks.raw_network import RawNetwork
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.cmt import DISTANCES, Cmt
from tcm_fast.objectives.noise_levels import karras_grid
from tcm_fast.planning.memory_estimate import ImageShape, dry_step
from tcm_fast.planning.memory_planner import mean_work

SIZE, SEED, STEP, SHAPE = 16, 5, 7, (2, 8, 8)
LABELS = torch.eye(3)[torch.arange(SIZE) % 3]


def network(seed, dropout=0.0):
    torch.manual_seed(seed)
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=2, label_dim=3, model_channels=16, channel_mult=[1, 1],
        num_blocks=1, attn_resolutions=[4], dropout=dropout,
    )  # fmt: skip
    for parameter in net.parameters():  # the output convolution starts at 1e-5
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def planned(config, images_seen=0):
    return Cmt.plan(config, seed=SEED, images_seen=images_seen)


def problem(dropout=0.0, dtype=torch.float32, **fields):
    config = CmtConfig(**{"batch_size": SIZE, "steps": 8} | fields)
    objective = Cmt(config, network(1, dropout).train(), network(2, dropout), dtype=dtype)
    return config, planned(config), objective


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Files of feature networks of images of 8x8 pixels, by their channels."""
    folder = tmp_path_factory.mktemp("features")
    return {n: write(folder / f"{n}.safetensors", feature_network(n)) for n in (1, 2)}


def of_distance(name, features, channels=2):
    """Fields of a configuration."""
    return {"distance": name, "features": features[channels] if name == "manifold" else ""}


def batches(plan, parts=1):
    """Micro-batches as a run makes them: rows of a trajectory have its first sample's image and label."""
    images = torch.arange(SIZE, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, *SHAPE)
    for part in plan.parts(parts):
        taken = plan.images(part)
        yield make_batch(plan, part, images[taken], LABELS[taken], seed=SEED, step=STEP)


def step(objective, plan, parts=1):
    """Loss and gradient of a batch cut into parts."""
    objective.zero_grad()
    loss = 0.0
    for batch in batches(plan, parts):
        share, _ = objective(batch)
        share.backward()
        loss += share.item()
    return loss, torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


# ---- the plan -----------------------------------------------------------------------------------


def test_samples_that_share_a_trajectory_take_all_its_points():
    config = CmtConfig(batch_size=64)
    plan = planned(config)
    levels = karras_grid(16)
    np.testing.assert_allclose(levels[[0, -1]], [0.002, 80])
    for trajectory in range(4):
        rows = plan.image == trajectory
        np.testing.assert_array_equal(np.sort(plan.t[rows]), levels[1:])
    np.testing.assert_array_equal(plan.r, np.full(64, 0.002))
    np.testing.assert_array_equal(plan.weighting, np.ones(64, np.float32))


@pytest.mark.parametrize("points", [1, 4, 6])
def test_fewer_points_are_drawn_from_equal_parts(points):
    config = CmtConfig(batch_size=48, points=points)
    counts = np.zeros(16)
    for k in range(400):
        number = np.searchsorted(karras_grid(16)[1:], planned(config, 48 * k).t)
        counts += np.bincount(number, minlength=16)
        part = number.reshape(points, -1)
        assert (part >= np.arange(points)[:, None] * 16 // points).all()
        assert (part <= (np.arange(points)[:, None] + 1) * 16 / points).all()
    np.testing.assert_allclose(counts / counts.sum(), 1 / 16, rtol=0.1)


@pytest.mark.parametrize(("size", "points", "sharing"), [(64, None, 16), (24, None, 8), (7, 4, 1)])
def test_a_trajectory_is_shared_by_a_divisor_of_the_batch(size, points, sharing):
    config = CmtConfig(batch_size=size, points=points)
    assert config.sharing == sharing
    assert np.bincount(planned(config).image).tolist() == [sharing] * (size // sharing)
    assert f"each for {sharing} samples: {16 / sharing:g} x a pass of the teacher" in Cmt.note(
        config
    )


# ---- trajectories -------------------------------------------------------------------------------


class Zero(RawNetwork):
    """F = 0: D(x,t) = c_skip x, the denoiser of Gaussian data, whose flow is known."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, x, c_noise, labels=None, dropout_key=None):
        return x * self.weight


def flow_error(steps):
    """Largest relative error of points and ends, of data N(0, 0.5²)."""
    config = CmtConfig(batch_size=SIZE, steps=steps)
    student, teacher = (Precond(Zero(), img_resolution=8, img_channels=2, spec={}) for _ in "ab")
    plan = planned(config)
    (batch,) = (
        make_batch(
            plan, part, torch.zeros(SIZE, *SHAPE).byte(), None, seed=SEED, step=STEP
        )
        for part in plan.parts(1)
    )  # fmt: skip
    points, ends = Cmt(config, student, teacher).points(batch)
    sample = torch.arange(SIZE) % (SIZE // config.sharing)
    x = 80 * philox_normal(SEED, STEP, NOISE_LAYER, sample, SHAPE).double()

    def exact(t):
        return x * torch.sqrt((t**2 + 0.25) / (80**2 + 0.25)).reshape(-1, 1, 1, 1)

    found = torch.stack([points, ends]).double()
    expected = torch.stack([exact(torch.tensor(plan.t)), exact(torch.full((SIZE,), 0.002))])
    return ((found - expected).abs().amax((2, 3, 4)) / expected.abs().amax((2, 3, 4))).max().item()


def test_trajectories_follow_the_flow_to_second_order():
    errors = [flow_error(steps) for steps in (16, 32, 64, 128)]
    assert errors[0] < 0.08
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(orders) > 1.7


# ---- the loss -----------------------------------------------------------------------------------


def naive_manifold(image, end):
    """The root of the sum of squares, with the gradient of that sum scaled to norm 1."""
    net = feature_network()
    at = image.detach().requires_grad_()
    pairs = zip(naive_features(net, at[None]), naive_features(net, end[None]), strict=True)
    square = sum((a - b).square().sum() for a, b in pairs)
    (g,) = torch.autograd.grad(square, at)
    along = (image * g / g.square().sum().sqrt()).sum()
    return square.detach().sqrt() + along - along.detach()


def naive_loss(config, plan, objective):
    """One sample at a time in float64, by the source's formulas in lambda = -ln t."""
    student = objective.student
    student, teacher = (net.double().eval() for net in (student, objective.frozen))
    levels = karras_grid(config.steps)[::-1]
    lam = [-math.log(t) for t in levels]
    total = torch.zeros((), dtype=torch.float64)

    def denoised(net, x, t, label):
        v = t * t + 0.25
        c_noise = torch.tensor([math.log(t) / 4]).double()
        raw = net.model((x / math.sqrt(v))[None], c_noise, label[None])[0]
        return 0.25 / v * x + t * 0.5 / math.sqrt(v) * raw

    for i in range(SIZE):
        j = i % (SIZE // config.sharing)
        label = LABELS[j].double()
        x = 80 * philox_normal(SEED, STEP, NOISE_LAYER, torch.tensor([j]), SHAPE)[0].double()
        states, outputs = [x], []
        with torch.no_grad():
            for n in range(1, len(levels)):
                outputs.append(denoised(teacher, x, levels[n - 1], label))
                h = lam[n] - lam[n - 1]
                d = outputs[-1]
                if n > 1:
                    r = (lam[n - 1] - lam[n - 2]) / h
                    d = (1 + 1 / (2 * r)) * outputs[-1] - 1 / (2 * r) * outputs[-2]
                x = levels[n] / levels[n - 1] * x - (math.exp(-h) - 1) * d
                states.append(x)
        number = int(np.abs(levels - plan.t[i]).argmin())
        image = denoised(student, states[number], levels[number], label)
        square = (image - states[-1]).square().sum()
        if config.distance == "manifold":
            square = naive_manifold(image, states[-1])
        if config.distance == "huber":
            square = torch.sqrt(square + config.huber_c**2) - config.huber_c
        total = total + square / SIZE
    return total, student


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("points", [None, 2])
def test_a_step_is_the_formula(distance, points, features):
    fields = of_distance(distance, features)
    config, plan, objective = problem(points=points, huber_c=0.06, **fields)
    loss, grad = step(objective, plan)
    expected, student = naive_loss(config, plan, objective)
    expected_grad = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    expected_grad = torch.cat([g.flatten() for g in expected_grad if g is not None])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert cosine(grad, expected_grad) > 1 - 1e-6
    assert relative_difference({"g": expected_grad}, {"g": grad}) < 1e-4


@pytest.mark.parametrize("points", [None, 2, 1])
@pytest.mark.parametrize("parts", [2, 4, 8, 16])
def test_a_step_does_not_depend_on_how_it_is_cut(points, parts):
    _, plan, objective = problem(dropout=0.3, points=points)
    loss, grad = step(objective, plan)
    cut_loss, cut_grad = step(objective, plan, parts)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    assert cosine(grad, cut_grad) > 1 - 1e-5


def test_nor_does_one_with_the_manifold_distance(features):
    _, plan, objective = problem(dropout=0.3, **of_distance("manifold", features))
    loss, grad = step(objective, plan)
    assert torch.equal(step(objective, plan)[1], grad)
    for parts in (2, 16):
        cut_loss, cut_grad = step(objective, plan, parts)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        assert cosine(grad, cut_grad) > 1 - 1e-5
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"student"}


@pytest.mark.parametrize(
    ("points", "parts", "rows"), [(None, 1, 2), (None, 2, 1), (None, 8, 1), (4, 1, 4), (1, 2, 8)]
)
def test_the_teacher_computes_each_trajectory_once(points, parts, rows):
    _, plan, objective = problem(points=points)
    raw, counted = objective.frozen.raw, []
    objective.frozen.raw = lambda x, *a, **k: counted.append(len(x)) or raw(x, *a, **k)
    step(objective, plan, parts)
    assert counted == [rows] * 8 * parts


@pytest.mark.parametrize(("size", "points"), [(24, 6), (24, 4), (36, 4), (30, 5), (20, 7)])
def test_any_cut_solves_the_same_trajectories(size, points):
    """Each once in a part, and as in the whole batch: into 1 to `size` parts."""
    config = CmtConfig(batch_size=size, steps=8, points=points)
    plan = planned(config)
    student, teacher = (Precond(Zero(), img_resolution=8, img_channels=2, spec={}) for _ in "ab")
    objective, rows = Cmt(config, student, teacher), []
    raw = teacher.raw
    teacher.raw = lambda x, *a, **k: rows.append(len(x)) or raw(x, *a, **k)
    images = torch.zeros(size, *SHAPE).byte()
    whole = None
    for count in (n for n in range(1, size + 1) if size % n == 0):
        found = torch.empty(2, size, *SHAPE)
        for part in plan.parts(count):
            batch = make_batch(plan, part, images[part], None, seed=SEED, step=STEP)
            rows.clear()
            found[:, part] = torch.stack(objective.points(batch))
            assert {*rows} == {len({*plan.images(part)})}
        whole = found if whole is None else whole
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_sixteen_bits_are_near(dtype, distance, features):
    """Trajectories and loss stay in fp32."""
    fields = of_distance(distance, features)
    _, plan, objective = problem(**fields)
    _, _, low = problem(dtype=dtype, **fields)
    (batch,) = batches(plan)
    assert {x.dtype for x in low.points(batch)} == {torch.float32}
    (loss, grad), (low_loss, low_grad) = step(objective, plan), step(low, plan)
    assert low_loss == pytest.approx(loss, rel=0.05)
    assert cosine(grad, low_grad) > 0.98


def test_the_teacher_has_no_gradient_and_no_dropout():
    _, plan, objective = problem(dropout=0.3)
    step(objective, plan)
    assert not objective.frozen.training
    assert all(p.grad is None for p in objective.frozen.parameters())
    (batch,) = batches(plan)
    first, second = objective.points(batch), objective.points(batch)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- what it costs ------------------------------------------------------------------------------


def test_planning_counts_the_solver():
    """A pass each for all points, four for four of 16 samples, beside three of the student."""
    shape = ImageShape(8, 1)
    base = dataclasses.replace(load_preset("digits"), phases=("cmt",))

    def work(name, **fields):
        own = dataclasses.replace(base.phase(name), batch_size=64, **fields)
        return dry_step(dataclasses.replace(base, **{name: own}), name, shape, on_gpu=False)

    one = work("edm").flops / 3
    assert work("cmt").flops == pytest.approx(4 * one, rel=0.02)
    assert work("cmt", points=4).flops == pytest.approx(7 * one, rel=0.02)
    assert work("cmt").frozen > 0
    assert mean_work(base, "cmt") == 1.0


def test_planning_counts_the_feature_network(features):
    """Its memory, two passes and a gradient with respect to the image."""
    base, net = load_preset("digits"), feature_network(1)

    def planned(distance):
        fields = of_distance(distance, features, channels=1)
        cmt = dataclasses.replace(base.cmt, batch_size=64, **fields)
        return dry_step(dataclasses.replace(base, cmt=cmt), "cmt", ImageShape(8, 1), on_gpu=True)

    found, without = planned("manifold"), planned("huber")
    assert found.frozen - without.frozen == 4 * sum(p.numel() for p in net.parameters())
    products = sum(
        conv.weight.numel() * (64, 16)[k] for k, block in enumerate(net.blocks) for conv in block
    )
    assert found.flops - without.flops == 3 * 2 * products * found.rows


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--time-budget", "0.02"], marks=pytest.mark.slow)]
)
def test_the_command_plans_it(options, capsys):
    phases = ["edm", "cmt", "ect", "tcm"]
    arguments = ["plan", "--preset", "digits", "--gpu", "rtx4090", "--phases", *phases]
    with pytest.raises(SystemExit) as ended:
        main(arguments + options)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(f" {name} " in said for name in phases)


# ---- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def config_of(images, **changes):
    own = PHASE | {"steps": 4}
    changes = {"phases": ["edm", "cmt", "ect", "tcm"], "grid_every": 1000, "cmt": own} | changes
    return tiny(images, **changes)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train(config_of(images, keep_checkpoints=9), out)
    return out


def test_it_trains_between_the_other_phases(run):
    folder = run / "checkpoints"
    edm, cmt, ect, tcm = (
        load_checkpoint(folder / f"{name}-000000096") for name in ("edm", "cmt", "ect", "tcm")
    )
    assert_equal(cmt.network_tensors("teacher"), edm.network_tensors("ema-0"))
    assert cmt.state["phase"] == "cmt"
    assert [c.state["iterations"] for c in (cmt, ect, tcm)] == [6, 6, 12]  # ect begins by itself
    lines = [e for e in events(run) if e["event"] == "train"]
    assert {e["phase"] for e in lines} == {"edm", "cmt", "ect", "tcm"}
    assert np.isfinite([e["loss"] for e in lines]).all()
    assert next(e["ratio"] for e in lines if e["phase"] == "ect") == 0.5
    assert load_network(folder / "cmt-000000096").info["phase"] == "cmt"


def test_a_resumed_run_repeats_an_unbroken_one(images, run, tmp_path):
    config = config_of(images, phases=["cmt"], network={"class_conditional": False})
    edm = run / "checkpoints" / "edm-000000096"
    train(config, tmp_path / "whole", init=edm)
    train(dataclasses.replace(config, max_steps=2), tmp_path / "cut", init=edm)
    train(config, tmp_path / "cut", resume=True)
    assert_same_run(
        tmp_path / "whole", tmp_path / "cut", ("model", "ema-0", "teacher", "optimizer")
    )


def test_a_run_is_resumed_with_its_features_alone(images, run, features, tmp_path):
    edm, out = run / "checkpoints" / "edm-000000096", tmp_path / "cut"
    own = PHASE | {"steps": 4} | of_distance("manifold", features, channels=1)
    config = config_of(images, phases=["cmt"], cmt=own, micro_batches=2)
    train(config, tmp_path / "whole", init=edm)
    train(dataclasses.replace(config, max_steps=3), out, init=edm)
    assert read_state(newest_checkpoint(out))["reads"].keys() == {"features"}
    other = write(tmp_path / "other.safetensors", feature_network(1, seed=1))
    for fields in ({"features": other}, {"distance": "pixel", "features": ""}):
        changed = dataclasses.replace(config, cmt=dataclasses.replace(config.cmt, **fields))
        with pytest.raises(ValueError, match=r"resume: cmt.features must stay the file of SHA-256"):
            train(changed, out, resume=True)
    train(config, out, resume=True)
    assert_same_run(tmp_path / "whole", out, ("model", "ema-0", "teacher", "optimizer"))


def test_a_run_without_features_is_not_resumed_with_some(images, run, features, tmp_path):
    config = config_of(images, phases=["cmt"], max_steps=3)
    train(config, tmp_path / "run", init=run / "checkpoints" / "edm-000000096")
    own = dataclasses.replace(config.cmt, **of_distance("manifold", features, channels=1))
    with pytest.raises(
        ValueError, match=r"resume: cmt.features must stay the file of SHA-256 None"
    ):
        train(dataclasses.replace(config, cmt=own), tmp_path / "run", resume=True)


def test_the_manifold_distance_falls_on_the_digits(features, tmp_path):
    phase = {"batch_size": 64, "dropout": 0.0, "lr": 2e-3, "images": 64 * 30}
    own = phase | {"steps": 4} | of_distance("manifold", features, channels=1)
    config = tiny(
        "digits:train", phases=["edm", "cmt"], edm=phase, cmt=own, grid_every=1000, save_every=1000
    )
    train(config, tmp_path / "run")
    lines = [e for e in events(tmp_path / "run") if e["event"] == "train"]
    losses = [e["loss"] for e in lines if e["phase"] == "cmt"]
    assert max(losses[-3:]) < min(losses[:3])


def test_it_says_what_it_solves(images, run, tmp_path, capsys):
    edm = run / "checkpoints" / "edm-000000096"
    train(config_of(images, phases=["cmt"], max_steps=1), tmp_path / "run", init=edm)
    assert "cmt: each step solves trajectories of 4 steps" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_classes_of_a_trajectory_are_those_of_its_first_sample(images, tmp_path):
    """Also where the batch is cut into parts smaller than a trajectory's samples."""
    whole, cut = (
        config_of(
            images, phases=["edm", "cmt"], network={"class_conditional": True}, micro_batches=count,
            max_steps=2,
        )
        for count in (1, 8)
    )  # fmt: skip
    edm = tmp_path / "edm"
    train(dataclasses.replace(whole, phases=("edm",)), edm)
    for config, name in ((whole, "whole"), (cut, "cut")):
        train(dataclasses.replace(config, phases=("cmt",)), tmp_path / name, init=edm)
    losses = [
        [e["loss"] for e in events(tmp_path / name) if e["event"] == "train"]
        for name in ("whole", "cut")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert relative_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["pixel", "manifold"])
def test_two_processes_train_as_one(distance, images, run, features, tmp_path):
    edm = run / "checkpoints" / "edm-000000096"
    own = PHASE | {"steps": 4, "lr": 1e-4} | of_distance(distance, features, channels=1)
    config = config_of(images, phases=["cmt"], cmt=own, device="cpu")
    train(config, tmp_path / "one", init=edm)
    run_ranks(2, dataclasses.replace(config, micro_batches=2), tmp_path / "two", edm)
    for file in ("model", "ema-0"):
        one, two = (weights(tmp_path / name, file) for name in ("one", "two"))
        assert relative_difference(one, two) <= 1e-5


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, r"cmt.steps: must be at least 1, got 0"),
        ({"points": 0}, r"cmt.points: must lie in \[1, steps = 16\], got 0"),
        ({"points": 9, "steps": 8}, r"cmt.points: must lie in \[1, steps = 8\], got 9"),
        ({"huber_c": -1.0}, r"cmt.huber_c: must be positive, got -1"),
        ({"distance": "lpips"}, r"cmt.distance: must be .*pixel, huber, manifold, got 'lpips'"),
        ({"distance": "manifold"}, r"cmt.features: the manifold distance needs a file of"),
        ({"features": "f"}, r"cmt.features: only the manifold .* got f for distance pixel"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, {"cmt": fields})


def test_feature_files_that_are_refused(images, features, tmp_path):
    """In the words of the consistency phases, before anything is written."""
    large = write(tmp_path / "large.safetensors", feature_network(1, resolution=16))
    for file, message in (
        (tmp_path / "none.safetensors", "no such file"),
        (features[2], r".* must be of images of channels 1, got 2"),
        (large, r".* must be of images of resolution 8, got 16"),
    ):
        own = PHASE | {"distance": "manifold", "features": str(file)}
        with pytest.raises((ValueError, FileNotFoundError), match=f"^cmt.features: {message}"):
            train(config_of(images, cmt=own), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_configurations_of_earlier_versions_are_read(tmp_path):
    """Which had no `features` here."""
    path = tmp_path / "config.json"
    save_config(from_dict(Config, {"cmt": {"distance": "huber"}}), path)
    values = json.loads(path.read_text())
    del values["cmt"]["features"]
    path.write_text(json.dumps(values))
    assert load_config(path).cmt == CmtConfig(distance="huber")


def test_it_needs_a_pre_trained_network(images, run, tmp_path):
    config = config_of(images, phases=["cmt"])
    with pytest.raises(ValueError, match="phase cmt: needs a teacher: train edm first, or give"):
        train(config, tmp_path / "alone")
    ect = run / "checkpoints" / "ect-000000096"
    with pytest.raises(
        ValueError, match=r"phase cmt: needs a teacher: .*, got a network of phase ect"
    ):
        train(config, tmp_path / "wrong", init=ect)
    with pytest.raises(
        ValueError, match=r"phase cmt: needs a teacher: .*, got a network of phase ect"
    ):
        train(config_of(images, phases=["edm", "ect", "cmt"]), tmp_path / "order")
    assert not (tmp_path / "order").exists()
    with pytest.raises(ValueError, match="cmt needs a frozen network"):
        Cmt(CmtConfig(), network(1))


def test_seeds_of_the_other_phases_are_what_they_were():
    assert list(OBJECTIVES)[:5] == ["edm", "ect", "tcm", "ict", "cd"]
