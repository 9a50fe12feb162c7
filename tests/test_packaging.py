"""setup.py's choices, and what its archives hold and do away from the checkout."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def environment(**changes):
    """This process's environment without what steers the build or the imports, changed."""
    steering = (
        "TCM_FAST_CUDA",
        "TCM_FAST_CUDA_ARCHS",
        "PYTHONPATH",
        "CUDA_HOME",
        "CUDA_PATH",
        "CXX",
    )
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    return {**kept, **changes}


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# ---- choices ------------------------------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """setup.py's names, on a machine without compilers."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("TCM_FAST_CUDA", "TCM_FAST_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "site-packages"))
    return runpy.run_path(str(ROOT / "setup.py"))


def test_no_compiler_is_no_error(setup):
    assert setup["find_compiler"]() is None
    assert setup["choose_nvcc"]() is None


def test_nvcc_is_required_where_it_is_asked_for(setup, monkeypatch):
    monkeypatch.setenv("TCM_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"TCM_FAST_CUDA=1 needs nvcc .* install the CUDA toolkit"):
        setup["choose_nvcc"]()
    monkeypatch.setenv("TCM_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="TCM_FAST_CUDA must be 0 or 1, got yes"):
        setup["choose_nvcc"]()


def test_where_nvcc_is_looked_for(setup, monkeypatch, tmp_path):
    wheel = script(tmp_path / "site-packages/nvidia/cu13/bin/nvcc", "true")
    assert setup["choose_nvcc"]() == wheel
    on_path = script(tmp_path / "bin/nvcc", "true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup["choose_nvcc"]() == on_path
    in_home = script(tmp_path / "cuda/bin/nvcc", "true")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert setup["choose_nvcc"]() == in_home
    monkeypatch.setenv("TCM_FAST_CUDA", "0")
    assert setup["choose_nvcc"]() is None


def test_architectures(setup, monkeypatch, tmp_path):
    nvcc = script(tmp_path / "nvcc", "echo 'sm_80\nsm_86\nsm_90\nsm_90a'")
    assert setup["choose_archs"](nvcc) == ["80", "86", "90"]
    for given in ("86;90a", "86, 90a"):
        monkeypatch.setenv("TCM_FAST_CUDA_ARCHS", given)
        assert setup["choose_archs"](nvcc) == ["86", "90a"]
    monkeypatch.setenv("TCM_FAST_CUDA_ARCHS", "90;130")
    with pytest.raises(SystemExit, match=r"TCM_FAST_CUDA_ARCHS must name .*, got 130"):
        setup["choose_archs"](nvcc)


# ---- archives -----------------------------------------------------------------------------------


def run(command, cwd, **changes):
    ran = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ran.returncode, ran.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """An sdist of the checkout, and the wheel made from that sdist, under build isolation."""
    folder = tmp_path_factory.mktemp("archives")
    code, output = run(["-m", "build", "--outdir", folder, ROOT], folder)
    assert code == 0, output
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


# An editable install of the checkout must not lend the installed copy what that lacks.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
"""


def install(wheel, folder):
    code, output = run(
        ["-m", "pip", "install", "--no-deps", "--target", folder, wheel], folder.parent
    )
    assert code == 0, output
    return folder


@pytest.mark.slow
def test_the_sdist_holds_everything(archives):
    with tarfile.open(archives[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in ("csrc", "kernels", "benchmarks", "tests", "tcm_fast"):
        wanted = [path for path in tracked.splitlines() if path.startswith(f"{name}/")]
        assert held.issuperset(wanted)
        assert any(path.startswith(f"{name}/") for path in held)
    assert held >= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert not [path for path in held if path.endswith((".so", ".pyc", ".o"))]


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert sorted(name.split("-")[0] for name in top) == ["tcm_fast", "tcm_fast"]
    assert {"tcm_fast/_C.pyi", "tcm_fast/py.typed", "tcm_fast/kernels/philox.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "csrc" in name or "conftest" in name]


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(archives, tmp_path):
    site = install(archives[1], tmp_path / "site")
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    code = f"""
import importlib, pkgutil, torch, tcm_fast
assert tcm_fast.__file__.startswith({str(site)!r}), tcm_fast.__file__
import tcm_fast.benchmarks.official_style, tcm_fast.kernels
for module in pkgutil.walk_packages(tcm_fast.__path__, "tcm_fast."):
    if not module.name.endswith("__main__") and ".benchmarks.test_" not in module.name:
        try:
            found = importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert "pip install 'tcm-fast[" in str(error), error
            continue
        assert found.__file__.startswith({str(site)!r}), found.__file__
from tcm_fast.config import load_preset, preset_names
assert "digits" in preset_names()
load_preset("digits")
from tcm_fast.data import load_images
assert len(load_images("digits").images) == 1797
from tcm_fast.kernels import _backend, philox_bits
assert (_backend.extension() is not None) == {compiler}
bits = philox_bits(0, 0, 0, torch.zeros(1, dtype=torch.int64), 1)
assert bits[0, 0, 0] == 0x5f6fb709, bits
"""
    status, output = run(["-c", ALONE + code], tmp_path, PYTHONPATH=str(site))
    assert status == 0, output
    status, output = run(["-m", "tcm_fast", "--help"], tmp_path, PYTHONPATH=str(site))
    assert status == 0, output


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds(archives, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    command = ["-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, archives[0]]
    status, output = run(command, tmp_path, PATH=str(empty))
    assert status == 0, output
    assert "no C++17 compiler found: the PyTorch references are used" in output
    site = install(next(tmp_path.glob("*.whl")), tmp_path / "site")
    code = """
import torch
from tcm_fast.kernels import _backend, philox_bits
assert _backend.extension() is None
print(_backend.describe())
assert philox_bits(0, 0, 0, torch.zeros(1, dtype=torch.int64), 1)[0, 0, 0] == 0x5f6fb709
"""
    status, output = run(["-c", ALONE + code], tmp_path, PYTHONPATH=str(site))
    assert status == 0, output
    assert "install a C++17 compiler" in output


@pytest.mark.slow
def test_a_failing_nvcc_costs_the_cuda_half_alone(archives, tmp_path):
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler: none found")
    script(tmp_path / "cuda/bin/nvcc", '[ "$1" = --list-gpu-code ] && echo sm_90 || exit 1')
    command = ["-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, archives[0]]
    status, output = run(command, tmp_path, CUDA_HOME=str(tmp_path / "cuda"))
    assert status == 0, output
    assert "the extension is built without its CUDA half" in output
    site = install(next(tmp_path.glob("*.whl")), tmp_path / "site")
    code = "import tcm_fast._C as ext; assert not ext.has_cuda() and ext.cuda_archs() == []"
    status, output = run(["-c", ALONE + code], tmp_path, PYTHONPATH=str(site))
    assert status == 0, output
    status, output = run(command, tmp_path, CUDA_HOME=str(tmp_path / "cuda"), TCM_FAST_CUDA="1")
    assert status != 0
    assert "TCM_FAST_CUDA=1, and" in output
