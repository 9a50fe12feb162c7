"""`tcm-fast push` and `tcm-fast pull`: arguments and words."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import Positional


@dataclass
class Push:
    """Upload a network to the Hugging Face Hub: weights, configuration, samples and a model card made from
    the run's own numbers (the [hub] extra; `hf auth login` first)."""

    source: Positional[Path]
    """A run, a checkpoint or a network file."""
    repo: Positional[str]
    """user/repo; made where there is none."""
    public: bool = False
    """Everybody may see a repository that is made."""
    license: str | None = None
    """Of the weights, as the Hub abbreviates it, such as apache-2.0."""


@dataclass
class Pull:
    """Download a network from the Hugging Face Hub. Commands that take a network do so by themselves
    where they are given hf:user/repo."""

    repo: Positional[str]
    """user/repo, or user/repo@REVISION."""
    out: Path | None = None
    """Folder that holds none of its files yet; by default repo."""
    revision: str | None = None
    """A branch, tag or commit."""


def run_push(args: Push) -> int:
    from tcm_fast.interchange.hub import push

    url = push(args.source, args.repo, public=args.public, license=args.license)
    print(f"{args.source} in {url}")
    print(f"to use it: tcm-fast sample hf:{args.repo} --num 16")
    return 0


def run_pull(args: Pull) -> int:
    from tcm_fast.checkpoint.hub import FILES, pull

    name = args.repo.partition("@")[0].rpartition("/")[2]
    out = Path(name) if args.out is None else args.out
    folder = pull(args.repo, out, revision=args.revision)
    print(f"{args.repo} in {folder}")
    print(f"to use it: tcm-fast sample {folder / FILES[0]} --num 16")
    return 0
