"""The command line, from arguments to exit status."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tcm_fast.cli import main as cli
from tcm_fast.cli.main import main, parse
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


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "info", "digits"]])
def test_a_reader_that_has_seen_enough(arguments):
    """As in `tcm-fast train --help | head`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tcm_fast", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_help_imports_little():
    """Its time is that of its imports: about 170 modules, torch alone has 2,000."""
    code = "import sys; from tcm_fast.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("train", "sample", "eval", "data", "doctor", "digits"):
        assert word in done.stdout
    imported = done.stderr.split()
    assert not {"torch", "scipy", "triton", "numpy", "PIL", "safetensors"} & set(imported)
    assert len(imported) < 300, imported


@pytest.mark.parametrize("missing", ["tyro", "docstring_parser"])
def test_only_the_command_lines_parsing_needs_tyro(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import tcm_fast.training.trainer, tcm_fast.sampling.sampler
import tcm_fast.benchmarks.suite, tcm_fast.benchmarks.memory_optimizations
from tcm_fast.cli.main import main
main(["train", "--preset", "digits"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("tcm-fast: the command line needs tyro: pip install tyro (")
    assert missing in done.stderr


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, (None, cli.SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "7"}, (None, "7")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(own, found, monkeypatch, capsys):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert run("--help") == 0
    assert tuple(map(os.environ.get, names)) == found


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

    assert run("eval", out, "--features", "random", "--num", 12, "--seeds", 2) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 × 12 samples" in shown
    assert re.search(r"KID × 1000 .* ± .*Fréchet distance .* ± ", shown, re.DOTALL)
    assert "2 sets of 12 samples do not tell apart runs that differ by less than" in shown
    assert run("eval", out, "--features", "random", "--num", 100, "--seeds", 1) == 0
    shown = capsys.readouterr().out
    assert " ± " not in shown
    assert "one set of samples has no error bar" in shown
    assert re.search(r"100 samples are compared with all \d+ images there are", shown)
    assert run("eval", out, "--seeds", 0) == 2
    assert "seeds: must be at least 1, got 0" in capsys.readouterr().err


def test_a_phase_from_a_file(tiny, folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("train", "--config", tiny, "--data", folder, "--out", first, "--phase", "ect") == 0
    command = ["train", "--config", tiny, "--data", folder, "--out", second, "--phase", "tcm"]
    assert run(*command, "--init", first, "--tcm.boundary_fraction", "0.5") == 0
    saved = json.loads((second / "config.json").read_text())
    assert saved["tcm"]["boundary_fraction"] == 0.5
    assert saved["phases"] == ["tcm"]


def test_flags_override_the_preset():
    argv = (
        "train --preset digits --tcm.boundary-fraction 0.5 --max-steps 7 --network.channel-mult 1 1"
    )
    argv += " --data.flip"
    args = parse(argv.split())
    preset = load_preset("digits")
    assert args.settings.tcm.boundary_fraction == 0.5
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
        (
            ["train", "--preset", "digits", "--tcm.boundary_fraction", "1.5"],
            "tcm.boundary_fraction",
        ),
        (
            ["train", "--preset", "imagenet64-s", "--data", "digits", "--data.resolution", "8"],
            "attn_resolutions: .* got 16",
        ),
        (["sample", "nowhere"], "nowhere"),
        (["eval", "nowhere"], "nowhere|no images"),
        (["data", "info", "nowhere"], "nowhere"),
        (["bench", "compare", "a.json"], r"needs A\.json and B\.json, got 1"),
        (["bench", "compare", "a.json", "b.json"], r"no such file: a\.json"),
        (["bench", "ops", "a.json"], "only compare takes files"),
        (["bench", "step", "--device", "cuda"], "cuda"),
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
    assert run("train", "--preset", "digits", "--tcm.t-prim", "0.3") == 2
    shown = capsys.readouterr()
    assert "--tcm.t-prime" in shown.out + shown.err


def test_a_typo_in_a_file_suggests_the_right_one(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text("[tcm]\nt_prim = 0.3\n")
    assert run("train", "--config", path) == 2
    assert "tcm.t_prim: unknown, did you mean 't_prime'" in capsys.readouterr().err


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


def recorded(path, seconds, wrong=""):
    from tcm_fast.benchmarks.results import Results, Row

    rows = [Row("ops", "case", "pytorch", [1.0, 1.01, 0.99, 1.02, 1.0] * 3)]
    samples = [] if wrong else [seconds * f for f in (1.0, 1.01, 0.99, 1.02, 1.0)] * 3
    rows.append(Row("ops", "case", "tcm_fast", samples, wrong=wrong))
    environment = {"name": "machine", "device": "cpu", "threads": 1}
    Results(environment, {}, rows=rows).save(path)
    return path


def test_bench_compare_is_a_gate(tmp_path, capsys):
    a = recorded(tmp_path / "a.json", 0.5)
    for seconds, status, word in (
        (0.505, 0, "2 of 2 rows are equal"),
        (1.0, 1, "slower  tcm_fast"),
    ):
        b = recorded(tmp_path / "b.json", seconds)
        assert run("bench", "compare", a, b) == status
        assert word in capsys.readouterr().out
    assert run("bench", "compare", a, b, "--tolerance", 1.5) == 0
    assert run("bench", "compare", a, recorded(tmp_path / "c.json", 0.5, "off by 3")) == 1


def test_bench_writes_a_report_and_profile_a_trace(tmp_path, monkeypatch, capsys):
    from tcm_fast.benchmarks import suite, suite_steps
    from tcm_fast.benchmarks.results import Results, Row
    from tcm_fast.benchmarks.steps import StepCase
    from tcm_fast.benchmarks.validate import TINY

    asked = []

    def measured(settings, say, save):
        asked.append(settings)
        environment = {"name": "machine", "device": "cpu", "threads": 1}
        wrong = "off by 3" if settings.only == "bad" else ""
        row = Row("ops", "case", "tcm_fast", [] if wrong else [1.0], wrong=wrong)
        return Results(environment, {}, rows=[row])

    monkeypatch.setattr(suite, "run", measured)
    assert run("bench", "step", "--quick", "--device", "cpu", "--out", tmp_path / "out") == 0
    assert asked[-1].groups == ("step", "roofline")
    assert asked[-1].quick
    assert f"report in {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").is_file()
    assert run("bench", "--only", "bad", "--device", "cpu", "--out", tmp_path / "out") == 1
    assert "ops" in asked[-1].groups
    assert "WRONG: tcm_fast" in capsys.readouterr().out

    monkeypatch.setattr(suite_steps, "roofline_cases", lambda settings: [StepCase(TINY, 8)])
    assert run("bench", "profile", "--device", "cpu", "--out", tmp_path / "trace") == 0
    assert (tmp_path / "trace" / "trace.json").is_file()
    assert "module (forward, children included)" in capsys.readouterr().out


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
    while not (log.is_file() and "train" in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 75
    assert "--resume auto" in error
    resumed = error.strip().splitlines()[-1].partition("to go on: ")[2].split()
    assert resumed[:2] == ["tcm-fast", "train"]
    done = subprocess.run(
        [sys.executable, "-m", "tcm_fast", *resumed[1:], "--max-steps", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def next_commands(shown):
    """The commands without a placeholder that the summary of a run prints."""
    lines = [line for line in shown.splitlines() if line.startswith("  tcm-fast ")]
    return [shlex.split(line)[1:] for line in lines if "YOUR_" not in line]


@pytest.mark.parametrize("phase", ["edm", "ect"])
def test_every_printed_command_works(phase, tiny, folder, tmp_path, capsys):
    """On one's own images there is no feature space, and a pre-trained network takes no single step."""
    out = tmp_path / "a run"
    assert run("train", "--config", tiny, "--data", folder, "--out", out, "--phase", phase) == 0
    commands = next_commands(capsys.readouterr().out)
    assert [command[0] for command in commands] == ["sample", "eval"]
    for command in commands:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert run(*command) == 0
    assert "random features" in str(caught[-1].message)
    with pytest.warns(UserWarning, match="random features"):
        assert run("eval", out, "--denoising") == 0
    assert run("eval", out, "--num", 1) == 2
    assert "num: must be at least 2" in capsys.readouterr().err
    assert run("eval", out, "--denoising", "--precision", "bf16") == 2
    assert "precision: --denoising denoises in fp32, got bf16" in capsys.readouterr().err


def test_resuming_says_what_has_changed(tiny, folder, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--data", folder, "--out", out]
    conditional = ["--network.class-conditional", "--phase", "ect"]
    assert run(*command, "--config", tiny, *conditional) == 0
    assert "2 classes: 0 cats, 1 dogs" in capsys.readouterr().err
    assert run(*command, "--resume", "auto", "--ect.lr", 0.5, "--precision", "bf16") == 0
    said = capsys.readouterr().err
    assert "differ from those before: ect.lr 0.0001 -> 0.5, precision fp32 -> bf16" in said.replace(
        "\n", " "
    )
    (folder / "cats").rename(folder / "ferrets")
    assert run(*command, "--resume", "auto") == 2
    assert "class 0 must stay cats" in capsys.readouterr().err


def test_too_few_images_to_measure_by(tiny, tmp_path, capsys):
    np.savez(tmp_path / "three.npz", images=np.zeros((3, 8, 8), np.uint8))
    command = [
        "train",
        "--config",
        tiny,
        "--data",
        tmp_path / "three.npz",
        "--out",
        tmp_path / "run",
    ]
    assert run(*command, "--eval.features", "random") == 2
    assert "needs at least 4 images to compare with, got 3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_thread_and_streams_without_a_descriptor(tiny, folder, tmp_path, monkeypatch):
    """As in a notebook."""

    class Cell(io.StringIO):
        def fileno(self):
            raise io.UnsupportedOperation("fileno")

    shown, said, statuses = Cell(), Cell(), []
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", said)

    def work():
        out = tmp_path / "run"
        statuses.append(
            run("train", "--config", tiny, "--data", folder, "--out", out, "--phase", "ect")
        )
        statuses.append(run("sample", out, "--num", 2, "--out", tmp_path / "a.png"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert statuses == [0, 0], said.getvalue()
    assert "2 images of seed 0" in shown.getvalue()


@pytest.mark.parametrize(
    "settings", [{"PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}]
)
def test_terminals_of_all_kinds(settings, tmp_path):
    """Piped, what is printed is text; what an encoding cannot say is written out."""
    (tmp_path / "é").mkdir()
    (tmp_path / "x").mkdir()
    for name in ("é", "x"):
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
    done = subprocess.run(
        [sys.executable, "-m", "tcm_fast", "data", "info", str(tmp_path)],
        capture_output=True, env={**os.environ, **settings},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    name = "\\xe9" if "PYTHONIOENCODING" in settings else "é"
    assert f"0 x (1), 1 {name} (1)" in done.stdout.decode()


def test_the_profiler_keeps_its_notes_to_itself():
    code = """
import sys, types

def profile(settings, out):
    import torch
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU]):
        torch.ones(3) + 1
    return out

stub = types.SimpleNamespace(profile=profile)
sys.modules |= {f"tcm_fast.benchmarks.{name}": stub for name in ("suite", "suite_steps", "report")}
from tcm_fast.cli.main import main
main(["bench", "profile", "--device", "cpu"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "trace for chrome://tracing" in done.stdout
