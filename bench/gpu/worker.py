"""``python -m bench.gpu.worker``: run cases named on the standard input, one a line.

What is found goes to a file of its own, a line of JSON at a time: the driver reads along. Nothing
that a case prints, and no way in which it dies, can spoil that.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from bench.gpu.plan import Settings
from bench.gpu.process import tail


class Skipped(Exception):
    """The case makes no sense here; the message says why."""


def main(module: str, records: str, settings: str, *cases: str) -> None:
    """Run the cases given, or serve until the input ends."""
    told = Settings(**json.loads(settings))
    with open(records, "a", buffering=1, encoding="utf-8") as file:

        def write(**record: Any) -> None:
            file.write(json.dumps(_plain(record)) + "\n")

        for line in cases or sys.stdin:
            case = line.rstrip("\n")
            for record in outcomes(module, case, told):
                write(case=case, **record)
            if not _settled(told):
                break  # what the last case broke stays broken in this process


def outcomes(module: str, case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """Figures as they come, then the case's status: "passed", "failed" or "skipped"."""
    yield {"status": "running"}
    began = time.monotonic()
    try:
        yield from importlib.import_module(module).run(case, settings)
    except Skipped as reason:
        outcome = {"status": "skipped", "why": str(reason)}
    except (Exception, SystemExit) as error:
        where = tail(traceback.format_exc())
        outcome = {"status": "failed", "why": _first(error), "traceback": where}
    else:
        outcome = {"status": "passed"}
    yield {**outcome, "seconds": round(time.monotonic() - began, 2)}


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _settled(settings: Settings) -> bool:
    """Whether the device still works; its memory is free for others then."""
    torch = sys.modules.get("torch")
    if settings.rehearsal or torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN and no infinity: null."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


if __name__ == "__main__":
    # Under its own name, so that what other modules raise is caught: __main__.Skipped is another.
    importlib.import_module("bench.gpu.worker").main(*sys.argv[1:])
