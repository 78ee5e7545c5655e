"""The evaluate command asked: what it wrote, or the line that it failed with."""

from __future__ import annotations

import json
from pathlib import Path

from nefkern.evaluate import main


def evaluate(run: Path, folder: Path, *options: str) -> dict:
    """Run the command, on small crops, and read the file it wrote."""
    before = {p: p.stat().st_mtime_ns for p in run.glob("evaluation-*.json")}
    small = [] if "sliding" in options else ["--size", "48"]
    code = main([str(run), "--data", "folder", "--data-root", str(folder), *small, *options])
    assert code == 0
    after = {p: p.stat().st_mtime_ns for p in run.glob("evaluation-*.json")}
    changed = [p for p in after if after[p] != before.get(p)]
    assert len(changed) == 1
    return json.loads(changed[0].read_text("utf-8"))


def figures(result: dict, method: str = "ours", stage: str = "none", matching: str = "iou"):
    return result["methods"][method]["stages"][stage]["matchings"][matching]


def failure(capsys, *arguments: object) -> str:
    """The one line that a mistaken command ends with."""
    assert main([str(a) for a in arguments]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
