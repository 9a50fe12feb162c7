"""Networks to the Hugging Face Hub (the [hub] extra); `checkpoint/hub.py` brings them from there.

push("runs/mine", "user/repo")
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tcm_fast.checkpoint.format import load_network
from tcm_fast.checkpoint.hub import FILES, as_one_sentence, check_name, package
from tcm_fast.config import PHASES, Config, DistanceConfig, load_config, save_config
from tcm_fast.networks import Precond


def push(source: str | Path, repo: str, *, public: bool = False, license: str | None = None) -> str:
    """Upload a network with its configuration, a grid of samples and a model card.

    Args:
        source: a run (its newest checkpoint), a checkpoint or a network file.
        repo: user/repo; made where there is none.
        public: of a repository that is made.
        license: of the weights, as the Hub abbreviates it (such as apache-2.0).

    Returns:
        The address of the repository.

    Raises:
        As `load_network`.
    """
    hub = package()
    check_name(repo)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(source, Path(temporary), repo, license)
        with as_one_sentence(repo):
            api = hub.HfApi()
            url = api.create_repo(repo, private=not public, exist_ok=True)
            files = {file.name: str(file) for file in sorted(folder.iterdir())}
            commit = [hub.CommitOperationAdd(name, path) for name, path in files.items()]
            # What another network left: its stage-1 network, say, would sample beside this one.
            left = {*FILES} & {*api.list_repo_files(repo)} - {*files}
            commit += [hub.CommitOperationDelete(name) for name in sorted(left)]
            api.create_commit(repo, commit, commit_message="A network trained with tcm_fast")
    return str(url)


def write_folder(source: str | Path, folder: Path, repo: str, license: str | None = None) -> Path:
    """What `push` uploads, in an empty folder."""
    net = load_network(source)
    file: Path = net.source  # type: ignore[assignment]
    shutil.copyfile(file, folder / FILES[0])
    if (stage1 := file.with_name(FILES[1])).is_file():
        shutil.copyfile(stage1, folder / FILES[1])
    run = next(
        (path for path in file.resolve().parents[:3] if (path / "log.jsonl").is_file()), None
    )
    config = None
    if run is not None:
        config = _without_paths(load_config(run / "config.json"))
        save_config(config, folder / FILES[2])
        grids = sorted((run / "grids").glob(f"{net.info['phase']}-*.png"))
        if grids:
            shutil.copyfile(grids[-1], folder / FILES[3])
    card = model_card(net, repo, license, config=config, log=run and run / "log.jsonl")
    (folder / FILES[4]).write_text(card, encoding="utf-8")
    return folder


# ---- the model card -----------------------------------------------------------------------------

CARD = """
# {title}

{kind}, trained with `tcm_fast` (truncated consistency models, [arXiv 2410.14895](https://arxiv.org/abs/2410.14895)).
{picture}
| | |
|---|---|
{rows}

```
pip install "tcm-fast[hub]"
tcm-fast sample hf:{repo} --num 16 --out samples.png
```

```python
net = tcm_fast.load_network("hf:{repo}")
images = tcm_fast.sample(net, 16, seed=0)  # uint8 [16,H,W,C]
```

The numbers are the training run's own. Fréchet distances compare only within the same features, reference
images and number of samples.
"""
KINDS = {
    "edm": "A denoiser (pre-training only; sampled by a solver)",
    "tcm": "A one- and two-step image generator",
}


def model_card(
    net: Precond, repo: str, license: str | None, *, config: Config | None, log: Path | None
) -> str:
    """README.md of a network: what it is, the numbers of its run, how to use it."""
    info, parameters = net.info, sum(p.numel() for p in net.parameters())
    data = package().ModelCardData(
        license=license, library_name="tcm_fast", pipeline_tag="unconditional-image-generation",
        tags=["consistency-models", "one-step-generation", str(info["phase"])],
    )  # fmt: skip
    size = f"{net.img_channels} × {net.img_resolution} × {net.img_resolution}"
    rows = {
        "network": f"{net.spec['name']}, {parameters / 1e6:.2f} M parameters",
        "images": size,
        "classes": str(net.label_dim) if net.label_dim else "none",
        "phase": f"{info['phase']}, {info['images']:,} images, {info['iterations']:,} steps",
    }
    if info["t_prime"] is not None:
        rows["trained for noise levels"] = f"t ≥ {info['t_prime']:g}; stage 1 below"
    if config is not None:
        rows["data"] = config.data.source or "not named"
        rows["precision"] = config.precision
    for steps, distance in (_distances(log, info) if log else {}).items():
        features = config.eval.features if config else ""
        name = "Heun solver" if steps == "heun" else f"{steps} step{'s' * (steps != '1')}"
        rows[f"Fréchet distance, {name}"] = f"{distance:.3g} (features: {features})"
    text = CARD.format(
        title=repo.partition("/")[2], repo=repo,
        kind=KINDS.get(info["phase"], "A one-step image generator (consistency model)"),
        picture=f"\n![Samples]({FILES[3]})\n" if _has_grid(log, info) else "",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _distances(log: Path, info: dict[str, Any]) -> dict[str, float]:
    """Fréchet distances by number of steps that a run has logged for this network."""
    found: dict[str, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the last line of a run that was cut off
            event = json.loads(line)
            if event.get("event") == "eval" and all(
                event[k] == info[k] for k in ("phase", "images")
            ):
                found |= event["frechet"]
    return found


def _has_grid(log: Path | None, info: dict[str, Any]) -> bool:
    return log is not None and any((log.parent / "grids").glob(f"{info['phase']}-*.png"))


def _without_paths(config: Config) -> Config:
    """The configuration with the names of the user's files, but not where they lie."""
    features = re.sub(r"[^:]*[/\\]", "", config.eval.features)
    source = re.split(r"[/\\]", config.data.source)[-1]
    phases: dict[str, Any] = {
        name: replace(phase, features=re.split(r"[/\\]", phase.features)[-1])
        for name in PHASES
        if isinstance(phase := config.phase(name), DistanceConfig)
    }
    return replace(
        config,
        data=replace(config.data, source=source),
        eval=replace(config.eval, features=features),
        **phases,
    )
