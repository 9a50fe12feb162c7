"""What mkdocs does not do by itself for the site: pages that lie outside docs/, links into the checkout,
tables made from the source (`<!-- generated: NAME -->` in a page), equations as MathML.

No page is a copy: README.md is the first page, and what a table says is read when the site is built.
"""

import ast
import dataclasses
import html
import inspect
import json
import posixpath
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tcm_fast
from tcm_fast import config as settings

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages of the site that lie outside docs/."""
FOLDERS = {"examples": "examples.md"}
"""Folders of the checkout, and the page that a link to one leads to."""

FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<text>\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


# ---- pages and links ----------------------------------------------------------------------------


def source_of(page: str) -> str:
    """Where a page of the site lies in the checkout."""
    own = {page: path for path, page in PAGES.items()}
    return own.get(page, f"docs/{page}")


def page_of(path: str) -> str:
    """Where a file of the checkout lies in the site."""
    known = PAGES | FOLDERS
    return known.get(path, path.removeprefix("docs/"))


def linked(text: str, source: str) -> dict[str, str]:
    """The targets of a page's links that are there in the checkout, and their paths in it."""
    found = {}
    for match in LINK.finditer(FENCE.sub("", text)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
        if (ROOT / path).exists():
            found[match["target"]] = path
    return found


def with_links(text: str, page: str) -> str:
    """A page's text with its links as they are in the site."""
    targets, folder = linked(text, source_of(page)), posixpath.dirname(page) or "."

    def moved(match: re.Match[str]) -> str:
        path = targets.get(match["target"])
        target = posixpath.relpath(page_of(path), folder) if path else match["target"]
        return f"{match['text']}{target}{match['anchor'] or ''})"

    return LINK.sub(moved, text)


def pages() -> dict[str, str]:
    """All pages of the site with the text that they have in the checkout."""
    paths = [*PAGES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    return {page_of(path): (ROOT / path).read_text(encoding="utf-8") for path in paths}


# ---- the configuration --------------------------------------------------------------------------


def field_texts() -> dict[str, dict[str, str]]:
    """The docstring under each field of the classes in config.py."""
    tree = ast.parse(inspect.getsource(settings))
    found: dict[str, dict[str, str]] = {}
    for item in tree.body:
        if isinstance(item, ast.ClassDef):
            own = found.setdefault(item.name, {})
            for line, after in zip(item.body, [*item.body[1:], ast.Pass()], strict=True):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if (
                    isinstance(line, ast.AnnAssign)
                    and isinstance(line.target, ast.Name)
                    and is_text
                ):
                    own[line.target.id] = " ".join(str(after.value.value).split())
    return found


def kind(hint: Any) -> str:
    """A field's type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" if value else "empty" for value in args)
    if origin is tuple:
        return (
            f"list of {kind(args[0])}" if args[-1] is Ellipsis else f"{len(args)} {kind(args[0])}"
        )
    if origin in (types.UnionType, typing.Union):
        return " or ".join(kind(arg) for arg in args)
    return "none" if hint is type(None) else hint.__name__


def fields_of(cls: type) -> list[tuple[str, str, Any, str]]:
    """(name, type, default, text) of each field of a section."""
    texts, hints = field_texts(), typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        said = (texts.get(base.__name__, {}).get(field.name) for base in cls.__mro__)
        rows.append(
            (field.name, kind(hints[field.name]), field.default, next(filter(None, said), ""))
        )
    return rows


def fields_page() -> str:
    """Every field of a run: a table for each section, that of the run itself first."""
    default = settings.Config()
    sections = [(name, getattr(default, name)) for name, *_ in fields_of(settings.Config)]
    sections = [(name, part) for name, part in sections if dataclasses.is_dataclass(part)]
    parts = []
    for name, part in [("", default), *sections]:
        title = f"`[{name}]`" if name else "The run"
        text = " ".join((type(part).__doc__ or "").split())
        lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
        for field, of, value, said in fields_of(type(part)):
            if not dataclasses.is_dataclass(getattr(part, field)):
                shown = json.dumps(value, ensure_ascii=False) if value is not None else "none"
                lines.append(f"| `{field}` | {of} | `{shown}` | {said} |")
        parts.append(f"## {title}\n\n{text}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def presets_page() -> str:
    """The presets, as they are."""
    return "\n\n".join(
        f"### {name}\n\n```toml\n{(settings.PRESETS / f'{name}.toml').read_text(encoding='utf-8')}```"
        for name in settings.preset_names()
    )


# ---- Python -------------------------------------------------------------------------------------


def imported(path: Path, prefix: str) -> list[tuple[str, str]]:
    """(module, name) of what a file imports from modules that begin so."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return [
        (node.module, alias.name)
        for node in froms
        if node.module and node.module.startswith(prefix)
        for alias in node.names
    ]


def public_names() -> dict[str, dict[str, str]]:
    """By heading: the names that users import, and the objects that they are (kernels/ is not inside
    tcm_fast/ in a checkout)."""
    package = {
        f"tcm_fast.{name}": f"tcm_fast.{tcm_fast._HOMES[name]}.{name}" for name in tcm_fast.__all__
    }
    operations = {
        f"tcm_fast.kernels.{name}": f"{module.removeprefix('tcm_fast.')}.{name}"
        for module, name in imported(ROOT / "kernels/__init__.py", "tcm_fast.kernels.")
    }
    used = {
        f"{module}.{name}": f"{module}.{name}"
        for path in sorted((ROOT / "examples").glob("*.py"))
        for module, name in imported(path, "tcm_fast.")
        if not module.startswith("tcm_fast.kernels")
    }
    return {"tcm_fast": package, "tcm_fast.kernels": operations, "What the examples use": used}


def api_page() -> str:
    """A directive of mkdocstrings for each public name."""
    parts = []
    for title, names in public_names().items():
        parts.append(f"## {title}")
        for name, path in names.items():
            options = [f'heading: "{name}"']
            options += ["members: false"] * path.startswith(
                "tcm_fast.config."
            )  # a page of their own
            parts.append("\n      ".join([f"::: {path}\n    options:", *options]))
    return "\n\n".join(parts)


def examples_page() -> str:
    parts = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```")
    return "\n\n".join(parts)


# ---- kernels ------------------------------------------------------------------------------------


def operations_page() -> str:
    """What each operation fuses: the first paragraph of its file."""
    lines = ["| operation | what it is |", "|---|---|"]
    for path in sorted((ROOT / "kernels").glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"| `{path.stem}` | {' '.join(text.split(chr(10) * 2)[0].split())} |")
    return "\n".join(lines)


def static_page() -> str:
    """The worst of each operation's compiled variants."""
    report = json.loads(
        (ROOT / "benchmarks/results/static_report.json").read_text(encoding="utf-8")
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        rows.setdefault(row["operation"], []).append(row)
    lines = [
        "| operation | variants | that spill | registers | spilt bytes | shared memory | 16-byte accesses |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in rows.items():
        spills = [row["spill_bytes"] for row in group]
        shares = [row["wide_share"] for row in group if row.get("wide_share") is not None]
        cells = [
            f"`{name}`", len(group), sum(map(bool, spills)), max(row["registers"] for row in group),
            max(spills), f"{max(row['shared_bytes'] for row in group) / 1024:.0f} KB",
            f"{min(shares):.0%}" if shares else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(lines) + f"\n\n({versions}; each column the worst of the variants.)"


GENERATED: dict[str, Callable[[], str]] = {
    "fields": fields_page,
    "presets": presets_page,
    "api": api_page,
    "examples": examples_page,
    "operations": operations_page,
    "static_report": static_page,
}


def completed(text: str, page: str) -> str:
    """A page's text as mkdocs is to have it."""
    return MARKER.sub(lambda match: GENERATED[match[1]](), with_links(text, page))


# ---- equations ----------------------------------------------------------------------------------

EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def with_mathml(text: str) -> str:
    """HTML with its equations as MathML."""
    try:
        from latex2mathml.converter import convert
    except ModuleNotFoundError:
        raise ModuleNotFoundError("site: needs latex2mathml, pip install -e '.[site]'") from None

    def converted(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        equation = convert(html.unescape(match[2]), display=display)
        return re.sub(r"(<mi>ln</mi>)(?=<m[in]>)", r'\1<mspace width="0.17em"/>', equation)

    return EQUATION.sub(converted, text)


# ---- mkdocs' events -----------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    found = {
        path for page, text in pages().items() for path in linked(text, source_of(page)).values()
    }
    outside = {path for path in found if not path.startswith("docs/") and (ROOT / path).is_file()}
    for path in sorted(outside | {*PAGES}):
        files.append(File.generated(config, page_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return completed(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    return with_mathml(html)
