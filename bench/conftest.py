"""``pytest bench/ --benchmark [--benchmark-size small|paper|large]``: options, results, table."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from bench import harness
from nefkern.runtime.files import replace_file

SIZES = ("small", "paper", "large")
_entries = pytest.StashKey[list]()
_results = pytest.StashKey[Path]()


def pytest_addoption(parser):
    group = parser.getgroup("nefkern benchmarks")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks of bench/")
    group.addoption("--benchmark-size", choices=SIZES, default="paper", help="default: paper")
    group.addoption("--benchmark-rounds", type=int, default=7, help="timed rounds; default: 7")
    group.addoption(
        "--benchmark-out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the JSON results; default: bench/results",
    )


def pytest_configure(config):
    config.stash[_entries] = []
    name = f"{config.getoption('--benchmark-size')}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    config.stash[_results] = config.getoption("--benchmark-out") / name


def pytest_collection_modifyitems(config, items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not config.getoption("--benchmark"):
            item.add_marker(pytest.mark.skip(reason="add --benchmark to run the benchmarks"))


@pytest.fixture
def size(request) -> str:
    """The size asked for: "small", "paper" or "large"."""
    return request.config.getoption("--benchmark-size")


@pytest.fixture
def race(request, benchmark):
    """:func:`bench.harness.race` whose entries go to the table and the JSON file.

    Ours is also handed to pytest-benchmark, whose table, ``--benchmark-json`` and
    ``--benchmark-compare`` then follow it from one commit to the next.
    """

    def run(case, contestants, **options):
        options.setdefault("rounds", request.config.getoption("--benchmark-rounds"))
        found = harness.race(case, contestants, **options)
        request.config.stash[_entries] += found
        _save(request.config)
        benchmark.extra_info.update({entry.contestant: entry.ratio for entry in found[1:]})
        ours = harness.finished(next(iter(contestants.values())))
        benchmark.pedantic(ours, rounds=options["rounds"])
        return found

    return run


def _save(config) -> None:
    """Write what has been measured so far: a run that is cut short keeps it."""
    document = {
        "environment": harness.environment(),
        "entries": [dataclasses.asdict(entry) for entry in config.stash[_entries]],
    }
    config.stash[_results].parent.mkdir(parents=True, exist_ok=True)
    replace_file(config.stash[_results], json.dumps(document, indent=1))


def pytest_terminal_summary(terminalreporter, config):
    entries = config.stash[_entries]
    if not entries:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"{'case':42} {'contestant':26} {'median':>11} {'ours is':>9} {'peak':>9} {'of floor':>9}"
    )
    for entry in entries:
        ratio = "" if entry.ratio is None else f"{entry.ratio:.2f}x"
        peak = "" if entry.peak_bytes is None else f"{entry.peak_bytes / 2**20:.0f} MB"
        floor = "" if entry.floor is None else f"{entry.floor / entry.seconds:.0%}"
        write(
            f"{entry.case:42} {entry.contestant:26} {entry.seconds * 1e3:8.2f} ms {ratio:>9} "
            f"{peak:>9} {floor:>9}{_dispatch(entry)}{_rate(entry)}"
        )
    for package, remedy in harness.absent.items():
        write(f"left out: {package} is not installed ({remedy})")
    write(f"\nresults: {config.stash[_results]}")


def _dispatch(entry) -> str:
    """What the host needs to ask a GPU for it."""
    return "" if entry.dispatch is None else f"  host {entry.dispatch * 1e3:.2f} ms"


def _rate(entry) -> str:
    """Images a second, of a case that counts them."""
    images = entry.sizes.get("images")
    return f"  {images / entry.seconds:.0f} images/s" if images else ""
