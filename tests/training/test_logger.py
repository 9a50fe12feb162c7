"""A run's log: nothing that goes wrong with it stops the run."""

import json
import os
import shutil
import subprocess
import sys
import types
from contextlib import suppress

import pytest

from tcm_fast.cli.main import parse
from tcm_fast.config import Config, LogConfig, from_dict
from tcm_fast.training import loggers
from tcm_fast.training.logger import RunLog


@pytest.fixture
def board(monkeypatch):
    """Makes `function(directory)` open what TensorBoard would."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")

    def open_with(function):
        class Stand(loggers.TensorBoard):
            def __init__(self, directory, config):
                self.writer = function(directory)

        kind = loggers.LOGGERS["tensorboard"]._replace(open=Stand)
        monkeypatch.setitem(loggers.LOGGERS, "tensorboard", kind)

    return open_with


class Board:
    """Stands for TensorBoard's writer, whose thread has failed after `good` points."""

    def __init__(self, good):
        self.good, self.points, self.closed = good, [], False

    def add_scalar(self, name, value, images):
        if len(self.points) == self.good:
            raise FileNotFoundError(2, "No such file or directory", "events")
        self.points.append((name, value, images))

    def close(self):
        self.closed = True
        if len(self.points) == self.good:
            raise FileNotFoundError(2, "No such file or directory", "events")


def test_curves_go_on_in_a_new_file(tmp_path, board, capsys):
    boards = [Board(3), Board(100)]
    left = iter(boards)
    board(lambda directory: next(left))
    log = RunLog(tmp_path)
    for images in (8, 16, 24):
        log.metrics("ect", images, {"loss": 1.0, "grad_norm": 2.0})
    log.close()
    assert boards[0].points[-1] == ("ect/loss", 1.0, 16)
    assert boards[1].points == [("ect/loss", 1.0, 24), ("ect/grad_norm", 2.0, 24)]
    assert all(board.closed for board in boards)
    assert capsys.readouterr().err.count("points of tensorboard are lost") == 1
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["images"] for x in lines] == [8, 16, 24]


