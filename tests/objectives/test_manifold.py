"""The manifold feature distance against its formula written out in float64, its file, and runs with it."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_objective import SEED, SIZE, STEP, NoWaiting, cosine, network, run
from tiny_runs import assert_same_run, events, run_ranks, tiny, train, weights, write_images

from tcm_fast.benchmarks.memory_optimizations import held
from tcm_fast.checkpoint.run_folder import newest_checkpoint, read_state
from tcm_fast.config import Config, EctConfig
from tcm_fast.kernels._backend import extension
from tcm_fast.kernels.noise_pair import NOISE_LAYER
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.ect import Ect
from tcm_fast.objectives.manifold import (
    FeatureNetwork,
    contents_of,
    feature_distance,
    manifold_loss,
    read_features,
)
from tcm_fast.objectives.noise_levels import IMAGE
from tcm_fast.planning.memory_estimate import ImageShape, dry_step, memory
from tcm_fast.runtime.atomic import write_tensors


def feature_network(channels=2, resolution=8, seed=0, width=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = FeatureNetwork(resolution=resolution, channels=channels, width=width, strengths=3)
        net.balance(torch.rand(64, channels, resolution, resolution) * 2 - 1)
    return net.eval().requires_grad_(False)


def write(path, net):
    write_tensors(path, *contents_of(net, {"seed": 0}))
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Of images of 8x8 pixels and 2 channels."""
    return write(tmp_path_factory.mktemp("features") / "two.safetensors", feature_network())


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Of images of 8x8 pixels and 1 channel."""
    return write(tmp_path_factory.mktemp("features") / "grey.safetensors", feature_network(1))


def problem(name, file, iteration=100_000, dropout=0.0, **fields):
    config = replace(
        Config().phase(name), batch_size=SIZE, distance="manifold", features=file, **fields
    )
    plan = OBJECTIVES[name].plan(config, seed=SEED, images_seen=0, iteration=iteration)
    frozen = network(2, dropout) if name in ("tcm", "cd") else None
    objective = OBJECTIVES[name](config, network(1, dropout).train(), frozen)
    images = torch.randint(0, 256, (SIZE, 2, 8, 8), generator=torch.Generator().manual_seed(3))
    return plan, objective, images.to(torch.uint8)


# ---- the distance -------------------------------------------------------------------------------


def naive_features(net, x):
    """Of images, by the formulas of a convolution and a pool, in float64."""
    found = []
    for number, block in enumerate(net.blocks):
        if number:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        for conv in block:
            n, size = len(x), x.shape[2]
            columns = F.unfold(x, 3, padding=1)
            x = conv.weight.double().flatten(1) @ columns + conv.bias.double()[:, None]
            x = x.reshape(n, -1, size, size) * (x.reshape(n, -1, size, size) > 0)
            found.append(x)
    return found


def naive(net, output, x_t, t, target, x_r, r, weight, is_clean, sd=0.5):
    """Loss and gradient with respect to the raw output, one sample at a time."""
    losses, gradients = [], []
    for i in range(len(t)):

        def denoised(raw, x, s):
            v = s * s + sd * sd
            return sd * sd / v * x + s * sd / math.sqrt(v) * raw

        own = denoised(output[i], x_t[i], float(t[i])).requires_grad_()
        theirs = target[i] if is_clean[i] else denoised(target[i], x_r[i], float(r[i]))
        pairs = zip(naive_features(net, own[None]), naive_features(net, theirs[None]), strict=True)
        square = sum(((a - b) ** 2).sum() for a, b in pairs)
        (g,) = torch.autograd.grad(square, own)
        length = g.square().sum().sqrt()
        c_out = float(t[i]) * sd / math.sqrt(float(t[i]) ** 2 + sd * sd)
        gradients.append(float(weight[i]) * c_out * (g / length if length > 0 else g))
        losses.append(float(weight[i]) * square.detach().sqrt())
    return torch.stack(losses), torch.stack(gradients)


def arguments(n, seed=0, resolution=8, channels=2):
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n, channels, resolution, resolution, generator=g, dtype=torch.float64)

    t = torch.rand(n, generator=g, dtype=torch.float64) * 3 + 0.1
    images = {"output": normal(), "x_t": normal(), "t": t, "target_output": normal()}
    clean = torch.arange(n) % 3 == 0
    return images | {"x_r": normal(), "r": t * 0.7, "is_clean": clean, "weighting": 1 / t}


@pytest.mark.parametrize("shape", [(7, 8, 2), (3, 5, 3), (2, 20, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_loss_and_gradient_are_the_formula(shape, layout):
    n, resolution, channels = shape
    net = feature_network(channels, resolution)
    given = arguments(n, resolution=resolution, channels=channels)
    expected, gradient = naive(
        net, given["output"], given["x_t"], given["t"], given["target_output"], given["x_r"],
        given["r"], given["weighting"], given["is_clean"],
    )  # fmt: skip
    upstream = torch.randn(n, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        cast = {k: v.to(memory_format=layout) if v.ndim == 4 else v for k, v in cast.items()}
        output = cast.pop("output").requires_grad_()
        losses = manifold_loss(output, features=copy.deepcopy(net).to(dtype), **cast)
        (found,) = torch.autograd.grad(losses, output, upstream.to(dtype))
        torch.testing.assert_close(losses, expected.to(dtype), rtol=tolerance, atol=0)
        error = (found - upstream.reshape(-1, 1, 1, 1) * gradient).flatten(1).norm(dim=1)
        assert (error <= tolerance * (upstream * gradient.flatten(1).norm(dim=1)).abs()).all()


def test_the_gradient_has_norm_1_for_each_image():
    net = feature_network()
    a, b = torch.randn(2, 9, 2, 8, 8)
    b[1] = a[1] + 1e-4 * torch.randn(2, 8, 8)
    b[2] = a[2]
    _, direction = feature_distance(net, a, b)
    expected = torch.ones(9)
    expected[2] = 0  # of an image that is its target: 0, not NaN
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), expected)
    distance, nothing = feature_distance(net, a, a)
    assert not distance.any()
    assert not nothing.any()


def test_no_image_is_nobodys_business():
    found = feature_distance(feature_network(), torch.empty(0, 2, 8, 8), torch.empty(0, 2, 8, 8))
    assert [len(x) for x in found] == [0, 0]


def test_a_step_along_the_gradient_brings_features_nearer():
    net = feature_network()
    a, b = torch.randn(2, 6, 2, 8, 8)
    before, direction = feature_distance(net, a, b)
    after, _ = feature_distance(net, a - 0.01 * direction, b)
    assert (after < before).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_outputs(dtype):
    """The features compute in fp32 whatever the networks' dtype; the gradient is of the output's."""
    net, given = feature_network(), arguments(6)
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    low = given | {"output": given["output"].to(dtype).requires_grad_()}
    low["target_output"] = given["target_output"].to(dtype)
    high = {k: v.detach().float() if v.is_floating_point() else v for k, v in low.items()}
    high["output"].requires_grad_()
    losses = [manifold_loss(features=net, **given) for given in (low, high)]
    grads = [
        torch.autograd.grad(loss.sum(), given["output"])[0]
        for loss, given in zip(losses, (low, high), strict=True)
    ]
    assert torch.equal(*losses)
    assert losses[0].dtype == torch.float32
    assert grads[0].dtype == dtype
    torch.testing.assert_close(grads[0].float(), grads[1], rtol=2**-7, atol=1e-6)


# ---- a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [0, 100_000])
def test_a_step_is_the_formula(file, iteration):
    plan, objective, images = problem("ect", file, iteration)
    assert (plan.source == IMAGE).any() == (iteration == 0)
    loss, _, grad = run(objective, plan, images)
    student = copy.deepcopy(objective.student).double().eval()
    noise = philox_normal(SEED, STEP, NOISE_LAYER, torch.arange(SIZE), (2, 8, 8)).double()
    t, r = (torch.from_numpy(v).double() for v in (plan.t, plan.r))
    y = images.double() / 127.5 - 1
    x_t, x_r = (y + s.reshape(-1, 1, 1, 1) * noise for s in (t, r))

    def raw(x, s):
        v = (s * s + 0.25).sqrt().reshape(-1, 1, 1, 1)
        return student.model(x / v, s.log() / 4)

    output, target = raw(x_t, t), raw(x_r, r).detach()
    weight = torch.from_numpy(plan.weighting).double() / SIZE
    net, _ = read_features(file, "ect.features")
    never = torch.zeros(SIZE, dtype=torch.bool)  # at r = 1e-6 the denoised image is y
    losses, gradient = naive(net, output.detach(), x_t, t, target, x_r, r, weight, never)
    expected = torch.autograd.grad(output, list(student.parameters()), gradient)
    assert loss == pytest.approx(losses.sum().item(), rel=1e-3)
    assert cosine(grad, torch.cat([g.flatten() for g in expected])) > 1 - 1e-4


@pytest.mark.parametrize("name", ["ect", "tcm", "ict", "cd"])
def test_micro_batches_do_not_change_a_step(file, name):
    plan, objective, images = problem(name, file, dropout=0.3)
    loss, stats, grad = run(objective, plan, images)
    assert grad.any()
    for parts in (2, SIZE):
        cut_loss, cut_stats, cut_grad = run(objective, plan, images, parts)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(cut_stats, stats, rtol=1e-5, atol=1e-6)
        assert cosine(grad, cut_grad) > 1 - 1e-5
    assert torch.equal(run(objective, plan, images)[2], grad)


def test_sixteen_bit_networks(file):
    plan, objective, images = problem("ect", file, iteration=0)
    low = Ect(objective.config, objective.student, dtype=torch.bfloat16)
    loss, _, grad = run(objective, plan, images)
    low_loss, _, low_grad = run(low, plan, images)
    assert low_loss == pytest.approx(loss, rel=0.05)
    assert cosine(grad, low_grad) > 0.97


@pytest.mark.parametrize("iteration", [0, 10**6])
def test_a_step_never_waits_for_the_device(file, iteration):
    plan, objective, images = problem("tcm", file, iteration)
    (part,) = plan.parts(1)
    with NoWaiting():
        batch = make_batch(plan, part, images[part], None, seed=SEED, step=STEP, row_multiple=8)
        objective(batch)[0].backward()


def test_the_feature_network_is_no_parameter(file):
    plan, objective, images = problem("tcm", file)
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"student"}
    run(objective, plan, images)
    net, _ = objective._features
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    held = {id(x) for x in objective.held()}
    assert {id(p) for p in (*net.parameters(), *objective.frozen.parameters())} <= held


def test_a_step_is_counted_with_it(grey):
    """From the file's header, on the meta device."""
    config = tiny("none", ect={"distance": "manifold", "features": grey})
    shape = ImageShape(8, 1)
    given = dry_step(config, "ect", shape, on_gpu=True)
    plain = dry_step(tiny("none"), "ect", shape, on_gpu=True)
    net, _ = read_features(grey, "ect.features", "meta")
    assert given.frozen - plain.frozen == 4 * sum(p.numel() for p in net.parameters())
    sizes = {0: 64, 1: 16}
    products = sum(
        conv.weight.numel() * sizes[k] for k, block in enumerate(net.blocks) for conv in block
    )
    assert given.flops - plain.flops == 3 * 2 * products * given.rows  # two passes, a gradient
    assert given.peak >= plain.peak


