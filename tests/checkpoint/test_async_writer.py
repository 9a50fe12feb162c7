"""Background saves: a copy in an instant, written while training changes everything."""

import os
import threading

import pytest
import torch
from test_format import equal, tiny_net, train_steps

from tcm_fast.checkpoint import async_writer
from tcm_fast.checkpoint.async_writer import CheckpointWriter, NotFinite
from tcm_fast.checkpoint.format import collect, load_checkpoint


def contents(net, optimizer, frozen=None, images=64):
    networks = {"model": net, "ema-0": tiny_net(1)}
    networks |= {} if frozen is None else {"stage1": frozen}
    return collect(networks, optimizer, {"phase": "ect", "images": images}, {"step": images // 64})


@pytest.fixture
def blocked(monkeypatch):
    """The writer waits before it writes until this event is set."""
    go, write = threading.Event(), async_writer.write_checkpoint

    def waiting(*args, **kwargs):
        assert go.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(async_writer, "write_checkpoint", waiting)
    return go


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path, blocked):
    net, frozen = tiny_net(), tiny_net(2)
    optimizer = torch.optim.RAdam(net.parameters())
    train_steps(net, optimizer, 3)
    writer = CheckpointWriter(tmp_path, ("stage1",))
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    writer.submit(contents(net, optimizer, frozen), keep=1)
    train_steps(net, optimizer, 3)
    assert writer.poll() is None
    blocked.set()
    saved = writer.wait()
    assert saved.error is None
    assert saved.seconds > 0
    assert writer.wait() is None  # told once
    loaded = load_checkpoint(saved.path)
    assert equal(loaded.network_tensors("model"), expected)
    assert equal(loaded.network_tensors("stage1"), frozen.state_dict())
    writer.submit(contents(net, optimizer, frozen, images=128), keep=1)
    second = load_checkpoint(writer.wait().path)
    assert equal(second.network_tensors("model"), net.state_dict())


def test_memory_is_used_again_and_what_never_changes_is_not_copied(tmp_path):
    net, frozen = tiny_net(), tiny_net(2)
    optimizer = torch.optim.RAdam(net.parameters())
    writer = CheckpointWriter(tmp_path, ("stage1",))
    places = []
    for images in (64, 128):
        train_steps(net, optimizer, 1)
        writer.submit(contents(net, optimizer, frozen, images))
        writer.wait()
        places.append({k: v.data_ptr() for k, v in writer._buffers.items()})
    assert places[0] == places[1]
    for name, value in frozen.state_dict().items():
        assert places[0]["stage1", name] == value.data_ptr()
    for name, value in net.state_dict().items():
        assert places[0]["model", name] != value.data_ptr()


def test_failures_are_told_and_the_next_save_works(tmp_path, monkeypatch):
    net = tiny_net()
    optimizer = torch.optim.RAdam(net.parameters())
    writer = CheckpointWriter(tmp_path)
    threads = threading.active_count()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        writer.submit(contents(net, optimizer))
        saved = writer.wait()
    assert saved.path is None
    with pytest.raises(OSError, match=r"could not be saved.*No space left"):
        raise saved.error
    writer.submit(contents(net, optimizer))
    assert writer.wait().path.is_dir()
    assert threading.active_count() == threads


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = tiny_net()
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = torch.inf
    writer = CheckpointWriter(tmp_path)
    writer.submit(contents(net, torch.optim.RAdam(net.parameters())))
    error = writer.wait().error
    assert isinstance(error, NotFinite)
    assert "of model has values that are not finite" in str(error)
    assert not (tmp_path / "checkpoints").exists()


class Event:
    """Stands for a CUDA event that is slow to come."""

    def __init__(self):
        self.is_there = False

    def query(self):
        return self.is_there

    def synchronize(self):
        self.is_there = True


@pytest.mark.parametrize("waits", [True, False])
def test_the_thread_begins_when_the_copy_has_arrived(tmp_path, waits):
    """It never talks to the device itself."""
    net, arrival = tiny_net(), Event()
    writer = CheckpointWriter(tmp_path)
    writer._arriving = arrival, contents(net, torch.optim.RAdam(net.parameters())), {}
    assert writer.poll() is None
    assert writer._thread is None
    saved = None
    if not waits:
        arrival.is_there = True
        saved = writer.poll()
        assert writer._arriving is None
    assert (saved or writer.wait()).path.is_dir()
    assert arrival.is_there
