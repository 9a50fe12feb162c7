"""Other people's files: read as data, whatever is in them."""

import ast
import codecs
import io
import pickle
import re
import struct
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import snapshots_of_others as theirs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tcm_fast
from tcm_fast.interchange import convert, safe_pickle, torch_format

ROOT = Path(__file__).parents[2]

# ---- nothing runs -------------------------------------------------------------------------------

FORBIDDEN = {
    "pickle.find_class", "exec", "compile", "os.system", "os.exec", "os.spawn", "os.posix_spawn",
    "os.putenv", "os.remove", "os.rename", "os.mkdir", "subprocess.Popen", "socket.connect",
    "ctypes.dlopen", "shutil.rmtree",
}  # fmt: skip
_watched = []
for codec in ("cp437", "raw_unicode_escape", "unicode_escape", "ascii", "latin1"):
    codecs.lookup(codec)  # Python imports them at their first use


def _audit(event, arguments):
    if _watched and event in FORBIDDEN:
        _watched[-1].append((event, arguments))


sys.addaudithook(_audit)


@pytest.fixture
def nothing_runs():
    """Fails where the test compiled, imported through a pickle, or started anything."""
    _watched.append([])
    yield
    assert _watched.pop() == []


def read_bytes(data, tmp_path, name="file.pkl"):
    path = tmp_path / name
    path.write_bytes(data)
    return torch_format.read(path)


def refused(data, tmp_path, match):
    """The file is refused, in one sentence, and nothing in it runs."""
    _watched.append([])
    try:
        with pytest.raises(ValueError, match=match) as caught:
            read_bytes(data, tmp_path)
    finally:
        happened = _watched.pop()
    assert happened == []
    assert len(str(caught.value)) < 500
    assert str(caught.value).startswith("convert: ")


def tiny(name="ddpmpp", **options):
    torch.manual_seed(3)
    options = {"img_resolution": 8, "img_channels": 3, "model_channels": 16, "num_blocks": 1,
               "channel_mult": [1, 2], "attn_resolutions": [4]} | options  # fmt: skip
    net = tcm_fast.build_network(name, **options).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    return net


def denoised(net):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    with torch.no_grad():
        return net(x, torch.tensor([80.0, 0.7]), labels)


KINDS = {
    "ddpmpp": {},
    "ddpmpp, classes and augmentation": {"label_dim": 10, "augment_dim": 9},
    "ncsnpp": {},
    "adm": {"model_channels": 64, "label_dim": 4},
    "edm2": {"model_channels": 64, "label_dim": 4, "logvar_channels": 8},
}


@pytest.fixture
def others(monkeypatch):
    theirs.install(monkeypatch)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_snapshots(kind, protocol, others, tmp_path):
    net = tiny(kind.split(",")[0], **KINDS[kind])
    is_edm2 = kind == "edm2"
    if is_edm2:
        net = net.half()
    path = tmp_path / "network-snapshot-000123.pkl"
    path.write_bytes(theirs.snapshot(
        net, "Precond" if is_edm2 else "EDMPrecond", loss="EDM2Loss" if is_edm2 else "EDMLoss",
        rename={"model": "unet"} if is_edm2 else None, protocol=protocol,
        options={"img_resolution": 8, "dropout": 0.25, "label_dim": net.label_dim},
    ))  # fmt: skip
    out = tmp_path / "net.safetensors"
    summary = convert.convert(path, out)
    found = tcm_fast.load_network(out)
    assert torch.equal(denoised(found), denoised(net.float()))
    assert found.spec["name"] == kind.split(",")[0]
    assert found.spec["dropout"] == 0.25
    assert found.info["phase"] == "edm"
    assert found.info["images"] == 123_000
    for name in ("img_resolution", "label_dim", "model_channels", "channel_mult", "num_blocks"):
        assert found.spec[name] == net.spec[name], name
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in str(summary)
    assert ("float16" in str(summary)) == is_edm2