# ---- the network and its file -------------------------------------------------------------------


def test_balancing_changes_no_strength():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FeatureNetwork(resolution=16, channels=3, width=8, strengths=5)
    images = torch.rand(32, 3, 16, 16) * 2 - 1
    before = net(images)
    net.balance(images)
    torch.testing.assert_close(net(images), before, rtol=1e-4, atol=1e-5)
    for layer in net.features(images):
        assert layer.square().sum((1, 2, 3)).mean().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("resolution", "pools"), [(4, 0), (7, 0), (8, 1), (33, 3), (64, 4)])
def test_layers(resolution, pools):
    net = FeatureNetwork(resolution=resolution, channels=1, width=2, strengths=4)
    assert len(net.blocks) == pools + 1
    assert net(torch.zeros(3, 1, resolution, resolution)).shape == (3, 4)


def test_a_file_is_read_as_it_was_written(tmp_path):
    net = feature_network()
    read, about = read_features(write(tmp_path / "a.safetensors", net), "ect.features")
    images = torch.rand(2, 2, 8, 8)
    torch.testing.assert_close(read(images), net(images))
    assert not any(p.requires_grad for p in read.parameters())
    assert about["features"]["resolution"] == 8
    with pytest.raises(ValueError, match="features: resolution must be at least 4, got 3"):
        FeatureNetwork(resolution=3, channels=1, width=2, strengths=4)


