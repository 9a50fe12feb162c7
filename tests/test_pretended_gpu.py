"""The host's side of a GPU run, where a pretended GPU is at hand (`pretended_gpu.py` says what that is)."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

START = shlex.split(os.environ.get("TCM_FAST_PRETENDED_GPU", ""))
SCRIPT = Path(__file__).with_name("pretended_gpu.py")

pytestmark = pytest.mark.skipif(
    not START, reason="needs a pretended GPU: TCM_FAST_PRETENDED_GPU='START PYTHON' is not set"
)


@pytest.mark.parametrize(
    "cases",
    [
        ["train digits fp32 plain*", "train digits bf16 plain*"],
        ["train cifar10-tiny fp16 *graph=auto"],
        ["train cifar10 fp32 * graph=auto"],
        ["stop and resume", "out of memory*"],
        ["sample edm2 fp16", "sample ddpmpp fp32"],
        ["train digits bf16x3 plain*", "sample edm2 bf16x3"],
    ],
)
def test_cases(cases):
    options = [option for case in cases for option in ("--only", case)]
    ran = subprocess.run([*START, SCRIPT, *options], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-1000:]
    assert " 0 failed" in ran.stdout
