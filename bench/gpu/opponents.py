"""Stage "opponents": the benchmarks' races, by device time, each checked before it is timed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import harness
from bench.gpu.plan import Settings
from bench.gpu.rehearsal import measure_less
from bench.gpu.worker import Skipped

ROUNDS = {"paper": 5, "small": 3}


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """ "module.test" and what the test is parametrised with."""
    measure_less(settings)
    place, *parameters = case.split()
    module, name = place.split(".")
    test = getattr(importlib.import_module(f"bench.{module}"), name)
    races: list[list[dict[str, Any]]] = []

    def race(case: str, contestants: dict[str, Callable], **options: Any) -> list[harness.Entry]:
        found = harness.race(case, contestants, **{**options, "rounds": ROUNDS[settings.size]})
        races.append([dataclasses.asdict(entry) for entry in found])
        return found

    try:
        test(race, settings.size, *map(argument, parameters))
    except pytest.skip.Exception as reason:
        raise Skipped(str(reason)) from None
    for entries in races:
        yield {"entries": entries}
        yield {"ratios": {entry["contestant"]: entry["ratio"] for entry in entries[1:]}}


def argument(text: str) -> Any:
    """A dtype by its name, else the text."""
    import torch

    found = getattr(torch, text, None)
    return found if isinstance(found, torch.dtype) else text
