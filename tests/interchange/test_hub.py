"""Networks on the Hub: a stand-in of its HTTP interface on this machine takes and gives them."""

import base64
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import tiny, write_images

import tcm_fast
from tcm_fast.checkpoint import hub as downloads
from tcm_fast.checkpoint.format import save_network
from tcm_fast.cli.eval import run_config
from tcm_fast.cli.main import main
from tcm_fast.config import (
    CmtConfig,
    Config,
    DataConfig,
    EctConfig,
    EvalConfig,
    load_config,
    save_config,
)
from tcm_fast.interchange import hub
from tcm_fast.sampling.image_io import save_grid

TOKEN = "hf_averysecrettoken"
SPEC = {
    "img_resolution": 8, "img_channels": 1, "model_channels": 16, "channel_mult": [1], "num_blocks": 1,
    "attn_resolutions": [],
}  # fmt: skip
SPEC_OF_A_RUN = {
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "class_conditional": False,
}
INFO = {"phase": "tcm", "t_prime": 1.0, "images": 64, "iterations": 4, "class_names": []}


class Handler(BaseHTTPRequestHandler):
    """As much of the Hub as a small repository needs: every file is committed and served as it is."""

    def answer(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((path, self.headers.get("Authorization")))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if server.refuses:
            return self.answer({"error": f"{TOKEN} may not write"}, 403)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            server.created.append(wanted)
            repo = f"{wanted.get('organization', 'user')}/{wanted['name']}"
            return self.answer({"url": f"{server.address}/{repo}", "id": repo, "name": repo})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer({"files": modes})
        assert "/commit/" in path, path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            if entry["key"] == "deletedFile":
                del server.files[entry["value"]["path"]]
        answer = {"commitUrl": f"{server.address}/user/mine/commit/{server.sha}"}
        return self.answer({**answer, "commitOid": server.sha, "success": True})

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((path, self.headers.get("Authorization")))
        if "/user/mine" not in path:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if "/tree/" in path:
            return self.answer([
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in server.files.items()
            ])  # fmt: skip
        if path.startswith("/api/models/user/mine"):
            siblings = [{"rfilename": name} for name in server.files]
            return self.answer({"id": "user/mine", "sha": server.sha, "siblings": siblings})
        data = server.files.get(path.rpartition("/")[2])
        if data is None:
            return self.answer({}, 404, X_Error_Code="EntryNotFound")
        tag = hashlib.sha1(data).hexdigest()
        return self.answer(data, ETag=f'"{tag}"', X_Repo_Commit=server.sha)

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch, tmp_path):
    constants = pytest.importorskip(
        "huggingface_hub.constants",
        reason="huggingface_hub is not installed: pip install 'tcm-fast[hub]'",
    )
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    found.files, found.asked, found.created, found.refuses = {}, [], [], False
    found.sha, found.address = "1" * 40, f"http://127.0.0.1:{found.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    template = found.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path):
    """What a run leaves that `push` looks at."""
    folder = tmp_path / "runs" / "mine"
    (folder / "grids").mkdir(parents=True)
    net = tcm_fast.build_network("ddpmpp", **SPEC)
    save_network(folder / "model.safetensors", net, metadata=INFO)
    save_network(
        folder / "stage1.safetensors", net, metadata=INFO | {"phase": "ect", "t_prime": None}
    )
    data, judged = (
        DataConfig(source="/home/me/photos.zip:train"),
        EvalConfig(features="inception:/home/me/w.pth"),
    )
    ect = EctConfig(distance="manifold", features="/home/me/f.safetensors")
    cmt = CmtConfig(distance="manifold", features="/home/me/g.safetensors")
    save_config(Config(data=data, eval=judged, ect=ect, cmt=cmt, seed=11), folder / "config.json")
    save_grid(np.zeros((4, 8, 8, 1), np.uint8), folder / "grids/tcm-000000064.png", 2)
    events = [
        {"event": "eval", "phase": "ect", "images": 64, "frechet": {"1": 9.0}},
        {"event": "eval", "phase": "tcm", "images": 64, "frechet": {"1": 2.25, "2": 1.5}},
    ]
    text = "".join(json.dumps(event) + "\n" for event in events) + '{"event": "tra'
    (folder / "log.jsonl").write_text(text)
    return folder


def test_there_and_back(server, run, tmp_path, capfd):
    network = str(run / "model.safetensors")
    with pytest.raises(SystemExit) as end:
        main(["push", network, "user/mine", "--license", "apache-2.0"])
    assert end.value.code == 0
    assert set(server.files) == set(downloads.FILES)
    assert (
        server.created[0].get("private") is True or server.created[0].get("visibility") == "private"
    )
    net = tcm_fast.load_network("hf:user/mine")
    own = tcm_fast.load_network(network)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), own.parameters(), strict=True))
    assert net.info["t_prime"] == 1.0
    assert net.source.with_name("stage1.safetensors").is_file()  # for noise levels below
    for argv in (
        ["pull", "user/mine", "--out", str(tmp_path / "pulled")],
        ["sample", "hf:user/mine", "--num", "4", "--out", str(tmp_path / "samples.png")],
    ):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
    assert (tmp_path / "samples.png").is_file()
    assert set(downloads.FILES) <= {path.name for path in (tmp_path / "pulled").iterdir()}
    assert any(sent == f"Bearer {TOKEN}" for _, sent in server.asked)
    assert TOKEN not in "".join(capfd.readouterr())
    assert not any(TOKEN.encode() in data for data in server.files.values())


