"""Which tests belong to a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HAS_GPU = "import torch\ntorch.cuda.is_available = lambda: {}\n"


@pytest.mark.parametrize("has_gpu", [True, False])
def test_on_a_gpu_the_kernels_tests_are_its_tests(has_gpu, tmp_path):
    """Those that run in the interpreter where there is none."""
    (tmp_path / "machine.py").write_text(HAS_GPU.format(has_gpu))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pytest; sys.exit(pytest.main())"
    )
    files = ["tests/kernels/test_mp_sum.py", "tests/kernels/test_dropout.py"]
    options = ["-p", "machine", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "gpu"]
    command = [sys.executable, "-c", code, *options, *files]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "test_dropout.py::test_" in ran.stdout  # marked in its file
    assert ("test_mp_sum.py::test_" in ran.stdout) == has_gpu
    assert "test_mp_sum.py::test_refuses" not in ran.stdout
