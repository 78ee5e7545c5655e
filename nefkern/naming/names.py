"""``names.yaml``: which class each cluster of a run stands for.

    clusters: 64                  # of the run
    checkpoint: 3f2a...           # optional: of which training
    classes:                      # optional: order and colours of the classes
      - {name: sky, colour: '#87ceeb'}
      - {name: road, colour: '#808080'}
    names:                        # clusters of one name are one class
      0: sky
      3: road
      17: sky

Clusters that are not listed have no class: they are void. Classes that only ``names`` holds follow
those of ``classes``, in the order of their first cluster, in colours of the palette.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nefkern.data.constants import VOID
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import replace_file
from nefkern.runtime.structured import parse_yaml, read_text
from nefkern.segmentation.pictures import palette
from nefkern.training.runs import CHECKPOINT, CLUSTERS

NAMES = "names.yaml"

#: Longer is a slip of the clipboard.
MAX_NAME = 200

_KEYS = ("clusters", "checkpoint", "classes", "names")
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
#: What no name in a classes.txt has; blanks and joiners of other scripts are in some.
_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Names:
    """Names of a run's clusters.

    Attributes:
        num_clusters: K of the run.
        names: of each named cluster.
        colours: of classes, in their order, "#rrggbb"; None takes the palette's.
        checkpoint: see :func:`fingerprint`; None fits any run of K clusters.
    """

    num_clusters: int
    names: Mapping[int, str]
    colours: Mapping[str, str | None] = field(default_factory=dict)
    checkpoint: str | None = None

    @property
    def classes(self) -> list[str]:
        """Names of the classes; the place is the class's index."""
        used = [self.names[cluster] for cluster in sorted(self.names)]
        return list(dict.fromkeys([*self.colours, *used]))

    def palette(self) -> np.ndarray:
        """Colours of the classes, uint8 ``[C, 3]``; those not given are the palette's, none
        twice."""
        asked = [self.colours.get(name) for name in self.classes]
        taken = {_rgb(colour) for colour in asked if colour}
        free = (c for c in map(tuple, palette(2 * VOID).tolist()) if c not in taken)
        chosen = [_rgb(colour) if colour else next(free) for colour in asked]
        return np.array(chosen, np.uint8).reshape(-1, 3)

    def class_of(self) -> np.ndarray:
        """Class index of every cluster, uint8 ``[K]``; 255 (void) without a name."""
        index = {name: i for i, name in enumerate(self.classes)}
        table = np.full(self.num_clusters, VOID, np.uint8)
        for cluster, name in self.names.items():
            table[cluster] = index[name]
        return table

    def as_dict(self) -> dict[str, Any]:
        """What the file holds, complete: colours chosen by the palette are written out."""
        colours = ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in self.palette().tolist()]
        classes = [
            {"name": name, "colour": colour}
            for name, colour in zip(self.classes, colours, strict=True)
        ]
        head: dict[str, Any] = {"clusters": self.num_clusters}
        if self.checkpoint:
            head["checkpoint"] = self.checkpoint
        return {**head, "classes": classes, "names": dict(sorted(self.names.items()))}

    def require_run(self, source: str | Path, num_clusters: int, checkpoint: str) -> None:
        """Raise a UserError unless these are names of a run's clusters."""
        if self.num_clusters != num_clusters:
            raise UserError(
                f"{source}: clusters: names those of a run of {self.num_clusters}, this run has "
                f"{num_clusters}"
            )
        if self.checkpoint not in (None, checkpoint):
            raise UserError(
                f"{source}: checkpoint: names the clusters of another training "
                f"({self.checkpoint}), this run's is {checkpoint}; without this line they are "
                "taken as they are"
            )


