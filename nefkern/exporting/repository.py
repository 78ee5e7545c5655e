"""A run's repository: what segmenting needs, and nothing of the machine it was trained on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import yaml

from nefkern.exporting.card import model_card
from nefkern.naming.names import NAMES, fingerprint, read_names
from nefkern.runtime import tensor_files
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import replace_file
from nefkern.runtime.structured import parse_json
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.runs import BACKBONE, CHECKPOINT, CLUSTERS, CONFIG, Run

log = logging.getLogger(__name__)

CARD = "README.md"

#: Weights that are found by their name wherever a run is loaded.
_ANYWHERE = ("auto", "hub", "packaged", "random")

#: Options that name places and devices of a machine, and what stands for them.
_PLACES = {"out": None, "feature_cache": None, "device": "auto", "workers": 0}


def write_repository(
    run: Run, folder: Path, name: str, *, with_backbone: bool = False, licence: str | None = None
) -> None:
    """Write a repository's files.

    Args:
        run: complete.
        folder: empty.
        name: ``owner/name``, for the card's examples.
        with_backbone: the backbone's weights too. They are in any case if the run took them from a
            file, which nobody else has.
        licence: the identifier of one, for the card.

    Raises:
        UserError: not a complete run; names of another one.
    """
    segmenter = Segmenter.load(run.folder, "cpu")
    segmenter.require_clusters()
    names = None
    if run.path(NAMES).exists():
        names = read_names(run.path(NAMES))
        names.require_run(run.path(NAMES), segmenter.num_clusters, fingerprint(run.folder))
    from_file = run.path(BACKBONE).exists() or segmenter.options.weights not in _ANYWHERE
    for file in (CHECKPOINT, CLUSTERS, NAMES):
        if run.path(file).exists():
            shutil.copyfile(run.path(file), folder / file)
    if with_backbone or from_file:
        state = segmenter.backbone.model.state_dict()
        replace_file(folder / BACKBONE, tensor_files.packed(state))
        log.info("%s: the weights of %s", BACKBONE, segmenter.options.backbone)
    config = published(run.config())
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    replace_file(folder / CONFIG, text)
    card = model_card(name, config, names, scores(run), licence)
    replace_file(folder / CARD, card)


def published(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what names its machine."""
    options = config["options"] | _PLACES
    root = options.get("data_root")
    options["data_root"] = root and Path(root).name
    if options["weights"] not in _ANYWHERE:
        options["weights"] = "auto"
    kept = ("versions", "backbone", "dataset")
    return {"options": options, **{key: config[key] for key in kept if key in config}}


def scores(run: Run) -> list[dict[str, Any]]:
    """What ``python -m nefkern.evaluate`` left in the run."""
    found = []
    for path in sorted(run.folder.glob("evaluation-*.json")):
        try:
            found.append(parse_json(path.read_text("utf-8")))
        except (ValueError, UnicodeDecodeError):
            raise UserError(f"{path}: damaged; remove it, or score the run again") from None
    return found