def as_fastgen(net):
    state = {re.sub("^model", "unet", name): v for name, v in net.state_dict().items()}
    state = {name: v.reshape(1) if v.ndim == 0 else v for name, v in state.items()}
    broken = {name: torch.zeros_like(v) for name, v in state.items()}
    return {
        "model": {"net": broken, "ema": state},
        "optimizer": {"net": {"state": {}}},
        "iteration": 7,
    }


FILES = {
    "state dict": lambda net: net.state_dict(),
    "of DistributedDataParallel": lambda net: {f"module.{k}": v for k, v in net.state_dict().items()},
    "raw network": lambda net: net.model.state_dict(),
    "training state": lambda net: {"net": net.state_dict(), "optimizer_state": {"state": {0: {"step": 3}}}},
    "EDM2 training state": lambda net: {
        "state": {"cur_nimg": 5}, "net": {k: 0 * v for k, v in net.state_dict().items()},
        "ema": {"stds": [0.05, 0.1], "emas": [net.state_dict()] * 2},
    },
    "FastGen": as_fastgen,
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("form", FILES)
def test_files_of_torch_save(form, zipped, tmp_path):
    net = tiny("edm2", model_channels=64)
    path = tmp_path / "net.pth"
    torch.save(FILES[form](net), path, _use_new_zipfile_serialization=zipped)
    summary = convert.convert(path, tmp_path / "net.safetensors", phase="tcm", t_prime=1.5)
    found = tcm_fast.load_network(tmp_path / "net.safetensors")
    assert torch.equal(denoised(found), denoised(net))
    assert (found.info["phase"], found.info["t_prime"]) == ("tcm", 1.5)
    assert "trained as: tcm, t' = 1.5" in str(summary)
    if form == "EDM2 training state":
        assert summary.found.weights == "ema-0.05"
        assert summary.found.others == ["ema-0.1", "net"]


def test_training_states_hold_persistent_objects_too(others, tmp_path):
    net = tiny()
    data = {"net": theirs.as_module(net, "ECMPrecond", {}), "optimizer_state": {"param_groups": []}}
    for zipped in (True, False):
        torch.save(
            data, tmp_path / "training-state-000001.pt", _use_new_zipfile_serialization=zipped
        )
        found, about = convert.load_foreign(tmp_path / "training-state-000001.pt")
        assert torch.equal(denoised(found), denoised(net))
        assert about.preconditioning == "ECMPrecond"


def test_phases_of_snapshots(others, tmp_path):
    net, path = tiny(), tmp_path / "network-snapshot-000200.pkl"
    cases = [
        ({"loss": "EDMLoss"}, ("edm", None, 200_000)),
        ({"loss": "ECMLoss", "class_name": "ECMPrecond"}, ("ect", None, 0)),
        ({"loss": "ECMLoss", "loss_state": {"t_lower": 0.002}}, ("ect", None, 0)),
        ({"loss": "ECMLoss", "loss_state": {"t_lower": 1.0}}, ("tcm", 1.0, 0)),
        ({"loss": None}, ("edm", None, 200_000)),
        ({"loss": None, "class_name": "ECMPrecond"}, (None, None, 0)),
    ]
    for options, expected in cases:
        path.write_bytes(theirs.snapshot(net, **options))
        summary = convert.convert(path, tmp_path / "net.safetensors", overwrite=True)
        info = summary.info
        assert (info["phase"], info["t_prime"], info["images"]) == expected
    assert "unknown: give --phase" in str(summary)


def test_stage_1_starts_from_a_converted_network(others, tmp_path):
    from tcm_fast.training.phase import load_weights

    net = tiny(augment_dim=9)
    (tmp_path / "a.pkl").write_bytes(theirs.snapshot(net))
    convert.convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    student = tiny()
    load_weights(student, tcm_fast.load_network(tmp_path / "a.safetensors"), "ect")
    assert torch.equal(denoised(student), denoised(net))


# ---- what is not ours -----------------------------------------------------------------------------


def convert_fails(net_or_bytes, tmp_path, match, **options):
    path = tmp_path / "network-snapshot-1.pkl"
    data = (
        net_or_bytes
        if isinstance(net_or_bytes, bytes)
        else theirs.snapshot(net_or_bytes, **options)
    )
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match):
        convert.convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_other_networks_are_refused_by_what_they_differ_in(others, tmp_path):
    for class_name in ("VPPrecond", "VEPrecond", "iDDPMPrecond"):
        convert_fails(
            tiny(), tmp_path, f"its preconditioning is {class_name}", class_name=class_name
        )
    edm2 = tiny("edm2", model_channels=64)
    options = {"res_balance": 0.5}
    convert_fails(edm2, tmp_path, "its res_balance is '0.5', ours 0.3", options=options)
    options = {"img_resolution": 16}
    convert_fails(
        tiny(), tmp_path, "img_resolution is '?16'? by its arguments, 8 by", options=options
    )
    extra = tiny()
    extra.model.enc["8x8_block0"].register_buffer("more", torch.zeros(1))
    convert_fails(extra, tmp_path, "8x8_block0.more is unknown")
    less = tiny()
    del less.model.map_layer1
    convert_fails(less, tmp_path, "no model.map_layer1.weight")
    convert_fails(pickle.dumps({"a": 1}), tmp_path, "it holds no network")
    convert_fails(
        tiny(), tmp_path, "sigma_data is 'half', not a number", options={"sigma_data": "half"}
    )


