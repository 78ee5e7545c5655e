"""What a run found, for reading: the wrong, the times beside their predictions, the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from bench.gpu.document import cases

#: Statuses of a case that end in an exit code of 1.
WRONG = ("failed", "crashed", "hung")


def wrong(content: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Stage, case and record of everything that is wrong."""
    return [
        (stage, name, case)
        for stage in content["stages"]
        for name, case in cases(content, stage).items()
        if case.get("status") in WRONG
    ]


def text(content: dict[str, Any]) -> str:
    parts = [headline, stages, problems, accuracy, times, kernels, opponents, training]
    return "\n".join(line for part in parts for line in part(content))


def headline(content: dict[str, Any]) -> Iterator[str]:
    where = content["environment"]
    yield (
        f"{where.get('gpu') or where.get('processor')}, PyTorch {where.get('torch')}, "
        f"commit {str(where.get('commit'))[:10]}{' and changes' if where.get('changed') else ''}: "
        f"{content['seconds']:.0f} s of {content['budget']:.0f}"
    )
    rates = where.get("rates")
    if rates:
        flops = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates["flops"].items())
        yield f"measured: {flops} TFLOP/s, {rates['bandwidth'] / 1e12:.3g} TB/s"


def stages(content: dict[str, Any]) -> Iterator[str]:
    yield ""
    for name, stage in content["stages"].items():
        counts = Counter(case.get("status") for case in stage["cases"].values())
        shown = ", ".join(f"{n} {status}" for status, n in counts.items())
        reasons = {c["why"] for c in stage["cases"].values() if c.get("status") == "skipped"}
        why = f" ({'; '.join(sorted(reasons))[:150]})" if reasons else ""
        yield f"{name:12} {stage.get('seconds', 0):6.1f} s  {shown or stage.get('why', '')}{why}"


def problems(content: dict[str, Any]) -> Iterator[str]:
    found = wrong(content)
    if found:
        yield ""
    for stage, name, case in found:
        yield f"{case['status']}: {stage}: {name}: {case.get('why', '')}"
        if again := case.get("repeated"):
            yield f"    {again['how']}: {again['status']} {again.get('why', '')}"


def accuracy(content: dict[str, Any]) -> Iterator[str]:
    """The largest error of each backend and dtype."""
    worst: dict[str, tuple[float, str]] = {}
    for name, case in cases(content, "operators").items():
        operator, backend, dtype, size = name.split("/")
        numbers = {n: e for n, e in case.get("errors", {}).items() if e is not None}
        for result, error in numbers.items():
            key = f"{backend} {dtype}"
            worst[key] = max(worst.get(key, (0.0, "")), (error, f"{operator}, {size}, {result}"))
    if worst:
        yield ""
    for key, (error, where) in worst.items():
        yield f"largest error, {key:16} {error:.1e}  {where}"


def times(content: dict[str, Any]) -> Iterator[str]:
    rows = {n: c for n, c in cases(content, "kernels").items() if c.get("device")}
    if rows:
        yield ""
        titles = f"{'device':>10} {'predicted':>10} {'ratio':>6} {'host':>9} {'launches':>8}"
        yield f"{'call':50} {titles}"
    for name, case in rows.items():
        predicted = case.get("predicted")
        yield (
            f"{name:50} {_ms(case['device'])} {_ms(predicted)} {_ratio(case['device'], predicted)} "
            f"{_ms(case.get('dispatch'))[1:]} {case.get('launches', 0):8.0f}"
        )


def kernels(content: dict[str, Any]) -> Iterator[str]:
    """Where the model speaks of single kernels."""
    rows = [
        (name, one)
        for name, case in cases(content, "kernels").items()
        for one in case.get("compared", [])
    ]
    if rows:
        yield ""
    for name, one in rows:
        label = f"{name.rsplit('/', 2)[0]}: {one['name']}"
        yield (
            f"{label[:60]:60} {_ms(one['measured'])} {_ms(one['predicted'])} "
            f"{_ratio(one['measured'], one['predicted'])}"
        )


def opponents(content: dict[str, Any]) -> Iterator[str]:
    if content["entries"]:
        yield ""
    for entry in content["entries"]:
        ratio = "" if entry["ratio"] is None else f"{entry['ratio']:.2f}×"
        host = f"  host {_ms(entry['dispatch']).strip()}" if entry.get("dispatch") else ""
        yield (
            f"{entry['case']:38} {entry['contestant']:26} {_ms(entry['seconds'])} {ratio:>8}{host}"
        )


def training(content: dict[str, Any]) -> Iterator[str]:
    rows = {n: c for n, c in cases(content, "training").items() if c.get("step")}
    if rows:
        yield ""
    for name, case in rows.items():
        busy = case.get("busy share")
        yield (
            f"step, {name:16} {_ms(case['step'])} {_ms(case.get('predicted'))} "
            f"{_ratio(case['step'], case.get('predicted'))}  busy "
            f"{'?' if busy is None else f'{busy:.0%}'}, {case.get('launches', 0):.0f} launches, "
            f"waits {case.get('waits', {})}"
        )


def _ms(seconds: float | None) -> str:
    return f"{'':10}" if seconds is None else f"{seconds * 1e3:7.3f} ms"


def _ratio(measured: float | None, predicted: float | None) -> str:
    return f"{'':6}" if not measured or not predicted else f"{measured / predicted:5.2f}×"
