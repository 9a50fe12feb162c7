"""One-call denoising over the noise level, what it says of stage 1, and the search for a second time."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import tiny, train
from torch import nn

from tcm_fast.cli.main import main
from tcm_fast.data.dataset import ImageData, load_images
from tcm_fast.evaluation import denoising
from tcm_fast.evaluation.denoising import Reading, advise, distances, read_log
from tcm_fast.evaluation.features import random_feature_space
from tcm_fast.evaluation.second_time import search_second_time


@pytest.fixture(scope="module")
def digits():
    data = load_images("digits:train")
    return ImageData(data.images[:200], data.labels[:200], data.name, data.class_names)


class Shrinks(nn.Module):
    """The best denoiser of Gaussian data of this mean and spread: the more noise, the nearer the mean."""

    img_resolution, img_channels, label_dim, sigma_data = 8, 1, 0, 0.5

    def __init__(self, mean=0.0, spread=0.5):
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.tensor(mean)), spread
        self.info = {"phase": "ect"}

    def forward(self, x, t, labels=None):
        assert not self.training
        kept = self.spread**2 / (self.spread**2 + t.view(-1, 1, 1, 1) ** 2)
        return self.mean + kept * (x - self.mean)


def test_distance_grows_with_what_the_noise_hides(digits):
    space, net = random_feature_space(), Shrinks(-0.3, 0.6).train()
    found = distances(net, digits, space, num=64)
    assert list(found) == list(denoising.TIMES)
    values = list(found.values())
    assert values == sorted(values)
    assert values[-1] > 5 * values[0] > 0
    assert net.training
    assert distances(net, digits, space, num=64) == found
    split = distances(net, digits, space, num=64, batch_size=7)
    assert list(split.values()) == pytest.approx(values, rel=1e-3)  # by rounding of a byte


def test_a_perfect_denoiser_is_at_distance_0(digits):
    same = replace(
        digits, images=np.repeat(digits.images[:1], 10, axis=0), labels=digits.labels[:10]
    )

    class Knows(Shrinks):
        def forward(self, x, t, labels=None):
            image = torch.from_numpy(same.images[0]).permute(2, 0, 1).to(x)
            return (image / 127.5 - 1).expand_as(x)

    found = distances(Knows(), same, random_feature_space(), times=[1.0, 80.0], num=10)
    assert max(found.values()) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"img_resolution": 16}, r"must be \[16, 16, 1\] like the network's, got \[8, 8, 1\]"),
     ({"label_dim": 3}, "needs labels")],
)  # fmt: skip
def test_images_that_do_not_fit(changes, message, digits):
    net = Shrinks()
    for name, value in changes.items():
        setattr(net, name, value)
    with pytest.raises(ValueError, match=f"denoising: .*{message}"):
        distances(net, ImageData(digits.images, None, "digits"), random_feature_space())
    with pytest.raises(ValueError, match="needs 2 images and a noise level, got 1"):
        distances(Shrinks(), digits, random_feature_space(), num=1)


def readings(*rows):
    times = (0.5, 1.0, 5.0, 80.0)
    return [Reading("ect", 100 * i, dict(zip(times, r, strict=True))) for i, r in enumerate(rows)]


BEGUN = (1.0, 2.0, 8.0, 90.0)


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ([BEGUN, (1, 2, 8, 50)], "too few readings .*--eval.features$"),
        (
            [BEGUN, (0.9, 2, 8, 50), (0.8, 1.9, 7, 40), (0.7, 1.7, 6, 30)],
            "at every noise level: let",
        ),
        (
            [BEGUN, (0.5, 1, 3, 20), (0.5, 1, 3, 20), (0.5, 1, 3, 20)],
            "converged at every noise level",
        ),
        (
            [BEGUN, (0.5, 1, 3, 30), (0.5, 1, 3, 25), (0.5, 1, 3, 20)],
            "up to t = 5 .* --tcm.t-prime 5$",
        ),
        (
            [BEGUN, (0.5, 1, 3, 30), (0.6, 1.2, 2.8, 25), (0.7, 1.3, 2.5, 20)],
            "up to t = 1 .*forgotten at t = 1 and below.*--tcm.t-prime 1$",
        ),
        (
            [BEGUN, (0.5, 1, 3, 30), (0.4, 1, 3, 30), (0.3, 1, 3, 30)],
            r"low noise levels \(t = 0.5\)",
        ),
    ],
)
def test_advice(rows, advice):
    assert re.search(advice, advise(readings(*rows)))


def test_a_run_logs_it_and_eval_shows_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    config = tiny("digits:train", phases=["edm", "ect", "tcm"], grid_every=2)
    config = replace(config, eval=replace(config.eval, features="random", num=32))
    run = tmp_path / "run"
    train(config, run)
    logged = read_log(run)
    assert {r.phase for r in logged} == {"ect", "tcm"}
    seen = [r.images for r in logged if r.phase == "ect"]
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert all(min(r.distances) >= config.tcm.t_prime for r in logged if r.phase == "tcm")
    (run / "log.jsonl").open("a").write('{"event": "denoi')  # a line half written
    assert read_log(run) == logged
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(run), "--denoising", "--plot", str(tmp_path / "plot.png")])
    assert ended.value.code == 0
    assert "t = 80" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(SystemExit) as ended:
        main(["search-times", str(run), "--num", "16", "--lowest", "2"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    times = [float(line.split()[2]) for line in said.splitlines() if line.startswith("t = ")]
    assert min(times) == 2
    assert max(times) == 40
    assert f"--times {json.loads(said.split('--times ')[1].split()[0])}" in said


def test_the_second_time_is_found_where_samples_are_nearest(digits):
    """Samples with the data's spread come from one second time alone."""

    class Best(Shrinks):
        def forward(self, x, t, labels=None):
            off = (t.view(-1, 1, 1, 1).log() - np.log(5.0)).abs() * (t < 79).view(-1, 1, 1, 1)
            return (0.4 * x / x.std() - 0.3 + 0.3 * off).clamp(-1, 1)

    told = []
    found = search_second_time(
        Best(), digits, random_feature_space(), num=32, tried=lambda *pair: told.append(pair)
    )
    assert dict(told) == found
    assert list(found) == sorted(found)
    best = min(found, key=found.get)
    assert 5 / 1.5 < best < 5 * 1.5
    assert len(found) < 20
    with pytest.raises(ValueError, match=r"lowest must lie in \(0, 40\), got 50"):
        search_second_time(Best(), digits, random_feature_space(), lowest=50)
    net = Best()
    net.info = {"phase": "edm"}
    with pytest.raises(ValueError, match="needs a consistency model"):
        search_second_time(net, digits, random_feature_space())
