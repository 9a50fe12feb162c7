"""The site: it builds without a warning, all pages are in it, and what is generated is complete."""

import ast
import dataclasses
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tcm_fast
from tcm_fast.config import Config

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs/build_site.py"))


def listed(nav):
    """The pages of a nav, at any depth."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in listed(part)]


def test_every_page_is_in_the_navigation():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads mkdocs.yml; not installed")
    nav = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    missing = SITE["pages"]().keys() - {*nav}
    assert not missing, f"add {', '.join(sorted(missing))} to `nav` in mkdocs.yml, a line each"
    assert not {*nav} - SITE["pages"]().keys(), "mkdocs.yml lists a page that is not there"
    assert len(nav) == len({*nav})


def build(config, out):
    """Exit status and output of the build as CI runs it."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install -e '.[site]'")
    # Not --quiet: warnings that are not shown do not count.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    return ran.returncode, ran.stdout + ran.stderr


def test_a_broken_link_would_be_noticed(tmp_path):
    root = tmp_path / "root"
    shutil.copytree(ROOT / "docs", root / "docs")
    for name in (
        "tcm_fast",
        "kernels",
        "benchmarks",
        "examples",
        "deploy",
        "mkdocs.yml",
        *SITE["PAGES"],
    ):
        if "/" not in name:
            (root / name).symlink_to(ROOT / name)
    with (root / "docs/step.md").open("a") as page:
        page.write("[a](nowhere.md) [b](../deploy/nowhere) [c](precision.md#nowhere)\n")
    status, output = build(root / "mkdocs.yml", tmp_path / "site")
    assert status != 0
    assert output.count("WARNING") == output.count("Doc file 'step.md'") == 3, output


def test_the_site_builds_without_a_warning(tmp_path):
    status, output = build(ROOT / "mkdocs.yml", tmp_path)
    assert status == 0, output

    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    loaded = r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href|<img[^>]*src)="(?:https?:)?//'
    for name, text in texts.items():
        assert not re.search(loaded, text), f"{name} loads something from elsewhere"
        assert "<!-- generated" not in text
    assert texts["mathematics.html"].count("<math") > 50
    assert "arithmatex" not in texts["mathematics.html"]
    for heading, names in SITE["public_names"]().items():
        assert f">{heading}<" in texts["api.html"]
        for path in names.values():
            assert f'id="{path}"' in texts["api.html"], f"{path} has no docstring"
    assert (tmp_path / "deploy/slurm.sh").is_file()


def test_the_configuration_reference_has_every_field():
    page = SITE["completed"](
        (ROOT / "docs/configuration.md").read_text(encoding="utf-8"), "configuration.md"
    )
    tables = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    sections = {"The run": Config()}
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(part := getattr(Config(), field.name)):
            sections[f"`[{field.name}]`"] = part
    assert len(sections) >= 11
    for title, part in sections.items():
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if dataclasses.is_dataclass(value):
                continue
            (row,) = re.findall(rf"^\| `{field.name}` \|(.*)\|$", tables[title], re.MULTILINE)
            *_, said = row.rstrip(" ").split(" | ")
            assert len(said) > 3, (
                f"{title} {field.name}: a docstring under the field in config.py says what it is"
            )
    assert "pairs have a ratio" not in tables["`[tcm]`"]  # a section's own docstring


def test_the_public_names_are_all_in_the_reference():
    names = SITE["public_names"]()
    assert {f"tcm_fast.{name}" for name in tcm_fast.__all__} == {*names["tcm_fast"]}
    assert {f"tcm_fast.kernels.{name}" for name in tcm_fast.kernels.__all__} == {
        *names["tcm_fast.kernels"]
    }


def messages():
    """Every text in the sources, with `...` where something is filled in."""
    for folder in ("tcm_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (
                        str(part.value) if isinstance(part, ast.Constant) else "..."
                        for part in node.values
                    )
                    yield "".join(parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_of_troubleshooting_are_those_of_the_program():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(quoted) > 25
    known = list(messages())
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(pattern.search(text) for text in known), f"no message of ours: {message}"


@pytest.mark.parametrize(
    ("text", "page", "expected"),
    [
        ("[a](docs/step.md)", "index.md", "[a](step.md)"),
        ("[a](../CONTRIBUTING.md#the-map)", "step.md", "[a](contributing.md#the-map)"),
        ("[a](../examples) ![b](../benchmarks/results/recipe_cpu.png)", "recipes.md",
         "[a](examples.md) ![b](benchmarks/results/recipe_cpu.png)"),
        ("[a](nowhere.md) [b](https://a.b/docs/step.md) [c](#here)", "index.md",
         "[a](nowhere.md) [b](https://a.b/docs/step.md) [c](#here)"),
    ],
)  # fmt: skip
def test_links_lead_where_the_pages_are(text, page, expected):
    assert SITE["with_links"](text, page) == expected