def fingerprint(run: str | Path) -> str:
    """What tells one training's clusters from another's: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in (CHECKPOINT, CLUSTERS):
        path = Path(run, name)
        if path.exists():
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]


def read_names(path: str | Path) -> Names:
    """Read ``names.yaml``.

    Raises:
        UserError: no such file, not YAML, or an entry that is not as the format has it; names the
            file and the entry.
    """
    try:
        content = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; python -m nefkern.atlas RUN makes a page to name clusters on"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected the file {NAMES}") from None
    except ValueError as error:
        raise UserError(f"{path}: not YAML ({error})") from None
    return parse_names(content, path)


def write_names(path: Path, names: Names) -> None:
    """Write ``names.yaml`` in one step."""
    text = yaml.safe_dump(names.as_dict(), sort_keys=False, allow_unicode=True, width=1000)
    replace_file(path, text)


def parse_names(content: Any, source: str | Path) -> Names:
    """What was read from YAML or JSON, checked.

    Args:
        content: as :meth:`Names.as_dict` makes it; cluster numbers may be text, as in JSON.
        source: named in errors.

    Raises:
        UserError: see :func:`read_names`.
    """
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected the entries {', '.join(_KEYS)}, got {_kind(content)}")
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise UserError(
            f"{source}: {unknown[0]}: no such entry; expected one of {', '.join(_KEYS)}"
        )
    clusters = content.get("clusters")
    if not _is_int(clusters) or not 1 <= clusters <= 1 << 16:
        raise UserError(f"{source}: clusters: expected how many the run has, got {clusters!r}")
    checkpoint = content.get("checkpoint")
    if checkpoint is not None and not isinstance(checkpoint, str):
        raise UserError(f"{source}: checkpoint: expected text in quotes, got {checkpoint!r}")
    colours = _parse_classes(content.get("classes") or [], source)
    names = _parse_clusters(content.get("names") or {}, clusters, source)
    result = Names(clusters, names, colours, checkpoint)
    if len(result.classes) > VOID:
        raise UserError(
            f"{source}: names: {len(result.classes)} different ones, expected at most {VOID}: "
            "what an index image holds beside void"
        )
    return result


def _parse_classes(content: Any, source: str | Path) -> dict[str, str | None]:
    if not isinstance(content, list):
        raise UserError(f"{source}: classes: expected a list, got {_kind(content)}")
    colours: dict[str, str | None] = {}
    for number, entry in enumerate(content):
        place = f"{source}: classes: entry {number + 1}"
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not set(entry) <= {"name", "colour"}:
            raise UserError(f"{place}: expected a name and a colour, got {entry!r}")
        name = _checked_name(entry.get("name"), place)
        if name in colours:
            raise UserError(f"{place}: the name {name!r} is there already")
        colour = entry.get("colour")
        if colour is not None and not (isinstance(colour, str) and _COLOUR.fullmatch(colour)):
            raise UserError(f"{place}: colour: expected '#rrggbb' in quotes, got {colour!r}")
        colours[name] = colour and colour.lower()
    return colours


def _parse_clusters(content: Any, clusters: int, source: str | Path) -> dict[int, str]:
    if not isinstance(content, dict):
        raise UserError(f"{source}: names: expected cluster: name, got {_kind(content)}")
    names: dict[int, str] = {}
    for key, name in content.items():
        decimal = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 9
        cluster = int(key) if decimal else key
        if not _is_int(cluster) or not 0 <= cluster < clusters:
            raise UserError(f"{source}: names: {key!r}: expected a cluster, 0 to {clusters - 1}")
        if cluster in names:
            raise UserError(f"{source}: names: {key!r}: this cluster has a name already")
        names[cluster] = _checked_name(name, f"{source}: names: {cluster}")
    return names


def _checked_name(name: Any, place: str) -> str:
    if isinstance(name, bool) or not isinstance(name, str):
        hint = "; in quotes it is one" if isinstance(name, (bool, int, float)) else ""
        raise UserError(f"{place}: expected a name, got {name!r}{hint}")
    if name != name.strip() or _BREAKS.search(name) or not 1 <= len(name) <= MAX_NAME:
        raise UserError(
            f"{place}: expected 1 to {MAX_NAME} characters on one line without blanks around "
            f"them, got {name[:50]!r}"
        )
    return name


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def class_names(names: Sequence[str]) -> str:
    """Content of a ``classes.txt``: one name a line; the line is the index."""
    return "".join(f"{name}\n" for name in names)
