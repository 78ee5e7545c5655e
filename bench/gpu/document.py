"""The file of results: whole at any moment, so that whatever ends the run leaves what it found."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from nefkern.runtime.files import replace_file


class Document:
    """Results as they come; :meth:`save` writes them in one step.

    Args:
        path: the file. Its folder is made.
        facts: what is known from the start.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path, self.started = path, time.monotonic()
        self.content: dict[str, Any] = {
            **facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": 0.0,
            "environment": {}, "entries": [], "stages": {},
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def stage(self, name: str, **facts: Any) -> dict[str, Any]:
        """The stage's record, with these facts added."""
        stage = self.content["stages"].setdefault(name, {"cases": {}})
        stage.update(facts)
        self.save()
        return stage

    def case(self, stage: str, name: str, **facts: Any) -> dict[str, Any]:
        """A case's record, with these facts added. Facts named "environment" and "entries" go to
        the document's own: what :mod:`bench.report` reads."""
        self.content["environment"] |= facts.pop("environment", {})
        self.content["entries"] += facts.pop("entries", [])
        case = self.content["stages"][stage]["cases"].setdefault(name, {})
        case.update(facts)
        self.save()
        return case

    def save(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.started, 1)
        replace_file(self.path, json.dumps(self.content, indent=1) + "\n")


def read(path: str) -> dict[str, Any]:
    """What a run has found so far."""
    return json.loads(Path(path).read_text("utf-8"))


def cases(content: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    """The cases of a stage by name; none where it was not reached."""
    return content["stages"].get(stage, {}).get("cases", {})