def test_wrong_arguments(tmp_path, others):
    path = tmp_path / "a.pkl"
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert.convert(path, tmp_path / "b.safetensors")
    path.write_bytes(theirs.snapshot(tiny()))
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert.convert(path, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="phase: must be edm, ect or tcm, got cd"):
        convert.convert(path, tmp_path / "b.safetensors", phase="cd")
    with pytest.raises(ValueError, match="t_prime: belongs to phase tcm"):
        convert.convert(path, tmp_path / "b.safetensors", t_prime=1.0)
    with pytest.raises(ValueError, match="it has no network 'net', but ema"):
        convert.convert(path, tmp_path / "b.safetensors", weights="net")
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(FileExistsError, match="add --overwrite"):
        convert.convert(path, tmp_path / "b.safetensors")


# ---- hostile files --------------------------------------------------------------------------------


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments, state)

    def __reduce__(self):
        return self.parts


def text_global(name):
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


HARMFUL = [
    "os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec",
    "builtins.__import__", "builtins.open", "importlib.import_module", "runpy.run_path",
    "torch.load", "torch.hub.load", "torch.ops.load_library", "torch.jit.load", "pickle.loads",
    "numpy.load", "operator.attrgetter", "functools.partial", "shutil.rmtree",
    "torch.storage._get_dtype_from_pickle_storage_type", "torch._utils._rebuild_wrapper_subclass",
    "dnnlib.util.call_func_by_name", "dnnlib.util.open_url", "torch_utils.custom_ops.get_plugin",
    "types.FunctionType", "types.CodeType", "tcm_fast.interchange.convert.convert", "builtins.type",
    "code.interact", "pty.spawn", "timeit.timeit", "weakref.finalize", "torch.os.system",
    "torch.nn.modules.os.system",
]  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_calls_are_refused_by_name(name, tmp_path):
    call = text_global(name) + b"(X\x04\x00\x00\x00echotR."
    refused(call, tmp_path, f"{re.escape(name)}'?,? ")
    refused(b"\x80\x04" + call[:-2] + b"\x81.", tmp_path, re.escape(name))  # NEWOBJ
    module, _, last = name.rpartition(".")
    stacked = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, last))
    refused(b"\x80\x04" + stacked + b"\x93)R.", tmp_path, re.escape(name))


