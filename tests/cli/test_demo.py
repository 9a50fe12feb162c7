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
from PIL import Image, ImageOps

import tcm_fast
from tcm_fast.cli import demo, demo_editing
from tcm_fast.cli.main import main
from tcm_fast.sampling.image_io import grid


def network(label_dim=3, channels=1, **info):
    net = tcm_fast.build_network(
        "ddpmpp", img_resolution=8, img_channels=channels, label_dim=label_dim, model_channels=16,
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


def drawn(mode="RGB", side=80, mask=True):
    """What the editor gives: a picture of random 10x10 blocks, which leaves an edge of the canvas free,
    painted over in its left half."""
    rng = np.random.default_rng(0)
    blocks = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).convert(mode)
    paint = np.zeros((side, side, 4), np.uint8)
    paint[:, : side // 2] = (249, 115, 22, 255)
    layers = [ImageOps.expand(Image.fromarray(paint), EDGE)] if mask else []
    picture = blocks.resize((side, side), Image.Resampling.NEAREST).convert("RGBA")
    return blocks, {
        "background": ImageOps.expand(picture, EDGE),
        "layers": layers,
        "composite": None,
    }


EDGE = 7  # pixels
LEFT = np.arange(8)[None].repeat(8, 0) < 4


def test_inpainting_fills_what_is_painted_over():
    net = network(phase="ect")
    blocks, given = drawn("L")
    found = demo_editing.edited(net, "inpaint", given, labels=1, seed=4, num=3)
    images = np.array(blocks)[None, ..., None]
    results = tcm_fast.edit(net, images, "inpaint", mask=LEFT, labels=1, seed=4, num=3)
    hidden = np.where(LEFT[..., None], demo_editing.HIDDEN, images[0])[None].astype(np.uint8)
    assert np.array_equal(pixels(found), pixels(grid(np.concatenate([hidden, results]))))
    with pytest.raises(ValueError, match="mask: paint over"):
        demo_editing.edited(net, "inpaint", drawn("L", mask=False)[1], labels=1)
    with pytest.raises(ValueError, match="picture: there is none"):
        demo_editing.edited(net, "inpaint", {"background": None, "layers": []}, labels=1)


@pytest.mark.parametrize("mask", [LEFT, None])
def test_variations_of_what_is_painted_over_or_of_all(mask):
    net = network(0, 3, phase="ect")
    blocks, given = drawn(mask=mask is not None)
    found = demo_editing.edited(net, "vary", given, num=2, level=2.0)
    images = np.array(blocks)[None]
    results = tcm_fast.edit(net, images, "vary", mask=mask, num=2, level=2.0)
    # The network is given what is painted over too.
    assert np.array_equal(pixels(found), pixels(grid(np.concatenate([images, results]))))


def test_colours_and_details_are_added_to_what_is_grey_or_small():
    net = network(0, 3, phase="ect")
    blocks, given = drawn()
    grey = np.array(blocks.convert("L"))[None, ..., None]
    results = tcm_fast.edit(net, grey, "colorize", num=3)
    expected = grid(np.concatenate([grey.repeat(3, 3), results]))
    assert np.array_equal(
        pixels(demo_editing.edited(net, "colorize", given, num=3)), pixels(expected)
    )

    small = np.array(
        ImageOps.crop(given["background"], EDGE).convert("RGB").resize((4, 4), Image.Resampling.BOX)
    )[None]
    results = tcm_fast.edit(net, small, "upscale", steps=2)
    expected = grid(np.concatenate([small.repeat(2, 1).repeat(2, 2), results]))
    assert np.array_equal(
        pixels(demo_editing.edited(net, "upscale", given, 2, steps=2)), pixels(expected)
    )


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


def test_an_edit_by_a_program(page, tmp_path):
    from gradio_client import Client, handle_file

    net, url = page
    _, given = drawn("L")
    given["background"].save(tmp_path / "picture.png")
    given["layers"][0].save(tmp_path / "mask.png")
    picture, mask = (handle_file(tmp_path / f"{name}.png") for name in ("picture", "mask"))
    editor = {"background": picture, "layers": [mask], "composite": None}
    client = Client(url, verbose=False, analytics_enabled=False)
    found = client.predict("inpaint", editor, 1, 4, 3, 2, 1, 2, api_name="/edit")
    expected = demo_editing.edited(net, "inpaint", given, labels=1, seed=4, num=3, steps=2)
    assert np.array_equal(pixels(found), pixels(expected))


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


def test_a_mask_painted_in_a_browser(page, browser):
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    view.set_default_timeout(120_000)  # without a GPU the editor's canvas is slow
    view.goto(page[1])
    view.get_by_role("tab", name="Edit").click()
    box = view.locator(".pixels canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    middle = {"x": x - 80, "y": y - 80, "width": 160, "height": 160}
    while pixels(io.BytesIO(view.screenshot(clip=middle))).std() < 5:  # no picture yet
        view.wait_for_timeout(100)
    view.mouse.move(x - 60, y)
    view.mouse.down()
    view.mouse.move(x + 60, y, steps=5)
    view.mouse.up()
    view.get_by_role("button", name="Edit", exact=True).click()
    result = view.locator(".pixels img:visible")
    result.wait_for()
    cells = pixels(io.BytesIO(view.request.get(result.get_attribute("src")).body()))
    assert cells.shape == (3 * 66 + 2, 3 * 66 + 2)
    cells = [
        cells[i + 2 : i + 66 : 8, j + 2 : j + 66 : 8] for i in (0, 66, 132) for j in (0, 66, 132)
    ]
    changed = np.any(cells[1:] != cells[0], 0)
    assert (cells[0][changed] == demo_editing.HIDDEN).all()
    assert 3 <= changed.sum() <= 24
    view.close()
