"""Every command in README.md, CONTRIBUTING.md and docs/ is taken by the program; what takes seconds runs."""

import argparse
import ast
import contextlib
import importlib
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import tiny, train

import tcm_fast
from tcm_fast.cli.main import COMMANDS, main, parse
from tcm_fast.config import load_config

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs/build_site.py"))
HISTORY = ("changelog.md", "log.md")  # they say what there was
PAGES = {page: text for page, text in SITE["pages"]().items() if page not in HISTORY}

BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
OURS = re.compile(
    r"(?:^|(?<!pip install)\s)(?:tcm-fast|(?:python|torchrun [^&|;]*) -m (tcm_fast[\w.]*))(?:\s|$)"
)
PLACEHOLDERS = {
    "RUN": "runs/digits", "SRC": "PHOTOS", "DST": "packed.zip", "NAME": "digits", "IMAGES": "PHOTOS",
    "OTHER": "runs/mine", "FOLDER": "packed", "H": "8", "HOURS": "8", "FILE": "network.safetensors",
}  # fmt: skip

NOT_RUN = {
    "train": "hours, but SHORT; tests/test_quickstart.py and tests/cli/test_main.py train",
    "bench": "minutes; tests/benchmarks/test_suite.py",
    "convert network-snapshot.pkl": "needs a foreign file; tests/interchange/test_convert.py makes some",
    "sample edm2-s.safetensors": "needs that file converted",
    "sample hf:": "the Hub; tests/interchange/test_hub.py has one of its own",
    "edit runs/photos --task colorize": "needs a network of 3 channels; tests/cli/test_edit.py",
    "push": "as above",
    "pull": "as above",
    "demo": "serves until it is stopped; tests/cli/test_demo.py",
    "data pack imagenet": "needs ImageNet",
    "features train": "minutes; tests/cli/test_feature_command.py",
    "features info": "needs that file; as above",
}
"""How commands begin that are only parsed, and why."""

SLOW = ("plan --preset",)
"""How those begin that take half a minute."""

SHORT = [
    "--phases", "edm", "--max-steps", "1", "--edm.batch-size", "8", "--eval.features", "", "--out", "short",
]  # fmt: skip
"""What makes the training of digits one that takes seconds."""


# ---- what the pages hold ------------------------------------------------------------------------


def words_of(text):
    """A command's words after `tcm-fast`, or after the module's name, which comes first then."""
    found = OURS.search(text)
    words = shlex.split(text[found.end() :], comments=True)
    words = words[: words.index("...")] if "..." in words else words
    ends = [i for i, word in enumerate(words) if word in ("&&", "||", "|", ";", ">")]
    words = [PLACEHOLDERS.get(word, word) for word in words[: min(ends, default=None)]]
    module = found[1] or "tcm_fast"
    return words if module == "tcm_fast" else [module, *words]


def variants(words):
    """`ops|step` is two commands."""
    for i, word in enumerate(words):
        if re.fullmatch(r"[a-z]+(\|[a-z]+)+", word):
            return [[*words[:i], choice, *words[i + 1 :]] for choice in word.split("|")]
    return [words]


def commands():
    """(page, words) of every command of ours. One in a sentence that names no option may leave arguments
    out: its help has to come."""
    found = []
    for page, text in PAGES.items():
        blocks = [m for m in BLOCK.finditer(text) if m[2] in ("", "sh", "bash", "console")]
        lines = [line for m in blocks for line in m[3].replace("\\\n", " ").splitlines()]
        for line in lines:
            parts = [part for part in line.split("&&") if OURS.search(part.partition(" #")[0])]
            found += [(page, words) for part in parts for words in variants(words_of(part))]
        for span in SPAN.findall(BLOCK.sub("", text)):
            span = " ".join(span.split())
            if OURS.match(span):
                words = words_of(span)
                has_options = any(word.startswith("--") for word in words)
                names = [word for word in words if re.fullmatch(r"[a-z][\w.-]*", word)]
                found.append((page, words if has_options else [*names[:2], "--help"]))
    return found


def unique():
    seen = {}
    for page, words in commands():
        seen.setdefault(shlex.join(words), (page, words))
    return [
        pytest.param(*given, id=text, marks=[pytest.mark.slow] * text.startswith(SLOW))
        for text, given in seen.items()
    ]


def test_commands_are_found():
    texts = {shlex.join(words) for _, words in commands()}
    assert len(texts) > 50
    for text in (
        "train --preset digits", "data pack PHOTOS photos.zip --resolution 32", "eval --help",
        "bench memory", "tcm_fast.benchmarks.gpu_session --list", "train --help",
    ):  # fmt: skip
        assert text in texts


