"""Networks on the Hugging Face Hub (the [hub] extra). `hf:user/repo` names one, `hf:user/repo@REVISION` a
certain state of it, wherever a network's path is asked for.

    net = load_network("hf:user/repo")

A repository holds what FILES names; model.safetensors alone rebuilds the network. Nothing else is downloaded,
and nothing that is downloaded can run code. Who the user is, is huggingface_hub's affair (`hf auth login`,
HF_TOKEN): no token is taken, written or shown here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PREFIX = "hf:"
FILES = ("model.safetensors", "stage1.safetensors", "config.json", "samples.png", "README.md")
LONGEST_MESSAGE = 400  # characters of what the Hub says


def local_path(source: str | Path) -> Path:
    """The path as it is; of one on the Hub the network's file, downloaded once. Raises as `pull`."""
    text = source if isinstance(source, str) else source.as_posix()
    if not text.startswith(PREFIX):
        return Path(source)
    repo, _, revision = text.removeprefix(PREFIX).partition("@")
    return pull(repo, revision=revision or None) / FILES[0]


def pull(repo: str, folder: str | Path | None = None, *, revision: str | None = None) -> Path:
    """Download a network's files.

    Args:
        repo: user/repo.
        folder: where to; None takes the Hub's cache.
        revision: a branch, tag or commit.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        OSError: the Hub has no such repository, or cannot be reached.
        ValueError: the repository holds no network of ours.
    """
    hub, patterns = package(), list(FILES)
    check_name(repo)
    with as_one_sentence(repo):
        found = Path(
            hub.snapshot_download(
                repo_id=repo, revision=revision, local_dir=folder, allow_patterns=patterns
            )
        )
    if not (found / FILES[0]).is_file():
        raise ValueError(f"hub: {repo} holds no network of tcm_fast ({FILES[0]} is missing)")
    return found


def package() -> Any:
    """huggingface_hub. ModuleNotFoundError names the extra."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModuleNotFoundError(
            f"hub: needs the package huggingface_hub ({error}): pip install 'tcm-fast[hub]'"
        ) from None
    return huggingface_hub


def check_name(repo: str) -> None:
    """ValueError where it is not user/repo."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ValueError(f"hub: a repository is named user/repo, got {repo!r}")


@contextmanager
def as_one_sentence(repo: str) -> Iterator[None]:
    """What the Hub refuses, as an OSError of one line, in which no token is."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        with suppress(Exception):
            if token := package().get_token():
                said = said.replace(token, "***")
        said = re.sub(r"hf_[A-Za-z0-9]{8,}", "***", said)[:LONGEST_MESSAGE]
        raise OSError(f"hub: {repo}: {said}") from None
