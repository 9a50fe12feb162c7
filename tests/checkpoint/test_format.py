"""Networks and checkpoints on disk: exact, whole or absent, and every damage named."""

import errno
import json
import os
import resource
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tcm_fast.checkpoint.format import (
    collect,
    load_checkpoint,
    load_network,
    load_stage1,
    save_network,
    write_checkpoint,
)
from tcm_fast.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from tcm_fast.checkpoint.run_folder import find_checkpoints, newest_checkpoint, open_run
from tcm_fast.networks import build_network
from tcm_fast.runtime.atomic import read_tensors

INFO = {
    "phase": "tcm",
    "t_prime": 1.0,
    "images": 512,
    "iterations": 9,
    "class_names": ["zero", "one"],
}


def tiny_net(seed=0, channels=1):
    torch.manual_seed(seed)
    return build_network(
        "ddpmpp", img_resolution=8, img_channels=channels, model_channels=16, channel_mult=[1, 1],
        num_blocks=1, attn_resolutions=[],
    )  # fmt: skip


def train_steps(net, optimizer, steps, seed=0):
    """Optimizer steps with gradients that depend on the seed and the weights."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise + 0.1 * parameter.detach()
        optimizer.step()


def save(run, *, images=512, phase="ect", net=None, **options):
    net = net or tiny_net()
    optimizer = options.pop("optimizer", None) or torch.optim.RAdam(net.parameters())
    networks = options.pop("networks", {"model": net, "ema-0": tiny_net(1)})
    state = options.pop("state", {"step": images // 64, "scaler": {"scale": 16.0}})
    info = {**INFO, "phase": phase, "images": images}
    return write_checkpoint(run, collect(networks, optimizer, info, state), **options)


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def files_below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- networks -----------------------------------------------------------------------------------


def test_network_round_trip_is_exact(tmp_path):
    net = tiny_net().to(memory_format=torch.channels_last)
    save_network(tmp_path / "net.safetensors", net, metadata=INFO)
    before = torch.random.get_rng_state()
    loaded = load_network(tmp_path / "net.safetensors")
    assert torch.equal(before, torch.random.get_rng_state())
    assert equal(loaded.state_dict(), net.state_dict())
    assert loaded.spec == net.spec
    assert loaded.info == INFO
    assert not any(module.training for module in loaded.modules())
    assert list(tmp_path.iterdir()) == [tmp_path / "net.safetensors"]


def test_same_network_gives_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_network(tmp_path / name, tiny_net(), metadata=INFO)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_state_takes_the_place_of_the_networks_own_values(tmp_path):
    net, other = tiny_net(0), tiny_net(1)
    average = {name: p.detach() for name, p in other.named_parameters()}
    save_network(tmp_path / "ema.safetensors", net, metadata=INFO, state=average)
    assert equal(load_network(tmp_path / "ema.safetensors").state_dict(), other.state_dict())
    with pytest.raises(ValueError, match=r"nonsense is unknown"):
        save_network(tmp_path / "x", net, metadata=INFO, state={"nonsense": torch.zeros(1)})
    assert not (tmp_path / "x").exists()


def test_network_file_is_replaced_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_network(path, tiny_net(0), metadata=INFO)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_no_space)
        with pytest.raises(OSError, match=r"net.safetensors: could not be written, No space left"):
            save_network(path, tiny_net(1), metadata=INFO)
    assert files_below(tmp_path) == {"net.safetensors": before}
    with path.open("rb") as reader:
        save_network(path, tiny_net(1), metadata=INFO)
        assert reader.read() == before  # who reads the old file reads it to its end
    assert equal(load_network(path).state_dict(), tiny_net(1).state_dict())


def raise_no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_network_is_refused(tmp_path, kept):
    path = tmp_path / "net.safetensors"
    save_network(path, tiny_net(), metadata=INFO)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"net.safetensors is truncated, damaged") as caught:
        load_network(path)
    assert "\n" not in str(caught.value)


def test_missing_foreign_and_newer_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing.safetensors"):
        load_network(tmp_path / "nothing.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"not written by tcm_fast .* convert"):
        load_network(tmp_path / "foreign.safetensors")
    header = {"format": 2, "network": {}}
    save_file({}, tmp_path / "newer.safetensors", metadata={"tcm_fast": json.dumps(header)})
    with pytest.raises(ValueError, match=r"format 1, got 2"):
        load_network(tmp_path / "newer.safetensors")
    (tmp_path / "pickle.pkl").write_bytes(b"\x80\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"pickle.pkl is truncated, damaged or not a safetensors"):
        load_network(tmp_path / "pickle.pkl")


def rewrite(path, *, change_header=None, change_tensors=None):
    tensors, header = load_file(path), read_header(path)
    (change_tensors or (lambda t: None))(tensors)
    (change_header or (lambda h: None))(header)
    save_file(tensors, path, metadata={"tcm_fast": json.dumps(header)})


def read_header(path):
    return read_tensors(path)[0]


def test_wrong_keys_and_shapes_are_named(tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, tiny_net(), metadata=INFO)
    first = next(iter(tiny_net().state_dict()))

    def change(tensors):
        del tensors[first]
        tensors["foreign.weight"] = torch.zeros(3)

    rewrite(path, change_tensors=change)
    with pytest.raises(ValueError, match=rf"{first} is missing, foreign.weight is unknown"):
        load_network(path)

    save_network(path, tiny_net(), metadata=INFO)
    rewrite(path, change_tensors=lambda t: t.update({k: v.new_zeros(2, 9) for k, v in t.items()}))
    with pytest.raises(ValueError, match=r"is \[2, 9\] instead of .* and \d+ more"):
        load_network(path)


def test_network_that_cannot_be_built_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, tiny_net(), metadata=INFO)
    rewrite(path, change_header=lambda h: h["network"].update(name="no_such_network"))
    with pytest.raises(ValueError, match=r"net.safetensors describes one that cannot be built"):
        load_network(path)


# ---- the optimizer ------------------------------------------------------------------------------

OPTIMIZERS = {
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.99)),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_restored_optimizer_continues_bit_for_bit(tmp_path, kind, layout):
    net = tiny_net().to(memory_format=layout)
    optimizer = OPTIMIZERS[kind](net.parameters())
    train_steps(net, optimizer, 7, seed=1)
    path = save(tmp_path, net=net, optimizer=optimizer)

    resumed = tiny_net(5).to(memory_format=layout)
    fresh = OPTIMIZERS[kind](resumed.parameters())
    saved = load_checkpoint(path)
    saved.restore_network(resumed, "model")
    saved.restore_optimizer(fresh, resumed)
    for n, o in ((net, optimizer), (resumed, fresh)):
        train_steps(n, o, 5, seed=2)
    assert equal(net.state_dict(), resumed.state_dict())
    assert equal(
        flatten_optimizer(optimizer, net.named_parameters()),
        flatten_optimizer(fresh, resumed.named_parameters()),
    )


def test_restored_moments_keep_their_dtype():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([weight])
    moments = {"w/exp_avg": torch.ones(4, dtype=torch.bfloat16), "w/step": torch.tensor(3.0)}
    restore_optimizer(optimizer, [("w", weight)], moments)
    assert equal(flatten_optimizer(optimizer, [("w", weight)]), moments)
    optimizer.state[weight]["exp_avg"].zero_()
    assert moments["w/exp_avg"].sum() == 4  # a copy, not an alias


def test_optimizer_state_that_does_not_fit_is_refused(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([weight])
    with pytest.raises(ValueError, match=r"no parameter for the saved state 'v/exp_avg'"):
        restore_optimizer(optimizer, [("w", weight)], {"v/exp_avg": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"'w/exp_avg' must be \[4\], got \[5\]"):
        restore_optimizer(optimizer, [("w", weight)], {"w/exp_avg": torch.zeros(5)})
    optimizer.state[weight]["count"] = 3
    with pytest.raises(ValueError, match=r"count of w must be a tensor, got 3"):
        flatten_optimizer(optimizer, [("w", weight)])
    with pytest.raises(ValueError, match=r"has no name"):
        flatten_optimizer(optimizer, [])
    saved = load_checkpoint(save(tmp_path))
    with pytest.raises(ValueError, match=r"written by RAdam, got Adam"):
        saved.restore_optimizer(optimizer, tiny_net())


# ---- checkpoints --------------------------------------------------------------------------------


def test_checkpoint_round_trip(tmp_path):
    net, average, frozen = tiny_net(0), tiny_net(1), tiny_net(2)
    frozen.info = {"phase": "ect", "t_prime": None, "images": 64, "iterations": 2}
    optimizer = torch.optim.RAdam(net.parameters())
    values = {name: p.detach() for name, p in average.named_parameters()}
    state = {"step": 8, "scaler": {"scale": 16.0}, "config": {"lr": 1e-4, "phases": ["ect", "tcm"]}}
    networks = {"model": net, "ema-0": (net, values), "ema-1": tiny_net(3), "stage1": frozen}
    path = save(tmp_path, phase="tcm", net=net, networks=networks, state=state, optimizer=optimizer)

    assert path == tmp_path / "checkpoints" / "tcm-000000512"
    saved = load_checkpoint(path)
    assert state.items() <= saved.state.items()
    assert INFO.items() <= saved.state.items()
    assert saved.state["versions"]["torch"] == torch.__version__
    assert set(saved.state["files"]) == {
        "model.safetensors",
        "ema-0.safetensors",
        "ema-1.safetensors",
        "stage1.safetensors",
        "optimizer.safetensors",
    }
    assert equal(saved.network_tensors("model"), net.state_dict())
    assert equal(saved.network_tensors("ema-0"), average.state_dict())

    for source in (tmp_path, path, path / "ema-0.safetensors"):
        loaded = load_network(source)
        assert equal(loaded.state_dict(), average.state_dict())
        assert loaded.info == INFO
        stage1 = load_stage1(source)
        assert equal(stage1.state_dict(), frozen.state_dict())
        assert stage1.info == {**frozen.info, "class_names": INFO["class_names"]}


def test_stage1_is_none_where_there_is_none(tmp_path):
    assert load_stage1(save(tmp_path)) is None


def test_checkpoint_without_averages_gives_the_model(tmp_path):
    net = tiny_net(4)
    save(tmp_path, net=net, networks={"model": net})
    assert equal(load_network(tmp_path).state_dict(), net.state_dict())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_refused(tmp_path_factory, data):
    path = save(tmp_path_factory.mktemp("run"))
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    # Not the blanks of state.json, whose layout carries nothing.
    solid = [i for i, byte in enumerate(file.read_bytes()) if chr(byte) not in " \n"]
    flip_byte(file, solid[data.draw(st.integers(0, len(solid) - 1))])
    with pytest.raises(ValueError, match=file.name):
        load_checkpoint(path)


def test_any_file_cut_anywhere_is_refused(tmp_path):
    path = save(tmp_path)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        end = len(whole.rstrip())  # the last line's end says nothing
        for kept in {0, 1, 7, 8, 9, 100, *range(0, end, end // 9), end - 1}:
            if kept >= end:
                continue
            file.write_bytes(whole[:kept])
            with pytest.raises(ValueError, match=file.name):
                load_checkpoint(path)
            with pytest.raises(ValueError, match=file.name):
                open_run(tmp_path, "auto")
            with pytest.raises((ValueError, FileNotFoundError), match=file.name):
                load_network(tmp_path)
        file.write_bytes(whole)
    assert load_checkpoint(path).path == open_run(tmp_path, "auto").path


def test_another_networks_checkpoint_is_refused(tmp_path):
    saved = load_checkpoint(save(tmp_path, net=tiny_net(channels=3)))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the network: .* instead"):
        saved.restore_network(tiny_net(), "model")


def test_flipped_weight_is_refused_for_sampling_too(tmp_path):
    path = save(tmp_path)
    flip_byte(path / "ema-0.safetensors", -1)
    for source in (tmp_path, path, path / "ema-0.safetensors"):
        with pytest.raises(ValueError, match=r"ema-0.safetensors is damaged, its SHA-256 differs"):
            load_network(source)
    # A copy elsewhere, beside somebody else's state.json, is nobody's to verify.
    (tmp_path / "copy").mkdir()
    (path / "ema-0.safetensors").rename(tmp_path / "copy" / "net.safetensors")
    (tmp_path / "copy" / "state.json").write_text("[1, 2]")
    load_network(tmp_path / "copy" / "net.safetensors")


def test_truncated_and_missing_files_are_refused(tmp_path):
    path = save(tmp_path)
    file = path / "optimizer.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"optimizer.safetensors must have {len(data)} bytes"):
        load_checkpoint(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"incomplete, optimizer.safetensors is missing"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"no such folder"):
        load_checkpoint(tmp_path / "nothing")


def test_newest_complete_checkpoint_is_taken_and_others_explained(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert find_checkpoints(tmp_path) == []
    oldest = save(tmp_path, phase="edm", images=9000, milestone=True)
    newest = save(tmp_path, phase="ect", images=64)  # fewer images, but later in the run
    assert newest_checkpoint(tmp_path) == newest

    broken = save(tmp_path, phase="ect", images=128)
    (broken / "state.json").unlink()
    cut = save(tmp_path, phase="ect", images=192)
    (cut / "model.safetensors").write_bytes(b"")
    unfinished = tmp_path / "checkpoints" / ".tmp-ect-000000256"
    unfinished.mkdir()
    found = {f.path: f for f in find_checkpoints(tmp_path)}
    assert [p for p, f in found.items() if f.ok] == [oldest, newest]
    assert "state.json is missing" in found[broken].reason
    assert "model.safetensors must have" in found[cut].reason
    assert "never completed" in found[unfinished].reason
    assert newest_checkpoint(tmp_path) == newest
    assert load_checkpoint(tmp_path).path == newest

    # The next one is the newest again, whatever lies about, and clears away what was never one.
    assert newest_checkpoint(tmp_path) != (latest := save(tmp_path, phase="ect", images=192))
    assert newest_checkpoint(tmp_path) == latest
    assert not unfinished.exists()
    assert cut.exists()


def test_run_without_complete_checkpoint_is_explained(tmp_path):
    (save(tmp_path) / "state.json").unlink()
    for load in (load_network, load_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"complete checkpoint \(.*state.json is missi"):
            load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither a network file nor a run"):
        load_network(tmp_path / "checkpoints")


def test_retention_keeps_the_newest_of_each_phase_and_milestones(tmp_path):
    for images in (64, 128, 192):
        save(tmp_path, phase="edm", images=images, keep=2)
    save(tmp_path, phase="edm", images=256, milestone=True)
    for images in (64, 128, 192):
        save(tmp_path, phase="ect", images=images, keep=1)
    save(tmp_path, phase="ect", images=192, keep=1, milestone=True)  # replaces its twin
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [
        "ect-000000192.2",
        "edm-000000128",
        "edm-000000192",
        "edm-000000256",
    ]
    with pytest.raises(ValueError, match=r"keep must be at least 1, got 0"):
        save(tmp_path, keep=0)


def fail_at_fsync(count):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == count:
            raise_no_space()
        real(descriptor)

    return fsync


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_disk_that_fills_leaves_the_previous_checkpoint(tmp_path, monkeypatch, count):
    previous = save(tmp_path, images=64)
    before = files_below(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_at_fsync(count))
        with pytest.raises(OSError, match=r"No space left") as caught:
            save(tmp_path, images=128)
    final = tmp_path / "checkpoints" / "ect-000000128"
    assert str(caught.value) == (
        f"checkpoint: could not be saved to {final}, No space left on device; the previous one at "
        f"{previous} is intact"
    )
    assert files_below(tmp_path) == before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [previous.name]
    assert newest_checkpoint(tmp_path) == load_checkpoint(previous).path
    assert save(tmp_path, images=128) == final


def test_first_checkpoint_that_cannot_be_written(tmp_path):
    """The file system's own refusal half-way through a file, not a simulated one."""
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old_limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*; there is no earlier one") as caught:
            save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_state_that_is_not_json_or_takes_a_name_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"JSON"):
        save(tmp_path, state={"tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"must not use the names files, sequence"):
        save(tmp_path, state={"files": {}, "sequence": 3})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_state_of_another_format_is_refused(tmp_path):
    path = save(tmp_path)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"format": 1', '"format": 7', 1))
    with pytest.raises(ValueError, match=r"state.json has to be of format 1, got 7"):
        load_checkpoint(path)


# ---- opening a run ------------------------------------------------------------------------------


def test_open_run(tmp_path):
    run = tmp_path / "run"
    assert open_run(run).path is None
    assert open_run(run, True).path is None
    path = save(run)
    assert open_run(run, True).path == open_run(run, "auto").path == path
    assert open_run(run, path).path == open_run(run, run).path == path
    assert open_run(tmp_path / "new", path).path == path
    with pytest.raises(FileExistsError, match=r"already holds a run; continue it with --resume"):
        open_run(run)
    save(tmp_path / "other")
    with pytest.raises(FileExistsError, match=r"holds another run than the checkpoint"):
        open_run(tmp_path / "other", path)
    with pytest.raises(FileNotFoundError, match=r"resume: no such folder"):
        open_run(run, tmp_path / "nothing")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"incomplete, model.safetensors is missing"):
        open_run(run, path)
    with pytest.raises(
        ValueError, match=r"none of the checkpoints in .* is sound .*model.safetens"
    ):
        open_run(run, True)
    with pytest.raises(FileNotFoundError, match=r"nor a run with a complete checkpoint"):
        open_run(run, run)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"must be a folder"):
        open_run(tmp_path / "file")