def test_calls_in_every_container(tmp_path):
    evil = Call(__import__("os").system, "echo")
    for wrapped in ([evil], {"ema": evil}, (evil,), {"ema": {"enc": [evil]}}):
        refused(pickle.dumps(wrapped, 4), tmp_path, r"(posix|nt)\.system'?, which is not data")
        buffer = io.BytesIO()
        torch.save(wrapped, buffer)
        refused(buffer.getvalue(), tmp_path, r"\.system'?, which is not data")
        buffer = io.BytesIO()
        torch.save(wrapped, buffer, _use_new_zipfile_serialization=False)
        refused(buffer.getvalue(), tmp_path, r"\.system'?, which is not data")
        # As the storage of a tensor in a plain pickle.
        inner = Call(torch.storage._load_from_bytes, buffer.getvalue())
        refused(pickle.dumps(inner, 4), tmp_path, r"\.system'?, which is not data")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"ios\nsystem\n.", "operation INST"),
        (b"(cos\nsystem\nX\x04\x00\x00\x00echoo.", "os.system"),
        (b"\x82\x01.", "operation EXT1|damaged"),
        (b"Pid\n.", "operation PERSID"),
        (b"\x80\x02X\x02\x00\x00\x00idQ.", "something outside itself"),
        (b"\x80\x05\x97.", "operation NEXT_BUFFER"),
        (b"\x80\x04}\x94\x8c\x09__class__\x8c\x01xs}b.", "gives attributes|damaged|refers|nothing|^convert"),
        (b"\x80\x04]}b.", "gives attributes to something of type list"),
        (b"cbuiltins\nset\n}b.", "gives attributes to something of type Global"),
        (b"cbuiltins\ngetattr\n(]X\x06\x00\x00\x00appendtR.", "getattr has an argument of type list"),
        (b"X\x04\x00\x00\x00echo)R.", "calls something of type str"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\ntR.", "os.system"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00zip" b"tR.", "the encoding 'zip'"),
        (b"}])s.", "a dictionary has a key of type|damaged|an assignment"),
        (b"R.", "damaged"),
        (b".", "damaged"),
        (b"g5\n.", "damaged"),
        (b"", "truncated|damaged"),
        (b"\x00\x01\x02", "damaged"),
        (b"<html><body>404</body></html>", "damaged"),
    ],
)  # fmt: skip
def test_hand_made_streams(data, match, tmp_path):
    if b"__class__" in data:
        assert read_bytes(data, tmp_path) == {"__class__": "x"}  # a word like any other
        return
    refused(data, tmp_path, match)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**60), "truncated: 1152921504606846976 bytes"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40), "truncated: 1099511627776 bytes"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40), "truncated|damaged"),
        (b"B" + struct.pack("<I", 2**32 - 1), "truncated: 4294967295 bytes"),
        (b"\x8b" + struct.pack("<i", 2**31 - 1), "truncated: 2147483647 bytes"),
        (b"X" + struct.pack("<I", 2**31) + b"a", "truncated: 2147483648 bytes"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", None),  # a frame is only a hint
        (b"Nr" + struct.pack("<I", 2**32 - 1) + b".", None),  # a memo's index is only a name
        (b"I" + b"9" * 100_000 + b"\n.", "damaged"),
        (b"V" + b"a" * 3_000_000, "a line without end"),
    ],
)
def test_huge_lengths_allocate_nothing(data, match, tmp_path):
    import tracemalloc

    tracemalloc.start()
    try:
        if match is None:
            assert read_bytes(data, tmp_path) is None
        else:
            refused(data, tmp_path, match)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def storage_reference(count, kind=b"FloatStorage", key=b"0"):
    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s

    return (b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(key) + text(b"cpu")
            + b"\x8a\x08" + struct.pack("<q", count) + b"tQ")  # fmt: skip


