"""A run's log: nothing that goes wrong with it stops the run."""

import json
import shutil
from contextlib import suppress

import pytest

from tcm_fast.training import logger
from tcm_fast.training.logger import RunLog


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


def test_curves_go_on_in_a_new_file(tmp_path, monkeypatch, capsys):
    boards = [Board(3), Board(100)]
    left = iter(boards)
    monkeypatch.setattr(logger, "_tensorboard", lambda directory: next(left))
    log = RunLog(tmp_path)
    for images in (8, 16, 24):
        log.metrics("ect", images, {"loss": 1.0, "grad_norm": 2.0})
    log.close()
    assert boards[0].points[-1] == ("ect/loss", 1.0, 16)
    assert boards[1].points == [("ect/loss", 1.0, 24), ("ect/grad_norm", 2.0, 24)]
    assert all(board.closed for board in boards)
    assert capsys.readouterr().err.count("points of the curves are lost") == 1
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["images"] for x in lines] == [8, 16, 24]


def test_where_no_file_can_be_made_there_are_no_curves(tmp_path, monkeypatch):
    first = Board(1)

    def refuse(directory):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(logger, "_tensorboard", lambda directory: first)
    log = RunLog(tmp_path)
    monkeypatch.setattr(logger, "_tensorboard", refuse)
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
    log._board.flush()
    shutil.rmtree(tmp_path / "run")
    for images in range(16, 80, 8):
        log.reopen()
        log.metrics("ect", images, {"loss": 1.0})
        if log._board is not None:
            with suppress(OSError):  # what the thread met; the next point says so
                log._board.flush()
    log.close()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert (tmp_path / "run" / "log.jsonl").stat().st_size
