"""What a person looks at after training: overlays and a page with the curves (``report.html``)."""

from __future__ import annotations

import html
import logging
import urllib.parse
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from nefkern.data import ImageDataset
from nefkern.evaluation.spectrum_page import PLOT as SPECTRUM_PLOT
from nefkern.evaluation.spectrum_page import RESULT as SPECTRUM
from nefkern.evaluation.spectrum_page import describe as describe_spectrum
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import make_folder, remove_parts, replace_file
from nefkern.runtime.structured import parse_json
from nefkern.segmentation.charts import eigenfunction_maps, svg
from nefkern.segmentation.pictures import overlay, palette, write_png
from nefkern.segmentation.segmenter import Segmenter
from nefkern.segmentation.tables import describe
from nefkern.spectral.merging import ward
from nefkern.training.runs import CHECKPOINT, CLUSTERS, Run

log = logging.getLogger(__name__)

REPORT = "report.html"

#: Panels of the page: title, the record's keys, and what to read off them. Steps of regression have
#: the first one's, those of the objective others; a panel without any is left out.
PANELS = (
    ("Teacher", ("regression", "cosine"), "loss, should fall; agreement with the targets"),
    ("Objective", ("loss",), "should fall"),
    ("Mean Rayleigh quotient", ("trace",), "tr R / K: do joined patches agree? should rise"),
    ("Penalty", ("penalty",), "keeps the functions apart"),
    ("Mean |R_ij|, i ≠ j", ("off_diagonal",), "overlap of functions; should fall"),
    ("Clusters", ("live", "dead"), "live: win a patch of the batch; dead: hardly used at all"),
    (
        "Confidence",
        ("confidence", "temperature"),
        "of the winning cluster; noise temperature",
    ),
)

#: What tells a row of a spectral run's record apart, and the tensors of its checkpoint to plot.
_PLACE = ("step", "stage")
_SPECTRUM = ("embedding.values", "embedding.residuals")
#: K-means in a spectral run's checkpoint.
_CENTRES = ("kmeans.centers", "kmeans.counts")

#: Steps drawn in a curve: more cannot be told apart, and would weigh megabytes.
POINTS = 500

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
       color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
