"""What others expect of a project: one version, citation, templates, checks before a commit, types."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest

import tcm_fast
from tcm_fast import kernels

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_yaml(path):
    yaml = pytest.importorskip(
        "yaml", reason="PyYAML reads the project's YAML files; not installed"
    )
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_version_is_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tcm_fast.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev0)?", tcm_fast.__version__)
    released = tcm_fast.__version__.removesuffix(".dev0")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == released
    assert released not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_setuptools_reads_that_version():
    expand = pytest.importorskip(
        "setuptools.config.expand", reason="setuptools reads the version; not installed"
    )
    places = {"tcm_fast": "tcm_fast", "tcm_fast.kernels": "kernels"}
    found = expand.read_attr("tcm_fast.__version__", places, ROOT)
    assert found == tcm_fast.__version__


def test_the_citation_has_what_its_format_asks_for():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    paper = citation["references"][0]
    assert paper["title"] == "Truncated Consistency Models"
    assert len(paper["authors"]) == 7


@pytest.mark.parametrize("name", ["bug", "slow", "idea"])
def test_issue_forms(name):
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("textarea", "checkboxes")
        assert field["attributes"]["label"]


def test_a_commit_is_checked_as_ci_checks_it():
    config = read_yaml(".pre-commit-config.yaml")
    (local,) = config["repos"]
    assert local["repo"] == "local"
    section = (ROOT / ".ci/run").read_text(encoding="utf-8").partition("== lint")[2]
    lint = section.partition("\necho ")[0].splitlines()[2:]
    entries = [hook["entry"] for hook in local["hooks"]]
    assert len(entries) == len([line for line in lint if line])
    for entry, line in zip(entries, filter(None, lint), strict=True):
        assert line == entry or line.startswith(f"{entry} csrc/")
    pattern = local["hooks"][-1]["files"]
    for path in ("csrc/module.cpp", "csrc/philox.h", "csrc/philox_cuda.cu",
                 "tests/kernels/sanitized.cpp", "tests/kernels/emulated/cuda_runtime.h"):  # fmt: skip
        assert re.search(pattern, path)
        assert (ROOT / path).is_file()
    assert not re.search(pattern, "csrc/toolchain.py")


# ---- types --------------------------------------------------------------------------------------


def lacking(function):
    """The parameters (and "return") of a function that have no annotation."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    own = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    names = [p.name for p in own if p.annotation is empty]
    is_constructor = function.__name__ == "__init__"
    return names + ["return"] * (signature.return_annotation is empty and not is_constructor)


def functions_of(item):
    """A function, or those that a class of ours defines for its users."""
    if not inspect.isclass(item):
        return [item]
    members = inspect.getmembers(item, inspect.isfunction)
    return [
        function
        for name, function in members
        if (name == "__init__" or not name.startswith("_"))
        and function.__module__.startswith("tcm_fast")
    ]


@pytest.mark.parametrize("module", [tcm_fast, kernels], ids=lambda m: m.__name__)
def test_the_public_names_have_types(module):
    assert (ROOT / "tcm_fast/py.typed").is_file()
    names = [name for name in module.__all__ if callable(getattr(module, name))]
    assert len(names) >= 10
    wrong = {
        f"{name}.{function.__name__}": lacking(function)
        for name in names
        for function in functions_of(getattr(module, name))
        if lacking(function)
    }
    assert not wrong


def test_a_missing_type_would_be_noticed():
    def function(a: int, b, *, c=1): ...

    assert lacking(function) == ["b", "c", "return"]