# ---- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the commands name: a trained run under three names, photos, a table of prices."""
    place = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (place / "PHOTOS" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(place / "PHOTOS" / name / f"{i}.png")
    short = {"batch_size": 16, "images": 32}
    train(tiny("digits:train", edm=short, ect=short, tcm=short), place / "runs/digits")
    for name in ("photos", "mine"):
        shutil.copytree(place / "runs/digits", place / "runs" / name)
    size = {"small": 4}
    for name in ("photo", "hole", "small", "sketch", "noisy"):
        pixels = rng.integers(0, 256, (size.get(name, 8),) * 2, np.uint8)
        Image.fromarray(pixels).save(place / f"{name}.png")
    (place / "mine.toml").write_text('base = "cifar10"\n')
    (place / "prices.toml").write_text("[per_hour]\nh200 = 3.1\n")
    return place


class ParsedError(Exception):
    """Raised where a module has read its arguments and would begin to work."""


def check_module(name, arguments, monkeypatch):
    """The arguments of `python -m NAME` are such that it takes them."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, *args):
        try:
            read(self, *args)
        except SystemExit as stop:
            if stop.code:  # it is 0 after --help
                raise
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(ParsedError):
        importlib.import_module(name).main()


def leaves(words):
    """The exit status of our program."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code or 0


@pytest.mark.parametrize(("page", "words"), unique())
def test_commands(page, words, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    if words and words[0].startswith("tcm_fast."):
        check_module(words[0], words[1:], monkeypatch)
        return
    text = shlex.join(words)
    if "--help" not in words:
        try:
            parse(words)
        except SystemExit:
            pytest.fail(f"{page}: tcm-fast {text} is refused: {capsys.readouterr()}")
    if text.startswith("train --preset digits") and not {"--help", "--time-budget"} & {*words}:
        shutil.rmtree("short", ignore_errors=True)
        words, text = [*words, *SHORT], "(short) " + text
    is_run = "--help" in words or not any(text.startswith(start) for start in NOT_RUN)
    if is_run and leaves(words):
        said = capsys.readouterr().err
        if "pip install 'tcm-fast[" in said:
            pytest.skip(said)
        pytest.fail(
            f"{page}: tcm-fast {text} failed in the folder of the fixture `folder`; put what it needs there, "
            f"or its beginning and a reason into NOT_RUN: {said[-2000:]}"
        )


def test_a_wrong_command_would_be_noticed(capsys):
    for words in (
        ["train", "--pre", "digits"],
        ["data", "unpack", "a"],
        ["sample", "--num", "x", "r"],
    ):
        with pytest.raises(SystemExit):
            parse(words)


def test_every_reason_is_of_a_command():
    texts = [shlex.join(words) for _, words in commands()]
    assert all(any(text.startswith(start) for text in texts) for start in NOT_RUN)


# ---- options, extras, Python and TOML -----------------------------------------------------------

OTHERS = {
    "--build-arg", "--ntasks-per-node", "--gpus-per-node", "--append", "--signal", "--env", "--gpus",
}  # fmt: skip
"""Options of other programs that pages name by themselves."""


def known_options(capsys):
    """All options of all commands."""
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower() for kind in COMMANDS]
    texts = []
    for command in [[name] for name in names] + [
        ["data", "pack"],
        ["data", "info"],
        ["features", "train"],
        ["features", "info"],
    ]:
        with contextlib.suppress(SystemExit):
            parse([*command, "--help"])
        texts.append(capsys.readouterr().out)
        assert texts[-1], command
    return set(re.findall(r"--[a-z][\w.-]*", "\n".join(texts)))


def test_options_exist(capsys):
    """Those in sentences and tables, where no other program is named before them."""
    known = known_options(capsys) | OTHERS
    known |= {re.sub(r"(--|\.)no-", r"\1", name) for name in known}
    wrong = {}
    for page, text in PAGES.items():
        if page in ("benchmarks.md", "contributing.md", "study.md"):
            continue  # those of `python -m tcm_fast.benchmarks...`
        for span in SPAN.findall(BLOCK.sub("", text)):
            words = span.split()
            if words and words[0].startswith("--"):
                wrong |= {
                    w: page
                    for w in words
                    if re.fullmatch(r"--[a-z][\w.-]*\w", w) and w not in known
                }
    assert not wrong


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = project["project"]["optional-dependencies"]
    found = [
        extra
        for text in PAGES.values()
        for extras in re.findall(r"""pip install [^`\n]*?(?:tcm-fast|\.)\[([a-z,]+)\]""", text)
        for extra in extras.split(",")
    ]
    assert {"hub", "test", "hf"} <= {*found}
    assert {*found} <= {*known}


def blocks(language):
    found = [
        (page, m[3])
        for page, text in PAGES.items()
        for m in BLOCK.finditer(text)
        if m[2] == language
    ]
    return [pytest.param(text, id=f"{page}-{i}") for i, (page, text) in enumerate(found)]


@pytest.mark.parametrize("text", blocks("python"))
def test_python(text):
    """It is Python, and the names are there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "tcm_fast":
            assert hasattr(tcm_fast, node.attr)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tcm_fast"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml(text, tmp_path):
    """A configuration, or a table of prices."""
    if "per_hour" not in tomllib.loads(text):
        (tmp_path / "mine.toml").write_text(text)
        load_config(tmp_path / "mine.toml")