def archive(pickled, members=(), **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in members:
            file.writestr(name, data)
    return buffer.getvalue()


def tensor_pickle(count, offset, shape, stride):
    numbers = "".join(f"L{n}L\n" for n in (offset,)).encode()
    sizes = [
        b"(" + b"".join(f"L{n}L\n".encode() for n in values) + b"t" for values in (shape, stride)
    ]
    return (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage_reference(count) + numbers
            + sizes[0] + sizes[1] + b"\x89}tR.")  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        ((4, 0, (2**40,), (0,)), "out of range|larger than its storage"),
        ((4, 0, (1000, 1000), (0, 0)), "larger than its storage of 4"),
        ((4, 2, (3,), (1,)), "larger than its storage of 4"),
        ((4, 5, (0,), (1,)), "not that of a tensor"),
        ((4, 0, (-1,), (1,)), "out of range"),
        ((4, 0, (2,), (-1,)), "out of range"),
        ((4, 0, (1,) * 17, (1,) * 17), "out of range"),
        ((4, -1, (2,), (1,)), "not that of a tensor"),
        ((2**60, 0, (2,), (1,)), "unknown form"),
        ((2**30, 0, (2,), (1,)), "has another size"),
    ],
)
def test_tensors_that_are_larger_than_the_file(layout, match, tmp_path):
    refused(archive(tensor_pickle(*layout), [("archive/data/0", bytes(16))]), tmp_path, match)


def test_a_tensor_in_an_archive_made_by_hand(tmp_path):
    data = struct.pack("<4f", 1, 2, 3, 4)
    found = read_bytes(
        archive(tensor_pickle(4, 1, (2,), (2,)), [("archive/data/0", data)]), tmp_path
    )
    assert found.load().tolist() == [2, 4]


@pytest.mark.parametrize(
    ("members", "options", "match"),
    [
        ([("../../evil", b"x")], {}, "a member with the path '../../evil'"),
        ([("/etc/evil", b"x")], {}, "a member with the path"),
        ([("archive/..\\evil", b"x")], {}, "a member with the path"),
        ([("C:/evil", b"x")], {}, "a member with the path"),
        (
            [("archive/data/0", bytes(10_000_000))],
            {"compression": zipfile.ZIP_DEFLATED},
            "compressed",
        ),
        ([("other/data.pkl", b"N.")], {}, "not one of torch.save"),
        ([("archive/byteorder", b"big")], {}, "little-endian"),
    ],
)
def test_archives(members, options, match, tmp_path):
    refused(archive(b"\x80\x02N.", members, **options), tmp_path, match)