def test_files_that_are_refused(file, grey, tmp_path):
    student = network(1)

    def refused(path, message, error=ValueError):
        with pytest.raises(error, match=f"^ect.features: {message}"):
            Ect(EctConfig(distance="manifold", features=str(path)), student)

    refused(tmp_path / "none.safetensors", "no such file", FileNotFoundError)
    refused(grey, r".*grey.safetensors must be of images of channels 2, got 1")
    large = write(tmp_path / "large.safetensors", feature_network(resolution=16))
    refused(large, r".* must be of images of resolution 8, got 16")
    whole = Path(file).read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(whole[:-10])
    refused(damaged, ".* is truncated, damaged or not a safetensors file")
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(damaged, ".* is damaged, its SHA-256 is not that of its header")
    save_file(load_file(file), damaged)
    refused(damaged, ".* was not written by tcm_fast")
    write_tensors(damaged, {"a": torch.zeros(1)}, {"format": 1, "network": {}})
    refused(damaged, ".* holds something else")
    write_tensors(damaged, {"a": torch.zeros(1)}, {"format": 1, "features": {"widht": 3}})
    refused(damaged, ".* describes a network that cannot be built")
    spec = {"resolution": 8, "channels": 2, "width": 4, "strengths": 3}
    huge = {"format": 1, "features": spec | {"width": 10**30}}
    write_tensors(damaged, {"a": torch.zeros(1)}, huge)
    refused(damaged, ".* describes a network that cannot be built")
    write_tensors(damaged, {"a": torch.zeros(1)}, {"format": 1, "features": spec})
    refused(damaged, ".* does not fit the network")


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match=r"tcm\.features: the manifold distance needs a file"):
        tiny("none", tcm={"distance": "manifold"})
    with pytest.raises(
        ValueError, match=r"ect\.features: only the manifold distance has a feature"
    ):
        tiny("none", ect={"features": "f.safetensors"})
    with pytest.raises(
        ValueError, match=r"ect\.distance: must be one of huber, manifold, got 'l2'"
    ):
        tiny("none", ect={"distance": "l2"})


