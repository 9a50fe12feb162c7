"""Machines that lack what this one has, simulated by hiding it: Triton, the extension, Unix."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

RUN = """
import tcm_fast
from pathlib import Path
from tiny_runs import tiny, train, write_images
from tcm_fast.cli.main import main
from tcm_fast.kernels import _backend, _triton

folder = Path.cwd()
config = tiny(write_images(folder), phases=["ect"], ect={"images": 32, "dropout": 0.0}, save_every=1)
train(config, folder / "run")
net = tcm_fast.load_network(folder / "run")
assert net.info["images"] == 32
assert tcm_fast.sample(net, 2, steps=1, seed=0).shape == (2, 8, 8, 1)
"""
TRITON_ALONE = """
import torch
from tcm_fast.kernels import _backend, _triton, group_norm_silu, philox_bits
assert _backend.extension() is None
x = torch.ones(1, 8, 2, 2, requires_grad=True)
group_norm_silu(x, 2, torch.ones(8), torch.zeros(8)).sum().backward()
assert {"_group_norm_silu_fwd_kernel", "_group_norm_silu_bwd_kernel"} <= set(_triton.LAUNCHES)
assert philox_bits(0, 0, 0, torch.zeros(1, dtype=torch.int64), 1)[0, 0, 0] == 0x5f6fb709
"""
NO_TRITON = "import sys; sys.modules['triton'] = None"
NO_EXTENSION = "import sys; sys.modules['tcm_fast._C'] = None"


def run(folder, *parts, **changes):
    """What the parts, as one program, print."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TCM_FAST_")}
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(parts)],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(TESTS), "COLUMNS": "200", **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def row(output, name):
    return next(line for line in output.splitlines() if name in line and "│" in line)


def test_without_triton(tmp_path):
    output = run(tmp_path, NO_TRITON, RUN, "assert not _triton.AVAILABLE", "main(['doctor'])")
    assert "not installed" in row(output, "Triton")


@pytest.mark.slow
def test_as_on_windows(tmp_path):
    again = "train(tiny(folder / 'images.npz', phases=['ect'], save_every=1), folder / 'run', resume='auto')"
    output = run(
        tmp_path, "import as_on_windows", NO_EXTENSION, RUN, again,
        "assert _backend.extension() is None", "main(['doctor'])",
    )  # fmt: skip
    assert "install a C++17 compiler" in row(output, "CPU half")
    assert "gone" not in output  # the lock that stays behind says nothing


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_triton_alone(tmp_path):
    pytest.importorskip("triton")
    run(tmp_path, NO_EXTENSION, TRITON_ALONE, TRITON_INTERPRET="1")