def test_archives_that_lie(tmp_path, recwarn):
    whole = archive(tensor_pickle(4, 0, (4,), (1,)), [("archive/data/0", bytes(16))])
    refused(
        archive(tensor_pickle(4, 0, (4,), (1,))), tmp_path, "its archive lacks 'archive/data/0'"
    )
    refused(
        archive(b"\x80\x02N.", [("archive/data/0", b"a"), ("archive/data/0", b"b")]),
        tmp_path,
        "overlap",
    )
    for end in (10, len(whole) // 2, len(whole) - 1):
        refused(whole[:end], tmp_path, "its archive is damaged")
    for position in range(len(whole)):  # sizes, offsets, checksums, names, contents
        broken = bytearray(whole)
        broken[position] ^= 0xFF
        with suppress(ValueError):
            value = read_bytes(bytes(broken), tmp_path)
            if isinstance(value, torch_format.FileTensor):
                value.load()


def test_nests_and_bombs(tmp_path, others):
    depth = 200_000
    assert isinstance(read_bytes(b"]" * depth + b"a" * (depth - 1) + b".", tmp_path), list)
    # Thirty doublings: 2^30 leaves in a handful of objects, which nobody may walk or hash.
    laughs = b")" + b"2\x86" * 40
    assert isinstance(read_bytes(b"\x80\x04" + laughs + b".", tmp_path), tuple)
    refused(b"\x80\x04}" + laughs + b"Ns.", tmp_path, "a dictionary has a key of type tuple")
    refused(b"\x80\x04\x8f(" + laughs + b"\x90.", tmp_path, "a dictionary has a key of type tuple")
    module = theirs.Persistent("Leaf", {"_modules": {}, "_parameters": {}, "_buffers": {}})
    for _ in range(38):
        module = theirs.Persistent("Twice", {"_modules": {"a": module, "b": module}})
    network = theirs.Persistent("EDMPrecond", {"_modules": {"enc": module}})
    convert_fails(pickle.dumps({"ema": network}), tmp_path, "nested too deeply")
    loop = {}
    loop["ema"] = theirs.Persistent("EDMPrecond", {"_modules": {"enc": None}})
    loop["ema"].meta["state"]["_modules"]["again"] = theirs.Persistent(
        "A", loop["ema"].meta["state"]
    )
    convert_fails(
        pickle.dumps(loop), tmp_path, "nested too deeply|holds no network|no first convolution"
    )


# Forty doublings through the memo, as a pickler would write them; the last is number 40.
DOUBLED = b"(" + b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(40)) + b"1h\x28"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"}" + DOUBLED + b"Ns.", "a dictionary has a key of type tuple"),
        (b"}(" + DOUBLED + b"Nu.", "a dictionary has a key of type tuple"),
        (b"(" + DOUBLED + b"Nd.", "a dictionary has a key of type tuple"),
        (b"\x8f(" + DOUBLED + b"\x90.", "a dictionary has a key of type tuple"),
        (b"(" + DOUBLED + b"\x91.", "a dictionary has a key of type tuple"),
        (b"cbuiltins\nset\n(]" + DOUBLED + b"atR.", "a dictionary has a key of type tuple"),
        (b"ccollections\nOrderedDict\n(]" + DOUBLED + b"N\x86atR.", "a key of type tuple"),
        (b"cdnnlib.util\nEasyDict\n)\x81" + DOUBLED + b"Ns.", "a key of type tuple"),
        # A look-up in our own tables, by a record that only says that it is a dtype.
        (
            b"cnumpy.core.multiarray\nscalar\n("
            b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}("
            b"\x8c\x04type\x8c\x05class\x8c\x0aclass_name\x8c\x0bnumpy.dtype\x8c\x05state}"
            b"\x8c\x04name" + DOUBLED + b"sutRC\x01atR.",
            "a NumPy scalar is of type tuple",
        ),
    ],
)  # fmt: skip
def test_nothing_nested_is_hashed(data, match, tmp_path):
    refused(b"\x80\x04" + data, tmp_path, match)


def test_integers_of_one_hash_are_no_keys(tmp_path):
    one_hash = {k * (2**61 - 1): None for k in range(3)}
    assert len(set(map(hash, one_hash))) == 1
    refused(pickle.dumps(one_hash, 4), tmp_path, "a key of more than 60 bits")
    refused(pickle.dumps({-(2**70)}, 4), tmp_path, "a key of more than 60 bits")
    small = {0: 1, -5: 2, 2**60 - 1: 3, True: 4}
    assert read_bytes(pickle.dumps(small, 4), tmp_path) == small


@pytest.mark.parametrize(
    "keys", [DOUBLED, b"K\x00", b"\x8b" + struct.pack("<i", 5000) + b"\x01" * 5000]
)
def test_keys_of_a_stream_are_names(keys, tmp_path):
    head = b"".join(
        pickle.dumps(value, 2)
        for value in (torch_format.STREAM_MAGIC, 1001, {"little_endian": True}, None)
    )
    refused(head + b"\x80\x04]" + keys + b"a.", tmp_path, "no list of names")


