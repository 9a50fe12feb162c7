"""Imports point one way, are absolute, and the command line starts without torch; phases are known to
their objectives alone."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tcm_fast.config import PHASES, Config, PhaseConfig

ROOT = Path(__file__).parents[1]
FOLDERS = """
_C < kernels < config < runtime < data, networks < optim, objectives < checkpoint < sampling
< evaluation, planning < training < interchange, drop_in < cli < __init__, __main__
"""
OPERATIONS = """
_backend < _triton < _common < philox < dropout, precondition, _philox_triton, residual,
_group_norm_silu_cpu, _group_norm_silu_plan
< group_norm_silu, qkv_attention, consistency_loss, noise_pair, denoise_to_uint8, eight_bit,
normalized_copy, pixel_norm_mp_silu, mp_cat_mp_silu, modulate_mp_silu, mp_sum, resample
< fused_step, conv_bf16x3, posterior_mean, residual_conv1x1 < __init__
"""


def ranks(order: str) -> dict[str, int]:
    return {
        name.strip(): i for i, names in enumerate(order.split("<")) for name in names.split(",")
    }


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        elif getattr(getattr(node, "func", None), "attr", "") == "import_module" and node.args:
            names.add(str(getattr(node.args[0], "value", "")))
    return names


def wrong_imports(own: str, names: set[str], prefix: str, order: str) -> set[str]:
    """What a folder or file imports that does not come before it in the order."""
    rank = ranks(order)
    parts = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    return {part for part in parts & {*rank} - {own} if rank[part] >= rank[own]}


@pytest.mark.parametrize(
    "path", sources("tcm_fast", "kernels"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_one_way(path):
    inside = path.relative_to(ROOT).with_suffix("").parts
    own = inside[0] if inside[0] == "kernels" else inside[1]
    names = imported(path)
    if own != "assets":
        assert not wrong_imports(own, names, "tcm_fast.", FOLDERS)
    if own == "kernels":
        assert not wrong_imports(path.stem, names, "tcm_fast.kernels.", OPERATIONS)
    if own != "cli":
        assert not {name for name in names if name.startswith("tcm_fast.benchmarks")}


def test_outside_its_folder_nobody_asks_which_optimizer_it_is():
    kinds = {"FusedOptimizer", "PiecewiseOptimizer", "TorchOptimizer", "GradScaler", "LossScale"}
    for path in sources("tcm_fast", "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if getattr(getattr(node, "func", None), "id", "") == "isinstance":
                asked = set(re.findall(r"\w+", ast.unparse(node.args[1])))
                assert not asked & kinds or path.parent.name == "optim", f"{path}:{node.lineno}"


def test_nothing_imports_the_tests():
    for path in sources("tcm_fast", "kernels", "benchmarks", "tests"):
        assert not {"tests", "kernels"} & {name.split(".")[0] for name in imported(path)}, path


def test_long_files_say_why():
    """No module above 450 lines but those of the table "Long files" in CONTRIBUTING.md."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Long files")[1]
    named = set(re.findall(r"`([\w/]+\.py)`", table.split("\n## ")[0]))
    for path in sources("tcm_fast", "kernels", "benchmarks"):
        lines = path.read_text(encoding="utf-8").count("\n")
        name = path.relative_to(ROOT).as_posix()
        assert lines <= 450 or name in named, f"{name} has {lines} lines"


def test_a_wrong_import_would_be_noticed(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "def f():\n    from tcm_fast.training.trainer import Trainer\n    import tcm_fast.cli\n"
    )
    assert wrong_imports("data", imported(wrong), "tcm_fast.", FOLDERS) == {"training", "cli"}
    wrong.write_text("from . import trainer\n")
    with pytest.raises(AssertionError, match="a relative import"):
        imported(wrong)


def known_phases(path: Path) -> list[str]:
    """Where a file knows a phase: by its name as a string (but in a `Literal` of choices), by the class of
    its configuration, or by asking whether there is one of its fields."""
    sections = [type(Config().phase(name)) for name in PHASES]
    classes = {cls.__name__ for section in sections for cls in section.__mro__} - {"PhaseConfig"}
    classes -= {"object"}
    common = {f.name for f in dataclasses.fields(PhaseConfig)}
    own = {f.name for section in sections for f in dataclasses.fields(section)} - common
    found = []

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal":
            return
        asks = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
        if asks and isinstance(node.args[1], ast.Constant) and node.args[1].value in own:
            found.append(f"{path}:{node.lineno}: getattr {node.args[1].value}")
        if isinstance(node, ast.Constant) and node.value in PHASES:
            found.append(f"{path}:{node.lineno}: {node.value}")
        if isinstance(node, ast.Name) and node.id in classes:
            found.append(f"{path}:{node.lineno}: {node.id}")
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_only_objectives_and_configurations_know_a_phase():
    """And tables of others' formats."""
    free = {"objectives", "config.py", "interchange"}
    for path in sources("tcm_fast"):
        if path.relative_to(ROOT / "tcm_fast").parts[0] not in free:
            assert not known_phases(path)


def test_a_file_that_knows_a_phase_would_be_noticed(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        'if phase == "tcm" or isinstance(c, RatioConfig) or getattr(c, "t_prime", 0):\n    pass\n'
        'to: Literal["edm"]\n'
    )
    assert [text.rpartition(": ")[2] for text in known_phases(wrong)] == [
        "tcm", "RatioConfig", "getattr t_prime",
    ]  # fmt: skip


@pytest.mark.parametrize("module", ["tcm_fast", "tcm_fast.config", "tcm_fast.cli.main"])
def test_the_command_line_starts_without_torch(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'triton', 'scipy') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
