"""The model card of a run's repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nefkern.naming.names import Names
from nefkern.segmentation.tables import summary_table

_TAGS = ["nefkern", "unsupervised-segmentation", "spectral-clustering", "neural-eigenfunctions"]

_METHODS = {
    "spectral": "leading eigenvectors of the graph of all patches, K-means on them, and Nyström's "
    "extension with the pixel graph to other images",
    "neural": "a network that learns the graph's leading eigenfunctions (NeuralEF)",
}

#: Options that decide what the model is.
_SETTINGS = (
    *("backbone", "high", "crop", "num_eigenfunctions", "k", "alpha", "eigenvectors"),
    *("epochs", "batch_size", "lr", "seed"),
)
_OF_TRAINING = ("epochs", "batch_size", "lr")

_CARD = """\
---
{header}---

# {title}

Segments of images, learnt without labels by nefkern: {method}.
Each pixel gets one of {clusters} clusters{named}.

- **Images**: {images}
- **Backbone**: `{backbone}`, frozen
- **Input**: RGB images of any size; seen with a shorter side of {crop} pixels
- **Output**: the cluster of every pixel{classes}

## Use

With nefkern installed:

```console
$ python -m nefkern.segment hf://{name} photo.jpg --out segments
```

```python
from nefkern import Segmenter

clusters = Segmenter.load("{name}")("photo.jpg")   # int64 [H, W]
```
{names}{scores}
## Settings

| option | value |
|---|---|
{settings}

## Limits

Clusters are what the backbone's features and the images' colours tell apart: they need not be
objects, and images unlike those of the training get whichever clusters are nearest. Weights are
safetensors; nothing in this repository is code.

## Method

Zhijie Deng, Yucen Luo. *Learning Neural Eigenfunctions for Unsupervised Semantic Segmentation.*
ICCV 2023. [arXiv:2304.02841](https://arxiv.org/abs/2304.02841)
"""


def model_card(
    name: str,
    config: dict[str, Any],
    names: Names | None,
    scores: list[dict[str, Any]],
    licence: str | None,
) -> str:
    """The card, Markdown with a YAML header.

    Args:
        name: ``owner/name``.
        config: of the run, as it is published.
        names: of clusters.
        scores: evaluations of the run.
        licence: an identifier, or None to say nothing.
    """
    options = config["options"]
    header: dict[str, Any] = {"license": licence} if licence else {}
    header |= {"library_name": "nefkern", "pipeline_tag": "image-segmentation", "tags": _TAGS}
    spectral = options["method"] == "spectral"
    settings = {
        key: options[key]
        for key in _SETTINGS
        if options.get(key) is not None and not (spectral and key in _OF_TRAINING)
    }
    count = config.get("dataset", {}).get("images")
    images = f"`{Path(options['data_root'] or options['data']).name}`"
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        title=name.partition("/")[2],
        name=name,
        method=_METHODS[options["method"]],
        clusters=options["num_eigenfunctions"],
        named=f", {len(names.names)} of which have names" if names else "",
        images=images + (f", {count} of them" if count else ""),
        backbone=options["backbone"],
        crop=options["crop"],
        classes=", and its class by `names.yaml`" if names else "",
        names=_names(names),
        scores=_scores(scores),
        settings="\n".join(f"| `{key}` | {value} |" for key, value in settings.items()),
    )


def _names(names: Names | None) -> str:
    if names is None:
        return ""
    clusters: dict[str, list[int]] = {name: [] for name in names.classes}
    for cluster, name in sorted(names.names.items()):
        clusters[name].append(cluster)
    rows = [
        f"| {_plain(entry['name'])} | `{entry['colour']}` | "
        f"{', '.join(map(str, clusters[entry['name']]))} |"
        for entry in names.as_dict()["classes"]
    ]
    return "\n## Classes\n\n| class | colour | clusters |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _scores(scores: list[dict[str, Any]]) -> str:
    if not scores:
        return ""
    parts = []
    for one in scores:
        s = one["settings"]
        data = Path(s["data_root"]).name
        parts.append(
            f"`{data}`, {s['split']}: {one['images']} images, protocol {s['protocol']}\n\n"
            f"```\n{summary_table(one)}\n```\n"
        )
    return "\n## Scores\n\n" + "\n".join(parts)


def _plain(text: str) -> str:
    """Text as it is, where Markdown would see a mark."""
    return "".join(f"&#{ord(c)};" if c in "|<>&*_`[]\\" else c for c in text)
