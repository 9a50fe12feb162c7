"""The command line, from arguments to exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tcm_fast import cli
from tcm_fast.cli import main, parse
from tcm_fast.config import load_preset

TINY = """
phases = ["edm", "ect", "tcm"]
[network]
model_channels = 16
channel_mult = [1, 1]
num_blocks = 1
attn_resolutions = []
[edm]
batch_size = 8
images = 16
[ect]
batch_size = 8
images = 16
[tcm]
batch_size = 8
images = 16
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def run(*argv):
    """Exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return stop.value.code


def test_help_is_quick_and_imports_no_torch():
    code = "import sys; from tcm_fast.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
    for word in ("train", "sample", "eval", "data", "doctor", "digits"):
        assert word in done.stdout
    assert min(times) <= 1.0


def test_train_sample_and_evaluate(tiny, folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--config", tiny, "--data", folder, "--out", out) == 0
    shown = capsys.readouterr().out
    assert f"tcm-fast sample {out}" in shown
    assert f"tcm-fast eval {out}" in shown

    assert run("sample", out, "--num", 5, "--out", tmp_path / "a.png") == 0
    assert Image.open(tmp_path / "a.png").size[0] > 8
    assert run("sample", out, "--num", 5, "--steps", 2, "--out", tmp_path / "b.npz") == 0
    assert np.load(tmp_path / "b.npz")["images"].shape == (5, 8, 8, 3)
    assert run("sample", out, "--num", 3, "--out", tmp_path / "c") == 0
    assert len(list((tmp_path / "c").glob("*.png"))) == 3
    assert run("sample", out, "--num", 5, "--out", tmp_path / "a.png") == 2
    assert "a.png" in capsys.readouterr().err

    assert run("eval", out, "--features", "random", "--num", 12) == 0
    assert "Fréchet distance" in capsys.readouterr().out


def test_a_phase_from_a_file(tiny, folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("train", "--config", tiny, "--data", folder, "--out", first, "--phase", "ect") == 0
    command = ["train", "--config", tiny, "--data", folder, "--out", second, "--phase", "tcm"]
    assert run(*command, "--init", first, "--tcm.rho", "0.5") == 0
    saved = json.loads((second / "config.json").read_text())
    assert saved["tcm"]["rho"] == 0.5
    assert saved["phases"] == ["tcm"]


def test_flags_override_the_preset():
    argv = (
        "train --preset digits --tcm.rho 0.5 --max-steps 7 --network.channel-mult 1 1 --data.flip"
    )
    args = parse(argv.split())
    preset = load_preset("digits")
    assert args.settings.tcm.rho == 0.5
    assert args.settings.tcm.lr == preset.tcm.lr
    assert args.settings.max_steps == 7
    assert args.settings.network.channel_mult == (1, 1)
    assert args.settings.data.flip
    assert str(args.out) == "runs/digits"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--preset", "dgits"], "did you mean 'digits'"),
        (["train"], "no images, give --data"),
        (["train", "--preset", "cifar10"], "no images, give --data"),
        (["train", "--preset", "digits", "--config", "x.toml"], "--preset or --config, not both"),
        (["train", "--config", "missing.toml"], "no such file: missing.toml"),
        (["train", "--preset", "digits", "--data", "nowhere"], "nowhere"),
        (["train", "--preset", "digits", "--tcm.rho", "1.5"], "tcm.rho"),
        (["train", "--preset", "imagenet64-s", "--data", "digits"], "attn_resolutions: .* got 16"),
        (["sample", "nowhere"], "nowhere"),
        (["eval", "nowhere"], "nowhere|no images"),
        (["data", "info", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_a_typo_in_a_flag_suggests_the_right_one(capsys):
    assert run("train", "--preset", "digits", "--tcm.roh", "0.3") == 2
    shown = capsys.readouterr()
    assert "--tcm.rho" in shown.out + shown.err


def test_a_typo_in_a_file_suggests_the_right_one(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text("[tcm]\nroh = 0.3\n")
    assert run("train", "--config", path) == 2
    assert "tcm.roh: unknown, did you mean 'rho'" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch):
    def defective(args):
        return torch.zeros(2).reshape(3)

    monkeypatch.setattr(cli, "COMMANDS", dict.fromkeys(cli.COMMANDS, defective))
    with pytest.raises(RuntimeError):
        main(["doctor"])


def test_data_info_and_pack(folder, tmp_path, capsys):
    assert run("data", "info", folder) == 0
    shown = capsys.readouterr().out
    assert "12" in shown
    assert "cats" in shown
    packed = tmp_path / "packed.zip"
    assert run("data", "pack", folder, packed, "--resolution", "4") == 0
    assert run("data", "info", packed) == 0
    assert run("data", "pack", folder, packed) == 2


def test_doctor_names_every_backend(capsys):
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    for word in ("torch", "triton", "C++ extension, CPU half", "GPU", "[log]"):
        assert word in shown


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(tiny, folder, tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "tcm_fast",
        "train",
        "--config",
        str(tiny),
        "--data",
        str(folder),
    ]
    command += ["--out", str(out), "--edm.images", "8000000", "--max-steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = out / "log.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if log.is_file() and "train" in log.read_text():
            break
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == cli.STOPPED == 75
    assert "--resume auto" in error
    resumed = error.strip().splitlines()[-1].partition("to go on: ")[2].split()
    assert resumed[:2] == ["tcm-fast", "train"]
    done = subprocess.run(
        [sys.executable, "-m", "tcm_fast", *resumed[1:], "--max-steps", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