# ---- runs ---------------------------------------------------------------------------------------


def test_a_run_is_resumed_with_its_features_alone(grey, tmp_path):
    own = {"distance": "manifold", "features": grey}
    config = tiny(write_images(tmp_path), phases=["ect"], ect=own | {"images": 16 * 5})
    train(config, tmp_path / "run")
    lines = [e for e in events(tmp_path / "run") if "loss" in e]
    assert all(math.isfinite(e["loss"]) and e["loss"] > 0 for e in lines)
    assert read_state(newest_checkpoint(tmp_path / "run"))["reads"].keys() == {"features"}
    train(replace(config, max_steps=3), tmp_path / "again")
    other = write(tmp_path / "other.safetensors", feature_network(1, seed=1))
    for changes in ({"features": other}, {"distance": "huber", "features": ""}):
        changed = replace(config, ect=replace(config.ect, **changes))
        with pytest.raises(ValueError, match=r"resume: ect.features must stay the file of SHA-256"):
            train(changed, tmp_path / "again", resume=True)
    moved = write(tmp_path / "moved.safetensors", read_features(grey, "features")[0])
    ect = replace(config.ect, features=moved)
    train(replace(config, ect=ect), tmp_path / "again", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "again", ("model", "ema-0", "optimizer"))


def test_what_is_wrong_is_said_before_anything_is_written(file, tmp_path):
    own = {"distance": "manifold", "features": file}
    with pytest.raises(ValueError, match=r"ect.features: .* channels 1, got 2"):
        train(tiny(write_images(tmp_path), ect=own), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_give_the_same_run(grey, tmp_path):
    own = {"distance": "manifold", "features": grey}
    config = tiny(write_images(tmp_path), phases=["ect"], ect=own, device="cpu")
    train(config, tmp_path / "one")
    run_ranks(2, config, tmp_path / "two")
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(extension() is None, reason="needs the extension: not built")
def test_predicted_memory_is_what_a_step_holds(tmp_path):
    features = write(tmp_path / "wide.safetensors", feature_network(1, width=32))
    own = {"distance": "manifold", "features": features, "stage_iterations": 1}
    config = tiny(write_images(tmp_path), phases=["ect"], ect=own)
    predicted = memory(config, "ect", ImageShape(8, 1, 0, 40), on_gpu=False)
    assert predicted.frozen == 4 * sum(
        p.numel() for p in read_features(features, "f")[0].parameters()
    )
    assert predicted.total == pytest.approx(held(config, "ect", tmp_path / "run"), rel=0.1)