img { max-width: 100%; display: block; margin: .3rem 0 }
figure { margin: 0 0 1.2rem } figcaption { color: #666; font-size: .85rem }
table { border-collapse: collapse; font-size: .85rem }
td, th { border-bottom: 1px solid #ddd; padding: .15rem .8rem .15rem 0; text-align: left }
"""

CURVES = (
    "<p>None of these curves says how good the segments are: the pictures do, and, with annotated "
    "images, <code>python -m nefkern.evaluate</code>.</p>"
)
SCORES = (
    "<p>Each cluster counts as the class it was matched to, over all images (by IoU: the class it "
    "overlaps best; by count: the most frequent one in it). Accuracy: the share of pixels of the "
    "right class. IoU: of a class, the pixels both predicted and annotated over those that are "
    "either; mIoU is the mean over classes. In %.</p>"
)
STAGES = (
    "<p>Left, the leading eigenvalues of the graph's κ: how slowly the eigenvectors, in their "
    "order, change from a patch to those that it is joined to. Many near the largest mean that "
    "many groups of patches are nearly apart. Right, how far each pair is from exact: "
    "|κv − λv|.</p>"
)
TREE = (
    "<p>Two clusters, or groups of clusters, are joined at the height of their distance (Ward's: "
    "what K-means' inertia rises by). <code>python -m nefkern.segment --classes N</code> cuts the "
    "tree where N branches are left, <code>python -m nefkern.evaluate --merge N</code> scores "
    "them.</p>"
)
EIGENMAPS = (
    "<p>The functions' raw values on the patches of an image, each over its own range: "
    "<code>python -m nefkern.eigenmaps --help</code> says which, and what the colours mean.</p>"
)
SPECTRA = (
    "<p>How much of the graph's exact leading eigenvectors, which training approximates, the "
    "learned functions hold; <code>python -m nefkern.spectrum --help</code> explains every "
    "column.</p>"
)


#: What a file with other content than this version's leads to.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def write_overlays(run: Run, segmenter: Segmenter, dataset: ImageDataset, count: int) -> None:
    """Draw "image | clusters | blend" of the first ``count`` readable images to ``overlays/``."""
    folder = run.path("overlays")
    make_folder(run.folder, folder)
    remove_parts(folder)
    colours, drawn = palette(segmenter.num_clusters), 0
    for index in tqdm(range(len(dataset)), desc="overlays", leave=False):
        if drawn == count:
            break
        try:
            image = dataset.image(index)
            segmenter.check_size(image, dataset.paths[index])
        except UserError as error:  # reported and skipped, as in training
            log.warning("no overlay: %s", error)
            continue
        picture = overlay(image, segmenter(image), colours=colours)
        write_png(picture, folder / f"{dataset.names[index]}.png")
        drawn += 1


def write_eigenfunctions(run: Run, segmenter: Segmenter, dataset: ImageDataset) -> None:
    """Draw the eigenfunctions of the first readable image to ``eigenfunctions.png``."""
    for index in range(len(dataset)):
        try:
            image = dataset.image(index)
            segmenter.check_size(image, dataset.names[index])
        except UserError:  # reported with the overlays
            continue
        predict, pixels, *_ = segmenter.at_training_scale(image)
        logits, _ = predict(pixels[None])
        probabilities = segmenter.probabilities(logits[0].float()).cpu()
        write_png(eigenfunction_maps(image, probabilities), run.path("eigenfunctions.png"))
        return


def curves(rows: list[dict[str, Any]]) -> str:
    """The record as one SVG of small panels."""
    from matplotlib.figure import Figure

    rows = rows[:: max(1, len(rows) // POINTS)]
    panels = [panel for panel in PANELS if any(panel[1][0] in row for row in rows)]
    if not panels:
        return ""
    lines = -(-len(panels) // 3)
    figure = Figure(figsize=(11, 2.7 * lines), layout="constrained")
    axes = figure.subplots(lines, 3).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, keys, meaning) in zip(axes, panels, strict=False):
        for key in keys:
            having = [row for row in rows if isinstance(row.get(key), (int, float))]
            steps, values = [float(row["step"]) for row in having], [row[key] for row in having]
            axis.plot(steps, values, label=key, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"step; {meaning}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(keys) > 1:
            axis.legend(fontsize=8)
    return svg(figure)


def eigenvalues(values: Tensor, residuals: Tensor) -> str:
    """λ and |κv − λv| over j as one SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = range(1, len(values) + 1)
    left.plot(numbers, values.tolist(), linewidth=1.2)
    left.set(title="Eigenvalues λ_j", xlabel="j")
    right.semilogy(numbers, residuals.clamp_min(1e-16).tolist(), linewidth=1.2)
    right.set(title="Residuals |κv_j − λ_j v_j|", xlabel="j")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return svg(figure)


def dendrogram(centers: Tensor, counts: Tensor) -> str:
    """Ward's tree of K-means' clusters as one SVG."""
    from matplotlib.figure import Figure
    from scipy.cluster import hierarchy

    tree = ward(centers, counts).numpy()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axis = figure.subplots()
    size = max(2, min(8, 900 / len(centers)))
    hierarchy.dendrogram(tree, ax=axis, leaf_font_size=size, color_threshold=0)
    axis.set(xlabel="cluster", ylabel="distance")
    return svg(figure)


def _tree(run: Run) -> list[str]:
    """How the run's clusters merge, if K-means made them."""
    found = run.part(*_CENTRES) if run.path(CHECKPOINT).exists() else {}
    if not found and run.path(CLUSTERS).exists():
        try:
            kept = run.load_clusters() or {}
        except UserError:  # told where clusters are needed
            kept = {}
        found = {f"kmeans.{name}": tensor for name, tensor in kept.items()}
    if any(name not in found for name in _CENTRES) or len(found[_CENTRES[0]]) < 2:
        return []
    picture = dendrogram(*(found[name] for name in _CENTRES))
    return ["<h2>How clusters merge</h2>", picture, TREE]


def write_report(run: Run) -> Path:
    """Write ``report.html``: curves, overlays, scores if any, and the configuration."""
    rows, config = run.metrics(), run.config()
    options = config["options"]
    title = f"{run.folder.name}: K = {options['num_eigenfunctions']}, {options['backbone']}"
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(_introduction(config))}</p>",
    ]
    if options.get("method") == "spectral":
        parts += _stages(run, rows)
    elif rows:
        parts += [
            f"<p>{html.escape(_summary(rows, config))}</p>",
            "<h2>Training</h2>",
            curves(rows),
            CURVES,
        ]
    parts += [
        "<h2>Segments</h2>",
        "<p>Image, clusters, and both together. Nobody told the "
        "clusters what to mean; a colour is the same cluster in every picture.</p>",
    ]
    parts += map(_figure, sorted(run.path("overlays").glob("*.png")))
    if run.path("eigenfunctions.png").exists():
        parts += [
            "<h2>Eigenfunctions</h2>",
            "<p>The first image and the clusters of most weight in it, patch by patch, each scaled "
            "to its own largest value: white where a cluster wins.</p>"
            "<img src='eigenfunctions.png' alt='eigenfunctions'>",
        ]
    if maps := sorted(run.path("eigenmaps").glob("*.png")):
        parts += ["<h2>Eigenfunctions of single images</h2>", EIGENMAPS, *map(_figure, maps)]
    parts += _tree(run)
    for scores in sorted(run.folder.glob("evaluation-*.json")):
        try:
            text = describe(parse_json(scores.read_text("utf-8")))
        except _DAMAGED as error:  # damaged, or of another version
            text = f"not readable: {error}"
        heading = f"<h2>{html.escape(scores.stem)}</h2>"
        parts += [heading, SCORES, f"<pre>{html.escape(text)}</pre>"]
        parts += map(_figure, sorted(scores.with_suffix("").glob("*.[sp][vn]g")))
    parts += _spectrum(run)
    cells = "".join(
        f"<tr><th>{html.escape(str(k))}<td>{html.escape(str(v))}"
        for k, v in {**options, **config["versions"]}.items()
    )
    parts += ["<h2>Configuration</h2>", f"<table>{cells}</table>"]
    page = run.path(REPORT)
    replace_file(page, "\n".join(parts))
    return page


