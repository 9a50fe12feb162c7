"""What lies in deploy/ for rented GPUs: it parses, and the commands in it are commands of ours."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from tcm_fast.cli import STOPPED
from tcm_fast.cli.main import parse

FOLDER = Path(__file__).parents[1] / "deploy"
INSTRUCTIONS = {
    "FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "USER", "STOPSIGNAL", "ENTRYPOINT", "CMD",
}  # fmt: skip


def read(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def extras_of(text):
    return {name for found in re.findall(r"\[([a-z,]+)\]", text) for name in found.split(",")}


# ---- Dockerfile ---------------------------------------------------------------------------------


def instructions():
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    lines = [x for x in read("Dockerfile").splitlines() if x and not x.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines()]


def test_the_image():
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    bases = [what for name, what in found if name == "FROM"]
    assert len(bases) == 2
    assert bases[0].endswith("AS build")
    assert all(re.match(r"nvidia/cuda:\d+\.\d+\.\d+-(devel|base)-ubuntu24\.04", b) for b in bases)
    last = found[[i for i, (name, _) in enumerate(found) if name == "FROM"][-1] :]
    (user,) = (what for name, what in last if name == "USER")
    assert user != "root"
    made = f"useradd --create-home --uid 10001 {user}"
    assert any(made in what for name, what in last if name == "RUN")
    names = [name for name, _ in last]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    (entry,) = (ast.literal_eval(what) for name, what in last if name == "ENTRYPOINT")
    (command,) = (ast.literal_eval(what) for name, what in last if name == "CMD")
    assert entry[-1] == "tcm-fast"
    parse(command)


def test_the_images_commands_are_shell():
    for name, what in instructions():
        if name == "RUN":
            script = re.sub(r"^--mount=\S+\s+", "", what)
            ran = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr


# ---- Slurm --------------------------------------------------------------------------------------


def submit(tmp_path, status):
    """(exit status, what the tools were asked) of the script where a run ends so."""
    for name, text in {
        "srun": 'exec "$@"',
        "tcm-fast": f'echo "tcm-fast $RANK/$WORLD_SIZE $*" >> "{tmp_path}/asked"; exit {status}',
        "scontrol": f'echo "scontrol $*" >> "{tmp_path}/asked"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(FOLDER / "slurm.sh"), "--preset", "digits", "--out", "my runs/a"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    return ran.returncode, (tmp_path / "asked").read_text().splitlines()


def test_a_run_that_was_stopped_goes_back_into_the_queue(tmp_path):
    started = "tcm-fast 0/1 train --preset digits --out my runs/a --resume auto"
    assert submit(tmp_path, STOPPED) == (0, [started, "scontrol requeue 7"])


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_run_that_has_ended_does_not(status, tmp_path):
    code, asked = submit(tmp_path, status)
    assert code == status
    assert len(asked) == 1


def test_the_job_is_told_before_its_time_is_over():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", read("slurm.sh"), re.MULTILINE))
    assert {"requeue", "signal", "open-mode", "time"} <= options.keys()
    assert options["signal"].startswith("USR1@")
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert f"STOPPED={STOPPED}\n" in read("slurm.sh")


# ---- SkyPilot -----------------------------------------------------------------------------------


def test_the_sky_task():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads it; not installed")
    task = yaml.safe_load(read("sky.yaml"))
    assert {"resources", "workdir", "setup", "run", "envs", "file_mounts"} <= task.keys()
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [STOPPED]
    for part in ("setup", "run"):
        ran = subprocess.run(["bash", "-n", "-c", task[part]], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    used = set(re.findall(r"\$(\w+)", task["run"]))
    assert used == task["envs"].keys()
    words = shlex.split(re.sub(r"\$\w+", "digits", task["run"]))
    parse(words[words.index("train") :])


# ---- Modal --------------------------------------------------------------------------------------


class Anything:
    """Stands for whatever of modal is called: decorators give the function back."""

    def __getattr__(self, name):
        return Anything()

    def __call__(self, *args, **options):
        is_decorated = len(args) == 1 and not options and isinstance(args[0], types.FunctionType)
        return args[0] if is_decorated else Anything()


@pytest.mark.parametrize(("status", "ends"), [(0, False), (STOPPED, False), (1, True)])
def test_the_modal_app(status, ends, monkeypatch):
    stand = types.ModuleType("modal")
    stand.__getattr__ = lambda name: Anything()
    monkeypatch.setitem(sys.modules, "modal", stand)
    names = runpy.run_path(str(FOLDER / "modal_app.py"))
    assert names["STOPPED"] == STOPPED
    asked = []

    def run(command, cwd):
        asked.append(command)
        return types.SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", run)
    if ends:
        with pytest.raises(RuntimeError, match="ended with status 1"):
            names["train"]("digits", "digits:train", "mine")
    else:
        names["train"]("digits", "digits:train", "mine")
    ((program, *arguments),) = asked
    assert program == "tcm-fast"
    assert parse(arguments).out == Path("runs/mine")


def test_the_extras_exist():
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    known = set(project["project"]["optional-dependencies"])
    for name in ("Dockerfile", "sky.yaml", "modal_app.py"):
        installs = [line for line in read(name).splitlines() if "pip install" in line]
        named = extras_of("\n".join(installs))
        assert named, name
        assert named <= known