@pytest.fixture
def pushed(server, run):
    hub.push(run / "model.safetensors", "user/mine")
    (run / "model.safetensors").unlink()
    return "hf:user/mine"


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--features", "random", "--steps", "1", "--num", "8"],
        ["search-times", "--features", "random", "--num", "8"],
        ["doctor", "--num", "4", "--precision"],
    ],
    ids=lambda command: command[0],
)
def test_commands_take_one_of_the_hub(command, pushed, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, pushed, "--data", str(write_images(tmp_path)), "--device", "cpu"])
    assert end.value.code == 0
    assert pushed in capsys.readouterr().out


def test_a_run_starts_from_one_of_the_hub(pushed, tmp_path, capsys):
    config = tiny(write_images(tmp_path), phases=["ect"], network=SPEC_OF_A_RUN, ect={"images": 16})
    trainer = tcm_fast.Trainer(config, tmp_path / "out", init=pushed)
    assert trainer.init is not None
    assert trainer.init.info["phase"] == "tcm"
    trainer.run()


def test_the_configuration_lies_beside_the_file_in_the_cache(pushed):
    file = downloads.local_path(pushed)
    assert run_config(file).seed == 11
    assert downloads.local_path("runs/mine") == Path("runs/mine")


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_downloaded_configuration_names_no_files(
    server, pushed, where, tmp_path, monkeypatch, capsys
):
    """Features are read by torch.jit.load, which runs what is in the file."""
    monkeypatch.chdir(tmp_path)
    folder = downloads.pull(pushed, None if where == "cache" else tmp_path / "pulled")
    taken = run_config(folder / "model.safetensors")
    assert (taken.eval.features, taken.data.source) == ("", "")
    with pytest.raises(SystemExit):
        main(["eval", str(folder / "model.safetensors"), "--device", "cpu"])
    assert "no images to compare with, give --data" in capsys.readouterr().err


def test_pull_overwrites_nothing(server, pushed, tmp_path):
    (folder := tmp_path / "checkout").mkdir()
    (folder / "README.md").write_text("mine")
    asked = len(server.asked)
    with pytest.raises(FileExistsError, match=r"already holds README\.md"):
        downloads.pull("user/mine", folder)
    assert len(server.asked) == asked
    with pytest.raises(OSError, match="hub: user/none: "):
        downloads.pull("user/none", folder / "new")
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["user/mine", "hf:user/mine", "user/mine@main", "hf:user/mine@main"]
)
def test_names_that_pull_takes(pushed, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["pull", name])
    assert end.value.code == 0
    assert (tmp_path / "mine/model.safetensors").is_file()


def test_a_second_push_takes_away_what_the_first_left(server, pushed, run, tmp_path):
    server.files["notes.txt"] = b"the user's own"
    alone = tmp_path / "alone.safetensors"
    save_network(alone, tcm_fast.build_network("ddpmpp", **SPEC), metadata=INFO)
    hub.push(alone, "user/mine")
    assert set(server.files) == {"model.safetensors", "README.md", "notes.txt"}


def test_the_card_has_the_runs_own_numbers_and_no_paths(server, run, tmp_path):
    (folder := tmp_path / "folder").mkdir()
    hub.write_folder(run / "model.safetensors", folder, "user/mine", "mit")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in ("license: mit", "library_name: tcm_fast", "2.25", "2 steps | 1.5", "tcm, 64 images",
                 "photos.zip:train", "inception:w.pth", "![Samples](samples.png)", "t ≥ 1"):  # fmt: skip
        assert text in card
    assert "| 9 " not in card
    assert not any(
        "/home/me" in (folder / name).read_text() for name in ("README.md", "config.json")
    )
    assert load_config(folder / "config.json").data.source == "photos.zip:train"


def test_a_network_file_alone(server, run, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "model.safetensors").read_bytes())
    (folder := tmp_path / "folder").mkdir()
    hub.write_folder(alone, folder, "user/mine")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]


def test_what_the_hub_refuses_is_one_sentence_without_the_token(server, run, capsys):
    server.refuses = True
    with pytest.raises(SystemExit) as end:
        main(["push", str(run / "model.safetensors"), "user/mine"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "hub: user/mine: " in said
    assert said.count("\n") == 1
    assert TOKEN not in said
    with pytest.raises(OSError, match="hub: user/none: "):
        tcm_fast.load_network("hf:user/none")


def test_another_repository_is_refused(server):
    server.files["pytorch_model.bin"] = b"pickled"
    with pytest.raises(ValueError, match="holds no network of tcm_fast"):
        downloads.pull("user/mine")
    assert not any("pytorch_model.bin" in path for path, _ in server.asked)


@pytest.mark.parametrize("repo", ["mine", "user/mine/more", "../mine", "user/mi ne", ""])
def test_names_of_repositories(repo):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    with pytest.raises(ValueError, match="hub: a repository is named user/repo, got"):
        downloads.pull(repo)


def test_without_the_package_the_extra_is_named(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: tcm_fast.load_network("hf:user/mine"), lambda: hub.push(run, "user/mine")):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'tcm-fast\[hub\]'"):
            call()
    assert tcm_fast.load_network(run / "model.safetensors").info["phase"] == "tcm"