def _figure(picture: Path) -> str:
    """A picture in a folder of the run, with its name below."""
    source = urllib.parse.quote(f"{picture.parent.name}/{picture.name}")
    return (
        f"<figure><img src='{source}' loading=lazy alt='{html.escape(picture.name)}'>"
        f"<figcaption>{html.escape(picture.stem)}</figcaption></figure>"
    )


def _stages(run: Run, rows: list[dict[str, Any]]) -> list[str]:
    """What a spectral run computed, stage by stage, and its eigenvalues."""
    cells = "".join(
        f"<tr><th>{html.escape(str(row['stage']))}<td>"
        + html.escape(
            ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in row.items() if k not in _PLACE)
        )
        for row in rows
    )
    parts = ["<h2>Stages</h2>", f"<table>{cells}</table>"]
    found = run.part(*_SPECTRUM) if run.path(CHECKPOINT).exists() else {}
    if len(found) == len(_SPECTRUM):
        parts += ["<h2>Eigenvalues</h2>", eigenvalues(*(found[name] for name in _SPECTRUM)), STAGES]
    return parts


def _spectrum(run: Run) -> list[str]:
    """What ``python -m nefkern.spectrum`` found, if it has run."""
    if not run.path(SPECTRUM).exists():
        return []
    try:
        text = describe_spectrum(parse_json(run.path(SPECTRUM).read_text("utf-8")))
    except _DAMAGED as error:  # damaged, or of another version
        text = f"not readable: {error}"
    return [
        "<h2>Spectrum</h2>",
        SPECTRA,
        f"<figure><img src='{SPECTRUM_PLOT}' alt='eigenvalues and angles'></figure>",
        f"<pre>{html.escape(text)}</pre>",
    ]


def _introduction(config: dict[str, Any]) -> str:
    """What was done, for somebody who has not read the paper."""
    options, patch = config["options"], config["backbone"]["patch"]
    graph = (
        f"{config['dataset']['images']} images in patches of {patch} × {patch} pixels. A network "
        f"that stays as it is ({options['backbone']}) describes every patch; patches that it finds "
        "alike, or that are near in place and colour, are joined into a graph. "
    )
    if options.get("method") == "spectral":
        return (
            f"{graph}The functions on the patches that differ least between joined ones, the "
            "graph's leading eigenvectors, were computed, with no training, and patches of like "
            f"values grouped into K = {options['num_eigenfunctions']} clusters by K-means. No "
            "labels of these images were used."
        )
    taught = options.get("teacher") == "spectral"
    return (
        f"{graph}A second, small network learned K = {options['num_eigenfunctions']} functions on "
        "the patches that differ little between joined ones (in the paper's words: ψ, the graph's "
        f"eigenfunctions){', first from the eigenvectors, computed exactly' if taught else ''}. "
        "The function that is largest at a patch is its cluster. No labels of "
        "these images were used."
    )


def _summary(rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    last = rows[-1]
    parts = [f"after step {part['after_step']}" for part in config.get("lengthened", [])]
    begun_again = f", trained longer {' and '.join(parts)}" if parts else ""
    text = f"{last['step']} steps, {last['epoch']} epochs{begun_again}. "
    if taught := [row for row in rows if "regression" in row]:
        text += (
            f"Regression on the teacher in {len(taught)} steps, mean cosine "
            f"{taught[0]['cosine']:.3f} → {taught[-1]['cosine']:.3f}. "
        )
    if own := [row for row in rows if "loss" in row]:
        text += (
            f"Objective {own[0]['loss']:.3e} → {own[-1]['loss']:.3e}, "
            f"mean Rayleigh quotient {own[0]['trace']:.3f} → {own[-1]['trace']:.3f}, "
            f"{own[-1]['live']} clusters live in the last batch, {own[-1]['dead']} dead."
        )
    return text.rstrip()
