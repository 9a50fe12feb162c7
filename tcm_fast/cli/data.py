"""`tcm-fast data pack | info`: arguments and words."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import OmitSubcommandPrefixes, Positional, arg, subcommand


@dataclass
class Pack:
    """Pack images: into a .zip that both this program and EDM's can read, or into a folder whose images are
    mapped into memory, for sets that do not fit there."""

    source: Positional[str]
    """What `train --data` takes: a folder (of classes), a zip, an npz, ..."""
    destination: Positional[Path]
    """A name that ends in .zip, or a folder's."""
    resolution: Annotated[int | None, arg(aliases=["--size"])] = None
    """Centre-crop and resize to this many pixels."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read."""
    skip_unlabelled: bool = False
    """Leave out images that have no label where others have one."""
    renumber: bool = False
    """Number only the classes that have images, from 0."""
    overwrite: bool = False
    """Replace what is there."""


@dataclass
class Info:
    """Describe a set of images."""

    source: Positional[str]
    """What `train --data` takes: a folder (of classes), a zip, an npz, ..."""
    resolution: int | None = None
    """As they would be, cropped and resized to this many pixels."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read."""
    skip_unlabelled: bool = False
    """Leave out images that have no label where others have one."""


@dataclass
class Data:
    """Look at images, or pack them."""

    action: OmitSubcommandPrefixes[
        Annotated[Pack, subcommand("pack")] | Annotated[Info, subcommand("info")]
    ]


def run_data(args: Data) -> int:
    from tcm_fast.data.dataset import class_mapping, class_names_of, describe
    from tcm_fast.data.pack import pack

    action = args.action
    if isinstance(action, Pack):
        count = pack(
            action.source,
            action.destination,
            resolution=action.resolution,
            skip_corrupt=action.skip_corrupt,
            skip_unlabelled=action.skip_unlabelled,
            renumber=action.renumber,
            overwrite=action.overwrite,
        )
        print(f"{count} images in {action.destination}")
        if names := class_names_of(action.destination):
            print(f"{len(names)} classes: {class_mapping(names)}")
        return 0
    found = describe(
        action.source, resolution=action.resolution, skip_corrupt=action.skip_corrupt,
        skip_unlabelled=action.skip_unlabelled,
    )  # fmt: skip
    if found["classes"]:
        counts = enumerate(found["classes"].items())
        found["classes"] = ", ".join(f"{number} {name} ({n})" for number, (name, n) in counts)
    for key, value in found.items():
        print(f"{key:>16}: {value}")
    return 0