STAND_INS = {
    "a name": b"cbuiltins\nset\n",
    "a dtype's class": b"ctorch\nfloat32\n",
    "a method": (b"cbuiltins\ngetattr\n(ctraining.networks\nB\n)\x81\x8c\x01atR"),
    "a tuple": b")",
    "a number": b"K\x01",
    "a text": b"\x8c\x01a",
}


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize("state", [b"}", b"N}\x86", b"N}\x8c\x08__call__Ns\x86"])
def test_stand_ins_have_no_attributes_to_be_set(kind, state, tmp_path):
    refused(
        b"\x80\x04" + STAND_INS[kind] + state + b"b.", tmp_path, "gives attributes to something"
    )


def test_attributes_of_a_record_are_words(tmp_path):
    """Those that Python would call, or that the record itself has, are kept as any other."""
    names = [
        "kind",
        "state",
        "source",
        "__setstate__",
        "__class__",
        "__reduce__",
        "__del__",
        "__dict__",
    ]
    values = b"".join(b"\x8c" + bytes([len(n)]) + n.encode() + b"K\x07" for n in names)
    data = b"\x80\x04ctraining.networks\nB\n)\x81N}(" + values + b"u\x86b}b."
    found = read_bytes(data, tmp_path)
    assert type(found) is safe_pickle.Record
    assert found.kind == "B"
    assert found.state == dict.fromkeys(names, 7)


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_registered_extensions_are_not_looked_up(opcode, tmp_path, monkeypatch):
    import copyreg

    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 1, __import__("os").system)
    refused(b"\x80\x04" + opcode + b"\x8c\x04echo\x85R.", tmp_path, "operation EXT|damaged")


def test_buffers_that_are_not_saved_are_a_set(tmp_path, others):
    network = theirs.as_module(tiny(), "EDMPrecond", {})
    network.meta["state"]["_non_persistent_buffers_set"] = 5
    network.meta["state"]["_buffers"] = {"a": torch.ones(1)}
    convert_fails(pickle.dumps({"ema": network}), tmp_path, "_non_persistent_buffers_set is no set")


def test_truncated_anywhere(tmp_path, others):
    data = theirs.snapshot(
        tiny(model_channels=4, channel_mult=[1], attn_resolutions=[]), protocol=4
    )
    for end in [*range(0, 300), *range(300, len(data) - 1, 997), len(data) - 1]:
        refused(data[:end], tmp_path, "truncated|damaged|not the|holds|archive")
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    for end in range(len(buffer.getvalue())):
        refused(buffer.getvalue()[:end], tmp_path, "truncated|damaged|storage")


