"""Kernels compiled without a GPU: Triton's cache has them where they are carried to."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tcm_fast.benchmarks import precompile
from tcm_fast.benchmarks.cases import cases
from tcm_fast.benchmarks.validate import TINY
from tcm_fast.kernels import _triton

pytest.importorskip("triton")


def case_of(operation, batch=16):
    found = cases([TINY], [batch], [torch.float16])
    return next(case for case in found if case.operation == operation)


def test_launches_are_noted_and_not_carried_out():
    before = _triton.LAUNCHES.total()
    found = precompile.noted(lambda: precompile._both(case_of("qkv_attention")), 90)
    assert _triton.LAUNCHES.total() == before
    names = {launch.kernel.__name__ for launch in found.values()}
    assert {"_qkv_attention_fwd_kernel", "_qkv_attention_bwd_kernel"} <= names
    for launch in found.values():
        assert dict(launch.constants).get("PRECISION") != "wide"  # the interpreter's
        assert any(isinstance(a, precompile.Pointer) and a.address == 0 for a in launch.args)
    with pytest.raises(ValueError, match="no such thing"):
        precompile.noted(lambda: (_ for _ in ()).throw(ValueError("no such thing")), 90)
    assert not _triton.runs_triton("mp_sum", "cpu")  # everything is as before


def test_split_convolutions_are_those_of_a_step():
    """Forward, its gradients and the sums of pieces; the last convolution alone adds its bias itself, and not
    in a step."""
    found = [dict(l.constants) | {"name": l.kernel.__name__}
             for l in precompile.split_launches(90, TINY, batch=4).values()]  # fmt: skip
    names = {each["name"] for each in found}
    assert names == {f"_conv_bf16x3{kind}_kernel" for kind in ("", "_weight", "_sum")}
    assert {each["WIDE"] for each in found if "WIDE" in each} == {False}
    last = [e["HAS_BIAS"] for e in found if "HAS_BIAS" in e and (e["IN"], e["OUT"]) == (16, 3)]
    assert {True, False} == set(last)
    assert any(each.get("IN") == 512 for each in found)  # of benchmarks.convolutions
    assert not _triton.runs_triton("conv_bf16x3", "cpu")  # everything is as before


OF_TESTS = """
import sys
from pathlib import Path
from tcm_fast.benchmarks import gpu_session, precompile
file = Path(sys.argv[1])
gpu_session.test_files = lambda folder: [("one", file)]
found = precompile.test_launches(90, file.parent)
print({launch.kernel.__name__ for launch in found.values()})
"""


def test_the_tests_launches_are_noted():
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    file = Path(__file__).parents[1] / "kernels" / "test_denoise_to_uint8.py"
    command = [sys.executable, "-c", OF_TESTS, str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert ran.stdout.splitlines()[-1] == "{'_denoise_to_uint8_kernel'}", ran.stderr[-2000:]


def test_forms_are_told_apart_as_triton_does():
    keys = [
        set(precompile.noted(lambda n=n: precompile._both(case_of("consistency_loss", n)), 90))
        for n in (16, 32)
    ]
    assert keys[0] == keys[1]
    aligned, other = torch.zeros(9, dtype=torch.float16), torch.zeros(9, dtype=torch.float16)[1:]
    assert precompile.Pointer(aligned).address == 0
    assert precompile.Pointer(other).address == 2


CARRIED = """
import os, sys
from pathlib import Path
import torch, triton
from tcm_fast.benchmarks import precompile
from tcm_fast.benchmarks.cases import cases
from tcm_fast.benchmarks.validate import TINY
case = next(c for c in cases([TINY], [16], [torch.float16]) if c.operation == "denoise_to_uint8")
launches = list(precompile.noted(lambda: precompile._both(case), 90).values())
folder = Path(sys.argv[1])
assert precompile.write(launches, 90, folder / "kernels.zip", 1) == (len(launches), [])
os.environ["TRITON_CACHE_DIR"] = str(folder / "there")
assert precompile.install(folder / "kernels.zip") == len(launches) > 0
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
triton.runtime.driver.set_active(precompile._NoDevice(90))
for launch in launches:
    launch.kernel.warmup(*launch.args, grid=(1,), **dict(launch.constants))
assert hits == [True] * len(launches), hits
"""


def test_what_was_compiled_here_is_in_the_cache_there(tmp_path):
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    command = [sys.executable, "-c", CARRIED, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert ran.returncode == 0, ran.stderr
    with zipfile.ZipFile(tmp_path / "kernels.zip") as file:
        endings = {name.rpartition(".")[2] for name in file.namelist()}
    assert endings == {"json", "cubin"}


def test_another_release_of_triton_is_refused(tmp_path, capsys):
    path = tmp_path / "kernels.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("manifest.json", json.dumps({"triton": "2.0.0", "arch": 90, "keys": []}))
    with pytest.raises(
        ValueError, match=r"must be made with the Triton that is here, .* got 2\.0\.0"
    ):
        precompile.install(path)
