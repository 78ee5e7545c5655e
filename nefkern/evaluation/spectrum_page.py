"""How a comparison with exact eigenvectors is told: its result as text and as a picture."""

from __future__ import annotations

import io
from typing import Any

from nefkern.segmentation.tables import aligned

RESULT, PLOT = "spectrum.json", "spectrum.png"


def shown_rows(count: int) -> list[int]:
    """The j that the table shows, from 1: powers of two, and the last."""
    return sorted({*(2**p for p in range(count.bit_length())), count})


def describe(result: dict[str, Any]) -> str:
    """All there is to read, as text.

    Args:
        result: what the command writes as JSON.
    """
    s, values, functions = result["settings"], result["eigenvalues"], result["functions"]
    kind = "quantised" if result["quantized"] else "continuous"
    title = (
        f"{s['data_root']}, {s['split']}: {s['images']} images, seed {s['seed']}; κ has "
        f"{result['nodes']} nodes and {result['edges']} entries; "
        f"K = {result['num_eigenfunctions']}, {kind}"
    )
    summary = [("span of", "dimension", "dead", "Σ Ritz", "captured trace", "mean inside")]
    summary.append(("exact eigenvectors", str(len(values)), "", f"{sum(values):.2f}", "", ""))
    for name, fit in functions.items():
        inside = sum(fit["inside"]) / len(values)
        shares = f"{100 * fit['captured']:.1f} %", f"{inside:.3f}"
        summary.append(
            (name, str(fit["rank"]), str(fit["dead"]), f"{sum(fit['ritz']):.2f}", *shares)
        )
    columns = ("ritz", "rayleigh", "inside", "angles")
    heads = ("Ritz", "Rayleigh", "inside", "angle")
    tables = []
    for name, fit in functions.items():
        rows = [("j", "λ_j", *heads)]
        for j in shown_rows(len(values)):
            cells = [_cell(fit[c], j, ".1f" if c == "angles" else ".3f") for c in columns]
            rows.append((str(j), f"{values[j - 1]:.3f}", *cells))
        tables.append(f"{name}:\n{aligned(rows, left=0)}")
    parts = [title, aligned(summary, left=1), *tables]
    if "scores" in result:
        parts.append(describe_scores(result["scores"]))
    return "\n\n".join(parts)


def describe_scores(scores: dict[str, dict[str, float]]) -> str:
    """The table of ``--score``."""
    rows = [("patches clustered by", "IoU vote: accuracy", "mIoU", "count vote: accuracy", "mIoU")]
    for name, score in scores.items():
        rows.append((name, *(f"{100 * value:.1f}" for value in score.values())))
    return f"Scores in %, every pixel with its patch's cluster:\n{aligned(rows, left=1)}"


def _cell(values: list[float], j: int, form: str) -> str:
    return format(values[j - 1], form) if j <= len(values) else "-"


def draw(result: dict[str, Any]) -> bytes:
    """Eigenvalues, eigenvectors inside the span, and angles over j: a PNG."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(_numbers(result["eigenvalues"]), result["eigenvalues"], "k", label="exact λ")
    for number, (name, fit) in enumerate(result["functions"].items()):
        style = {"color": f"C{number}", "linewidth": 1.2}
        left.plot(_numbers(fit["ritz"]), fit["ritz"], label=f"Ritz, {name}", **style)
        quotients = fit["rayleigh"]
        left.plot(_numbers(quotients), quotients, ":", label=f"Rayleigh, {name}", **style)
        middle.plot(_numbers(fit["inside"]), fit["inside"], label=name, **style)
        right.plot(_numbers(fit["angles"]), fit["angles"], label=name, **style)
    left.set(title="Spectrum of κ", xlabel="j, each sorted", ylabel="eigenvalue or quotient")
    middle.set(title="Eigenvector v_j inside the span", xlabel="j", ylabel="|Qᵀv_j|²")
    right.set(title="Principal angles to the eigenvectors' span", xlabel="j", ylabel="degrees")
    middle.set_ylim(0, 1.02)
    right.set_ylim(0, 92)
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def _numbers(values: list[float]) -> range:
    return range(1, len(values) + 1)
