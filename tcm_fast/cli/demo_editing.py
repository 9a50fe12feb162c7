"""The editing tab of `tcm-fast demo`: a picture that is given or sampled, a mask that is painted over it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from tcm_fast.networks import Precond

TASKS = {
    "inpaint": "Inpaint",
    "vary": "Vary",
    "colorize": "Colorize",
    "upscale": "Upscale",
}
MOST_RESULTS, MOST_STEPS = 15, 16
CANVAS = 320  # pixels of the picture's height on the screen, about
PAINTED = 64  # of 255: how much of a pixel has to be painted over
HIDDEN = 128  # grey of the pixels that the network is not given


def add_editing(
    gradio: Any, page: Any, net: Precond, classes: list[str], precision: str | None
) -> None:
    """Fill the tab that is open. Its endpoint is /edit."""
    from PIL import Image

    from tcm_fast.sampling.sampler import sample

    size = net.img_resolution
    side = size * max(1, CANVAS // size)
    factors = [k for k in (2, 4, 8) if size % k == 0 and size > k]
    refused = {"colorize": net.img_channels != 3, "upscale": not factors}
    tasks = [(text, name) for name, text in TASKS.items() if not refused.get(name)]

    def draw(label: int) -> Image.Image:
        labels, seed = (label if classes else None), random.randrange(2**32)
        images = sample(net, 1, steps=None, seed=seed, labels=labels, precision=precision)
        pixels = Image.fromarray(images[0].squeeze().numpy())
        return pixels.resize((side, side), Image.Resampling.NEAREST)

    def edit(
        task: str, drawn: dict[str, Any], label: int, seed: int | None, num: int, steps: int,
        level: float, factor: int,
    ) -> Image.Image:  # fmt: skip
        try:
            return edited(
                net, task, drawn, factor, labels=label if classes else None, seed=seed or 0, num=num,
                steps=steps or None, level=level if task == "vary" else None, precision=precision,
            )  # fmt: skip
        except ValueError as error:  # for the page, not for the terminal
            raise gradio.Error(str(error), print_exception=False) from None

    with gradio.Row():
        task = gradio.Dropdown(tasks, value="inpaint", label="Task")
        label = gradio.Dropdown(
            [(name, i) for i, name in enumerate(classes or ["none"])], value=0, label="Class",
            visible=bool(classes),
        )  # fmt: skip
        seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
    with gradio.Row():
        num = gradio.Slider(1, MOST_RESULTS, 8, step=1, label="Results", min_width=240)
        steps = gradio.Slider(0, MOST_STEPS, 0, step=1, label="Steps (0: as usual)", min_width=240)
        level = gradio.Slider(
            0.1, 10, 1, step=0.1, label="Noise level", min_width=240, visible=False
        )
        factor = gradio.Dropdown(factors, value=2, label="Times smaller", visible=False)
    with gradio.Row():
        with gradio.Column(min_width=300):
            drawn = gradio.ImageEditor(
                type="pil", format="png", label="Paint a mask", canvas_size=(side, side),
                fixed_canvas=True, sources=("upload", "clipboard"), transforms=(), layers=False,
                elem_classes="pixels",
                brush=gradio.Brush(side // 8, colors=["#f97316"], color_mode="fixed"),
            )  # fmt: skip
            fresh = gradio.Button("New picture")
        with gradio.Column(min_width=300):
            result = gradio.Image(
                format="png", elem_classes="pixels", buttons=["download", "fullscreen"],
                label="What is given, then results",
            )  # fmt: skip
            go = gradio.Button("Edit", variant="primary")
    task.change(
        lambda task: [gradio.update(visible=task == name) for name in ("vary", "upscale")],
        task, [level, factor], api_visibility="private",
    )  # fmt: skip
    gradio.on(
        [page.load, fresh.click],
        draw,
        label,
        drawn,
        api_visibility="private",
        concurrency_id="network",
    )
    go.click(
        edit, [task, drawn, label, seed, num, steps, level, factor], result, api_name="edit",
        concurrency_id="network",
    )  # fmt: skip


def edited(
    net: Precond, task: str, drawn: dict[str, Any], factor: int = 2, **options: Any
) -> Image.Image:
    """A grid of what the network is given and of the results of `tcm_fast.edit`.

    Args:
        net: the network.
        task: a name in TASKS.
        drawn: what Gradio's ImageEditor gives: `background`, a picture of any size, of which the square in
            the middle is taken, and `layers`, pictures whose alpha is what has been painted over it.
        factor: of upscale: how many times smaller the picture is made before.
        options: of `tcm_fast.edit`.

    Raises:
        ValueError: no picture, no mask of inpaint, or what `tcm_fast.edit` refuses.
    """
    import numpy as np
    from PIL import Image, ImageOps

    from tcm_fast.sampling.editing import edit
    from tcm_fast.sampling.image_io import grid

    size, channels = net.img_resolution, "RGB" if net.img_channels == 3 else "L"
    small = (size // factor,) * 2 if task == "upscale" else (size, size)
    background = drawn["background"] and drawn["background"].convert("RGBA")
    box = background and background.getbbox()  # around it the canvas is transparent
    if box is None:
        raise ValueError("picture: there is none; upload one, or let the network draw one")

    def fitted(picture: Image.Image) -> Image.Image:
        return ImageOps.fit(picture.crop(box), small, Image.Resampling.BOX)

    given = fitted(background.convert("L" if task == "colorize" else channels))
    painted = [np.asarray(fitted(layer.getchannel("A"))) for layer in drawn["layers"]]
    mask = np.max([np.zeros(small, np.uint8), *painted], 0) >= PAINTED
    if task == "inpaint" and not mask.any():
        raise ValueError("mask: paint over what is to be filled")
    uses_mask = task == "inpaint" or (task == "vary" and mask.any())
    images = np.array(given).reshape(1, *small, -1)
    results = edit(net, images, task, mask=mask if uses_mask else None, **options)
    shown = np.array(given.resize((size, size), Image.Resampling.NEAREST).convert(channels))
    if task == "inpaint":
        shown[mask] = HIDDEN
    return grid(np.concatenate([shown.reshape(1, size, size, -1), results.numpy()]))
