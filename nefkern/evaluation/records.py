"""What an evaluation is known by: the options that decide it, and the names of its files."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from pathlib import Path
from typing import Any

from nefkern.runtime.files import shortened
from nefkern.runtime.structured import parse_json

#: How the name of the file of resampled scores ends, beside that of the scores.
RESAMPLED = ".npz"


def plain_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.-]", "_", name)


#: What ``python -m nefkern.evaluate`` can be asked for beside the figures of one method; methods
#: are recorded by their results.
_FREE = frozenset((
    "run", "methods", "baseline", "features", "untrained", "pictures", "device", "feature_cache",
    "batch_size", "crf_workers", "bootstrap", "cross_match", "bounds", "boundary",
))  # fmt: skip


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide a method's figures, as they were given; JSON-ready."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        # Evaluations from before these could be asked for have neither.
        if name not in _FREE and (name, value) not in (("merge", None), ("edges", None))
    }


def free_name(folder: Path, settings: dict[str, Any]) -> Path:
    """The file of an earlier evaluation with these settings, or one that isn't taken."""
    data = Path(settings["data_root"]).resolve().name
    if "data" in settings:
        data = f"{settings['data']}-{settings['classes']}"
    parts = ["evaluation", data, settings["split"], settings["protocol"]]
    if settings["ignored"]:
        parts += ["without", *settings["ignored"]]
    stem = shortened(plain_name("-".join(map(str, parts))))
    for number in itertools.count(1):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            return path
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if parse_json(path.read_text("utf-8"))["settings"] == settings:
                return path
    raise AssertionError("count() never ends")