def test_damaged_and_unfinished_checkpoints_are_passed_over_and_named(tmp_path):
    oldest, middle, newest = (save(tmp_path, images=64 * i, keep=9) for i in (1, 2, 3))
    flip_byte(newest / "ema-0.safetensors", -1)
    (middle / "state.json").unlink()
    unfinished = tmp_path / "checkpoints" / ".tmp-ect-000000256"
    unfinished.mkdir()
    opened = open_run(tmp_path, "auto")
    assert opened.path == oldest
    why = {found.path: found.reason for found in opened.passed_over}
    assert why.keys() == {middle, newest, unfinished}
    assert "SHA-256 differs" in why[newest]
    assert "state.json is missing" in why[middle]
    assert "never completed" in why[unfinished]
    with pytest.raises(ValueError, match=r"ema-0.safetensors is damaged"):
        open_run(tmp_path, newest)


def test_the_best_stays(tmp_path):
    distances = {64: 3.0, 128: 1.0, 192: 2.0, 256: None, 320: 5.0}
    for images, distance in distances.items():
        metrics = {} if distance is None else {"frechet": distance}
        save(tmp_path, images=images, keep=1, best="frechet", state={"metrics": metrics})
    names = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["ect-000000128", "ect-000000320"]


def test_readers_and_the_writer_may_race(tmp_path):
    """A reader finds a whole network at any time, although the writer deletes what it reads."""
    save(tmp_path, images=64, keep=1)
    over = threading.Event()
    errors = []

    def write():
        try:
            for i in range(2, 40):
                save(tmp_path, images=64 * i, keep=1)
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not over.is_set():
        seen.add(load_network(tmp_path).info["images"])
        find_checkpoints(tmp_path)
    writer.join()
    assert not errors
    assert len(seen) > 1