def test_where_no_file_can_be_made_there_are_no_curves(tmp_path, board):
    first = Board(1)

    def refuse(directory):
        raise PermissionError(13, "Permission denied")

    board(lambda directory: first)
    log = RunLog(tmp_path)
    board(refuse)
    for images in (8, 16, 24):
        log.metrics("ect", images, {"loss": 1.0})
    log.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_folder_that_vanishes(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run")
    log.metrics("ect", 8, {"loss": 1.0})
    log._loggers["tensorboard"].writer.flush()
    shutil.rmtree(tmp_path / "run")
    for images in range(16, 80, 8):
        log.reopen()
        log.metrics("ect", images, {"loss": 1.0})
        if "tensorboard" in log._loggers:
            with suppress(OSError):  # what the thread met; the next point says so
                log._loggers["tensorboard"].writer.flush()
    log.close()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert (tmp_path / "run" / "log.jsonl").stat().st_size


# ---- where curves go ----------------------------------------------------------------------------


def run_to(*names, project="tcm-fast"):
    return Config(log=LogConfig(to=names, project=project))


class Service(types.ModuleType):
    """Stands for a package of curves: notes what it is asked."""

    def __init__(self, name):
        super().__init__(name)
        self.begun, self.points, self.ended, self.fails = [], [], 0, None
        self.__spec__ = types.SimpleNamespace(name=name)
        self.Settings = dict

    def init(self, **arguments):
        if self.fails is not None:
            raise self.fails
        self.begun.append(arguments)
        return self

    def define_metric(self, name, **arguments):
        pass

    def log(self, values, step=None):
        self.points.append((values, step))

    def finish(self):
        self.ended += 1


@pytest.fixture
def service(monkeypatch):
    def stand_for(name):
        monkeypatch.setitem(sys.modules, name, Service(name))
        return sys.modules[name]

    return stand_for


def test_wandb_gets_every_point_over_the_images(tmp_path, service):
    wandb = service("wandb")
    (tmp_path / "mine").mkdir()
    for images in (8, 16):  # begun, and resumed: one run there
        log = RunLog(tmp_path / "mine", run_to("wandb", project="faces"))
        log.metrics("ect", images, {"loss": 1.0, "grad_norm": 2.0})
        log.close()
    assert [values for values, _ in wandb.points] == [
        {"images": images, "ect/loss": 1.0, "ect/grad_norm": 2.0} for images in (8, 16)
    ]
    first, second = wandb.begun
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("faces", "mine", "allow")
    assert len(first["id"]) == 8
    assert first["config"]["seed"] == 0
    assert wandb.ended == 2


def test_trackio_gets_every_point_over_the_images(tmp_path, service):
    trackio = service("trackio")
    log = RunLog(tmp_path, run_to("trackio"))
    log.metrics("tcm", 32, {"loss": 1.0})
    log.close()
    assert trackio.points == [({"tcm/loss": 1.0}, 32)]
    assert trackio.begun[0]["name"] == tmp_path.name
    assert trackio.ended == 1


def test_a_service_that_fails_costs_its_curves_alone(tmp_path, service, capsys):
    wandb, trackio = service("wandb"), service("trackio")
    log = RunLog(tmp_path, run_to("wandb", "trackio"))

    def fail(values, step=None):
        raise ConnectionError("no network")

    wandb.log = fail
    for images in (8, 16):
        log.metrics("ect", images, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("no network, points of wandb are lost") == 1
    assert len(trackio.points) == 2
    assert len(wandb.begun) == 1
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == [8, 16]


def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for name, extra in (("tensorboard", "log"), ("wandb", "wandb"), ("trackio", "trackio")):
        expected = rf"log\.to: {name} is not installed: pip install 'tcm-fast\[{extra}\]'"
        with pytest.raises(ModuleNotFoundError, match=expected):
            RunLog(tmp_path, run_to(name))
    RunLog(tmp_path).close()  # by default there are then no curves
    assert not (tmp_path / "tensorboard").exists()


def test_a_service_that_refuses_ends_the_run_before_it_begins(tmp_path, service):
    trackio, wandb = service("trackio"), service("wandb")
    wandb.fails = RuntimeError("no key")
    with pytest.raises(ValueError, match=r"log\.to: wandb cannot begin: no key"):
        RunLog(tmp_path, run_to("trackio", "wandb"))
    assert trackio.ended == 1


def test_no_curves_at_all(tmp_path):
    RunLog(tmp_path, run_to()).close()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    ("argv", "to"),
    [
        ([], None),
        (["--log.to", "tensorboard", "wandb"], ("tensorboard", "wandb")),
        (["--log.to"], ()),
        (["--log.to", "None"], None),
    ],
)
def test_the_command_line_names_them(argv, to):
    assert parse(["train", "--preset", "digits", *argv]).settings.log.to == to


def test_the_loggers_names_are_checked():
    with pytest.raises(
        ValueError, match=r"log\.to: must be one of tensorboard, wandb, trackio, got"
    ):
        from_dict(Config, {"log": {"to": ["mlflow"]}})
    with pytest.raises(ValueError, match=r"log\.to: must name each once, got wandb, wandb"):
        run_to("wandb", "wandb")


WANDB = """
import sys
from pathlib import Path
from tcm_fast.config import Config, LogConfig
from tcm_fast.training.logger import RunLog
log = RunLog(Path(sys.argv[1]), Config(log=LogConfig(to=("wandb",))))
log.metrics("ect", 8, {"loss": 1.0})
assert "wandb" in log._loggers, "it failed"
log.close()
"""


def test_wandb_itself_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'tcm-fast[wandb]'")
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", WANDB, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size
    assert (tmp_path / "wandb/run-id").read_text() in written.name
