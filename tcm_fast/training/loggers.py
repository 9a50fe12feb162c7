"""Where a run's curves go beside log.jsonl: TensorBoard, Weights & Biases, trackio.

To add one: a class with `metrics` and `close`, a line in LOGGERS, its name in `config.LoggerName`, and an
extra in pyproject.toml.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tcm_fast.config import Config, LoggerName, to_dict


class Logger(Protocol):
    """Curves over the images seen. Both functions may raise anything; a run goes on."""

    def metrics(self, values: Mapping[str, float], images: int) -> None:
        """Points, by the curve's name (such as "ect/loss")."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, directory: Path, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def metrics(self, values: Mapping[str, float], images: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, images)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run at Weights & Biases; a resumed one goes on there. Its own environment variables
    (WANDB_MODE=offline, WANDB_ENTITY, ...) hold, and it finds the user's key by itself."""

    def __init__(self, directory: Path, config: Config) -> None:
        import wandb

        self.run = wandb.init(
            project=config.log.project, name=directory.resolve().name, dir=str(directory),
            id=_kept_name(directory / "wandb" / "run-id"), resume="allow", config=to_dict(config),
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.run.define_metric("images")
        self.run.define_metric("*", step_metric="images")

    def metrics(self, values: Mapping[str, float], images: int) -> None:
        self.run.log({"images": images, **values})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio's local dashboard (`trackio show`)."""

    def __init__(self, directory: Path, config: Config) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(
            project=config.log.project, name=directory.resolve().name, resume="allow",
            config=to_dict(config),
        )  # fmt: skip

    def metrics(self, values: Mapping[str, float], images: int) -> None:
        self.trackio.log(dict(values), step=images)

    def close(self) -> None:
        self.trackio.finish()


class Kind(NamedTuple):
    """How to open a logger, the extra that installs it, and whether one that failed is opened again."""

    open: Callable[[Path, Config], Logger]
    extra: str
    reopens: bool


LOGGERS: dict[LoggerName, Kind] = {
    "tensorboard": Kind(TensorBoard, "log", True),  # its folder may have been deleted
    "wandb": Kind(WandB, "wandb", False),
    "trackio": Kind(Trackio, "trackio", False),
}


def open_loggers(directory: Path, config: Config) -> dict[LoggerName, Logger]:
    """The loggers that `log.to` names; without it TensorBoard, where it is installed.

    Raises:
        ModuleNotFoundError: one is not installed; it names the extra.
        ValueError: one cannot begin, such as Weights & Biases without a key.
    """
    usual: tuple[LoggerName, ...] = ("tensorboard",) if find_spec("tensorboard") else ()
    names = usual if config.log.to is None else config.log.to
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(
                f"log.to: {name} is not installed: pip install 'tcm-fast[{LOGGERS[name].extra}]'",
                name=name,
            )
    opened: dict[LoggerName, Logger] = {}
    for name in names:
        try:
            opened[name] = LOGGERS[name].open(directory, config)
        except Exception as error:
            for logger in opened.values():
                logger.close()
            raise ValueError(f"log.to: {name} cannot begin: {error}") from error
    return opened


def _kept_name(path: Path) -> str:
    """Eight letters and digits, the same whenever the run goes on."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def reopened(name: LoggerName, directory: Path, config: Config) -> dict[LoggerName, Any]:
    """A logger in the place of one that has failed, where there can be one."""
    kind = LOGGERS[name]
    try:
        return {name: kind.open(directory, config)} if kind.reopens else {}
    except OSError:
        return {}
