"""The atlas as one HTML file that needs nothing else.

All that comes from outside (names, file names) is in JSON blocks, in which ``<`` is escaped, and
enters the page as text. Its content security policy allows this script and these styles alone, and
no connection but, where it is served, to the server itself.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from nefkern.data.dataset import ImageDataset
from nefkern.naming.names import Names
from nefkern.naming.survey import PATCHES, SEGMENTS, TILE, Survey, pictures
from nefkern.segmentation.pictures import palette

_QUALITY = 80


class AtlasPage:
    """The page of a survey; the names in it may change.

    Args:
        title: of the page.
        found: what it shows.
        dataset: the images.
        names: of the run's clusters, with its fingerprint.
    """

    def __init__(self, title: str, found: Survey, dataset: ImageDataset, names: Names) -> None:
        sheets, thumbnails = pictures(found, dataset)
        self._title, self._kept = title, list(names.colours)
        self._checkpoint = names.checkpoint or ""
        self._facts = _facts(found, dataset)
        blocks = {f"s{k}": sheet for k, sheet in sheets.items()}
        blocks |= {f"i{k}": image for k, image in thumbnails.items()}
        self._pictures = "\n".join(
            f'<script type="text/plain" id="{key}">{_jpeg(image)}</script>'
            for key, image in blocks.items()
        )

    def html(self, names: Names, *, serve: bool = False) -> str:
        """The page with these names; ``serve``: it saves them to the server it came from."""
        style, script = _asset("atlas.css"), _asset("atlas.js")
        connect = "'self'" if serve else "'none'"
        policy = (
            f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
            f"script-src '{_hash(script)}'; connect-src {connect}; base-uri 'none'; "
            "form-action 'none'"
        )
        data = {
            **self._facts,
            "checkpoint": self._checkpoint,
            "kept": self._kept,
            "serve": serve,
            "tile": TILE,
            "columns": PATCHES,
            "segments": SEGMENTS,
        }
        parts = {
            "policy": policy,
            "title": html.escape(self._title),
            "style": style,
            "script": script,
            "data": _json(data),
            "names": _json(names.as_dict()),
            "pictures": self._pictures,
        }
        pieces = _asset("atlas.html").split("{{")
        page = [pieces[0]]
        for piece in pieces[1:]:  # in one pass: what is put in is not looked at again
            key, _, rest = piece.partition("}}")
            page += [parts[key], rest]
        return "".join(page)


def _facts(found: Survey, dataset: ImageDataset) -> dict[str, Any]:
    total = max(1, sum(cluster.patches for cluster in found.clusters))
    colours = palette(len(found.clusters)).tolist()
    clusters = [
        {
            "colour": "#{:02x}{:02x}{:02x}".format(*colour),
            "patches": cluster.patches,
            "share": round(cluster.patches / total, 7),
            "images": cluster.images,
            "margin": round(cluster.margin, 4),
            "rivals": [patch.rival for patch in cluster.doubtful],
            "segmentRivals": [segment.rival for segment in cluster.doubtful_segments],
            "where": [[index, round(share, 4)] for index, share in cluster.where],
        }
        for cluster, colour in zip(found.clusters, colours, strict=True)
    ]
    images = {
        index: {
            "name": dataset.paths[index].name,
            "cells": list(chart.shape),
            "map": base64.b64encode(chart.astype("<u2").tobytes()).decode(),
        }
        for index, chart in found.maps.items()
    }
    levels = ((found.similarity.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    similarity = base64.b64encode(levels.tobytes()).decode()
    return {"clusters": clusters, "images": images, "similarity": similarity}


def _jpeg(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=_QUALITY)
    return base64.b64encode(content.getvalue()).decode()


def _json(content: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end that."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _asset(name: str) -> str:
    return resources.files("nefkern.naming").joinpath("page", name).read_text("utf-8")
