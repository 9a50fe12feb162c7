"""Networks on the Hugging Face Hub (the [hub] extra). `hf:user/repo` names one, `hf:user/repo@REVISION` a
certain state of it, wherever a network's path is asked for.

    net = load_network("hf:user/repo")

A repository holds what FILES names; model.safetensors alone rebuilds the network. Nothing else is downloaded,
and nothing that is downloaded can run code. Who the user is, is huggingface_hub's affair (`hf auth login`,
HF_TOKEN): no token is taken, written or shown here.
"""

from __future__ import annotations

import re
import shutil
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
    return pull(text) / FILES[0] if text.startswith(PREFIX) else Path(source)


def pull(repo: str, folder: str | Path | None = None, *, revision: str | None = None) -> Path:
    """Download a network's files.

    Args:
        repo: user/repo or user/repo@REVISION, also with hf: in front.
        folder: where to copy them, which holds no file of their names; None leaves them in the Hub's cache.
        revision: a branch, tag or commit.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        FileExistsError: a file of such a name is there.
        OSError: the Hub has no such repository, or cannot be reached.
        ValueError: the repository holds no network of ours.
    """
    hub = package()
    repo, _, named = repo.removeprefix(PREFIX).partition("@")
    check_name(repo)
    taken = [name for name in FILES if folder is not None and (Path(folder) / name).exists()]
    if taken:
        raise FileExistsError(
            f"pull: {folder} already holds {', '.join(taken)}: choose another folder"
        )
    with as_one_sentence(repo):
        found = Path(
            hub.snapshot_download(
                repo_id=repo, revision=revision or named or None, allow_patterns=list(FILES)
            )
        )
    if not (found / FILES[0]).is_file():
        raise ValueError(f"hub: {repo} holds no network of tcm_fast ({FILES[0]} is missing)")
    if folder is None:
        return found
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (found / name).is_file():
            shutil.copyfile(found / name, Path(folder) / name)
    return Path(folder)


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