@pytest.fixture(scope="module")
def small_files():
    """A snapshot, an archive and a stream to be damaged."""
    patch = pytest.MonkeyPatch()
    theirs.install(patch)
    net = tiny(model_channels=4, channel_mult=[1], attn_resolutions=[])
    files = [theirs.snapshot(net, protocol=protocol) for protocol in (2, 4)]
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"net": net.state_dict()}, buffer, _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    patch.undo()
    return files


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(data, small_files, tmp_path_factory):
    original = data.draw(st.sampled_from(small_files))
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly in the first part, where the structure is.
        at = data.draw(st.integers(0, min(len(changed), 4000) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(changed)
    _watched.append([])
    with suppress(ValueError):
        convert.load_foreign(path)
    assert _watched.pop() == []


OPCODES = [op.code.encode("latin1") for op in __import__("pickletools").opcodes]
PIECES = st.one_of(
    st.sampled_from(OPCODES),
    st.binary(max_size=6),
    st.sampled_from([text_global(f"{m}.{n}") for m, n in safe_pickle.CALLS]),
    st.sampled_from(
        [b"X\x01\x00\x00\x00a", b"K\x01", b")", b"}", b"]", b"(", b"t", b"R", b"b", b"0"]
    ),
)


@settings(max_examples=400)
@given(st.lists(PIECES, max_size=40))
def test_any_stream_of_operations_is_refused_or_read(pieces):
    _watched.append([])
    machine = safe_pickle.Machine(calls=torch_format.TENSOR_CALLS)
    with suppress(safe_pickle.Refused):
        machine.run(io.BytesIO(b"".join(pieces) + b"."))
    assert _watched.pop() == []


def test_shapes_allocate_nothing_before_they_fit(tmp_path):
    """A few megabytes that call for a network of terabytes."""
    state = tiny().state_dict()
    wide = 1_000_000
    state["model.enc.8x8_conv.weight"] = torch.zeros(wide, 3, 1, 1)
    state["model.map_layer0.weight"] = torch.zeros(4 * wide, 1)
    for index in ("8x8_block0", "4x4_block0"):
        state[f"model.enc.{index}.conv1.weight"] = torch.zeros(wide, 1, 1, 1)
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(
        ValueError, match=r"not the ddpmpp that it looks like|no multiples|cannot be"
    ):
        convert.load_foreign(tmp_path / "wide.pth")
    state = tiny().state_dict() | {"model.enc.8x8_conv.weight": torch.zeros(2**39, 3, 0, 0)}
    torch.save(state, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"cannot be built|no multiples|looks like"):
        convert.load_foreign(tmp_path / "empty.pth")


def test_arguments_out_of_a_file_are_not_printed_in_full(others, tmp_path):
    laughs = ()
    for _ in range(40):
        laughs = (laughs, laughs)
    for name in ("img_resolution", "sigma_data", "dropout_resolutions", "label_dropout"):
        convert_fails(tiny(), tmp_path, "is tuple", options={name: laughs})
    state = {**tiny().state_dict(), "model.\x1b[31m": torch.zeros(1)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a weight has the name") as caught:
        convert.load_foreign(tmp_path / "a.pth")
    assert "\x1b" not in str(caught.value)


def test_names_out_of_a_file_are_shown_harmlessly(tmp_path):
    name = b"c\x1b[31mevil\n" + b"x" * 5000 + b"\n"
    path = tmp_path / "a"
    path.write_bytes(name + b")R.")
    with pytest.raises(ValueError, match="which is not data") as caught:
        torch_format.read(path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


# ---- nowhere in the project -------------------------------------------------------------------------

SOURCES = [
    path
    for folder in ("tcm_fast", "kernels", "benchmarks", "tests", "examples", ".")
    for path in sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))
]
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {"load", "loads", "Unpickler", "open"}
# A stand-in for a library that does; the project hands that only what it has checked.
ALLOWED = {("test_features.py", "torch.load")}


def unsafe_calls(tree):
    """Names of the calls that could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name in LOADERS)
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        name = ast.unparse(node.func)
        owner, _, last = name.rpartition(".")
        if owner in UNPICKLERS and last in LOADERS:
            yield name
        if (
            name in ("torch.load", "torch.serialization.load")
            and keywords.get("weights_only") is not True
        ):
            yield name
        if keywords.get("allow_pickle") is True:
            yield name


def test_nothing_is_unpickled_in_full_anywhere():
    assert len(SOURCES) > 60
    found = {
        (path.name, name)
        for path in SOURCES
        for name in unsafe_calls(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found <= ALLOWED


def test_that_would_be_noticed():
    for text in (
        "pickle.load(f)", "from pickle import loads", "torch.load(p)", "pickle.Unpickler(f)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)",
    ):  # fmt: skip
        assert list(unsafe_calls(ast.parse(text))), text
    assert not list(unsafe_calls(ast.parse("torch.load(p, weights_only=True); pickle.dumps(x)")))


def test_the_guard_trips(monkeypatch):
    monkeypatch.setattr(torch_format, "pickle", pickle, raising=False)
    code = compile("pickle.loads(b'N.')", "x", "eval")
    with pytest.raises(AssertionError, match="unpickles"):
        eval(code, {"pickle": pickle, "__name__": "tcm_fast.anything"})
