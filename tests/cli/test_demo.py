"""`tcm-fast demo`: the page's pictures are those of `sample`, in a client's hands and in a browser."""

import io
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import tcm_fast
from tcm_fast.cli import demo
from tcm_fast.cli.main import main
from tcm_fast.sampling.image_io import grid


def network(label_dim=3, **info):
    net = tcm_fast.build_network(
        "ddpmpp", img_resolution=8, img_channels=1, label_dim=label_dim, model_channels=16,
        channel_mult=[1], num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():  # a fresh network looks at neither its input nor the class
            p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    net.info = info
    return net


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pixels(picture):
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture))


def refused(capsys, *argv):
    """What a command that ends with status 2 says."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


# ---- without Gradio -----------------------------------------------------------------------------


def test_without_gradio(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    said = refused(capsys, "demo", tmp_path)
    assert said.startswith("tcm-fast: demo: needs the package gradio (")
    assert "pip install 'tcm-fast[demo]'" in said


def test_what_a_network_is():
    named = network(3, class_names=["cat", "dog", "owl"], phase="tcm")
    assert demo.names(named) == ["cat", "dog", "owl"]
    assert demo.describe(named).endswith("M parameters, 1 × 8 × 8, 3 classes, phase tcm")
    assert demo.names(network(3, class_names=["cat"])) == ["0", "1", "2"]
    assert demo.names(network(0)) == []
    assert demo.describe(network(0)).endswith("M parameters, 1 × 8 × 8, no classes")


# ---- with it ------------------------------------------------------------------------------------


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="gradio is not installed")


def test_a_pre_trained_network_takes_heun_steps(gradio):
    net = network(0, phase="edm")
    page = demo.build_page(net, "edm")
    assert not page.analytics_enabled
    draw = next(f.fn for f in page.fns.values() if f.api_name == "second")
    drawn = draw(None, demo.EACH_IN_TURN, 2, 3)  # the seed's field is empty
    expected = grid(tcm_fast.sample(net, 2, steps=3, seed=0))
    assert np.array_equal(pixels(drawn["value"]), pixels(expected))
    assert drawn["label"].startswith("3 Heun steps: 2 images in ")
    steps = [
        c.value for c in page.blocks.values() if str(getattr(c, "label", "")).startswith("Steps")
    ]
    assert steps == [9, 18]


def test_a_port_that_is_taken(gradio, capsys, tmp_path):
    tcm_fast.save_network(tmp_path / "net.safetensors", network(), metadata={})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        said = refused(capsys, "demo", tmp_path / "net.safetensors", "--port", port, "--no-browser")
    assert said.startswith(f"tcm-fast: demo: --host 127.0.0.1, --port {port}: ")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(network, address) of a page in a process of its own."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path_factory.mktemp("demo")
    names = ["cat", "dog", "owl"]
    metadata = {"phase": "tcm", "t_prime": 1.0, "class_names": names}
    tcm_fast.save_network(folder / "net.safetensors", network(), metadata=metadata)
    command = ["demo", "net.safetensors", "--no-browser", "--port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "tcm_fast", *command], cwd=folder, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"GRADIO_TEMP_DIR": str(folder / "pictures")},
    )  # fmt: skip
    said = process.stdout.readline()
    try:
        assert said.startswith("net.safetensors at http://127.0.0.1:")
        yield tcm_fast.load_network(folder / "net.safetensors"), said.split()[2]
    finally:
        process.terminate()
        process.wait()


def test_the_pictures_are_those_of_sample(page):
    from gradio_client import Client

    net, url = page
    client = Client(url, verbose=False, analytics_enabled=False)
    for name, steps, seed, label in [
        ("/first", 1, 5, 2), ("/second", 2, 5, 2), ("/second", 2, 2**32 - 1, demo.EACH_IN_TURN),
    ]:  # fmt: skip
        drawn = client.predict(seed, label, 6, steps, api_name=name)
        labels = None if label == demo.EACH_IN_TURN else label
        images = tcm_fast.sample(net, 6, steps=steps, seed=seed, labels=labels)
        assert np.array_equal(pixels(drawn["value"]), pixels(grid(images)))
        assert drawn["label"].startswith(f"{steps} step{'s' * (steps > 1)}: 6 images in ")


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: none found")
    with driver.sync_playwright() as p:
        yield p.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=["desktop", "phone"])
def test_in_a_browser(page, browser, size, tmp_path):
    net, url = page
    view = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
    asked, wrong = [], []
    view.on("request", lambda request: asked.append(request.url))
    view.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    view.goto(url)
    pictures = view.locator(".pixels img")

    def shown(seed, labels=None):
        """Waits until both grids are on the screen."""
        for i, steps in enumerate((1, 2)):
            expected = pixels(grid(tcm_fast.sample(net, 25, steps=steps, seed=seed, labels=labels)))
            for _ in range(100):
                source = pictures.nth(i).get_attribute("src")
                found = pixels(io.BytesIO(view.request.get(source).body()))
                if np.array_equal(found, expected):
                    break
                view.wait_for_timeout(100)
            else:
                raise AssertionError(f"not the grid of {steps} steps, seed {seed}")

    shown(0)
    view.get_by_label("Class").click()
    view.get_by_role("option", name="owl").click()
    shown(0, 2)
    view.get_by_role("button", name="New seed").click()
    view.wait_for_function("document.querySelector('input[type=number]').value != 0")
    shown(int(view.get_by_label("Seed").input_value()), 2)

    wide, high = Image.open(
        io.BytesIO(view.screenshot(path=tmp_path / "page.png", full_page=True))
    ).size
    assert wide == size[0]  # nothing sticks out
    boxes = [pictures.nth(i).bounding_box() for i in range(2)]
    assert all(box["width"] >= 300 and box["y"] + box["height"] <= high for box in boxes)
    beside = boxes[0]["y"] == boxes[1]["y"]
    assert beside == (size[0] > 800)
    assert all(address.startswith((url, "data:", "blob:")) for address in asked), asked
    assert not wrong
    view.close()
