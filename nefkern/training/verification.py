"""Whether a run is what its record says: files, options, images, and steps done once more.

Nothing is written into the run's folder, and nothing in it is executed.
"""

from __future__ import annotations

import functools
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nefkern.data import TrainLoader
from nefkern.images.feature_cache import FeatureCache
from nefkern.ops import spmm
from nefkern.runtime import tensor_files
from nefkern.runtime.errors import UserError, first_line
from nefkern.runtime.tensor_files import DamagedFile
from nefkern.spectral.embedding import neighbour_lists
from nefkern.spectral.kmeans import KMeans
from nefkern.spectral.landmarks import chosen_rows
from nefkern.training.digests import (
    TOLERANCE,
    Digest,
    content_hash,
    difference,
    digest,
    graph_digest,
    image_hashes,
    is_exact,
    state_hashes,
)
from nefkern.training.edges import DatasetEdges, DatasetGraph, computed_graph
from nefkern.training.options import TrainOptions
from nefkern.training.parts import Parts
from nefkern.training.proof import recorded_options, take_state, watched
from nefkern.training.runs import STEPS, Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.spectral_model import SpectralModel
from nefkern.training.step import TrainingStep
from nefkern.training.teacher import FOLDER, Teacher
from nefkern.training.trainer import loader_of

OK, DIFFERS, OPEN = "ok", "DIFFERS", "not checked"

#: A weight may be so many learning rates away from a recorded one where hashes differ: Adam turns
#: the sign of a gradient that is nothing but rounding into a whole step, here and there.
_RATES = 2.5


class Check(NamedTuple):
    """What was looked at, how it came out (:data:`OK`, :data:`DIFFERS`, :data:`OPEN`), and why."""

    name: str
    outcome: str
    text: str

    def __str__(self) -> str:
        return f"{self.outcome:<11}  {self.name}: {self.text}"


class Wishes(NamedTuple):
    """What to verify.

    Attributes:
        steps: how many steps to repeat beside the last one, or batches of a spectral run.
        images: how many images to look at, of those that the record has.
        seed: of both choices.
        threads: None: as many as the run had.
    """

    steps: int = 5
    images: int = 1000
    seed: int = 0
    threads: int | None = None


def verify(run: Run, options: TrainOptions, wishes: Wishes, name: str = "") -> Iterator[Check]:
    """Every check of a run, as it is done.

    Args:
        run: the folder.
        options: its own, but for where things lie (``data_root``, ``weights``, ``device``).
        wishes: what to verify.
        name: of a run within another, for the checks' names.

    Raises:
        UserError: no record, or images and weights that are not there.
    """
    rows = run.steps()
    if not any(row["step"] > 0 for row in rows) or "options" not in rows[0]:
        raise UserError(
            f"{run.path(STEPS)}: expected the record of a run's steps; there is none of runs of "
            "several processes, with --record-steps 0, or of earlier versions"
        )
    yield from _files(run)
    yield from _options(run, rows[0])
    with tempfile.TemporaryDirectory() as folder:
        parts = _parts(options, run, Path(folder))
        yield _backbone(run, rows[0], parts)
        kind = _SpectralRun if options.method == "spectral" else _NeuralRun
        for check in kind(run, options, parts, rows, wishes).checks():
            yield check._replace(name=f"{name}{check.name}")


def _files(run: Run) -> Iterator[Check]:
    """The checksums of all tensors in the folder, and of the optimiser's state."""
    wrong = run.damage()
    yield Check("checkpoint", DIFFERS if wrong else OK, wrong or "is as its checksum says")
    damaged, paths = [], sorted(run.folder.rglob("*.safetensors"))
    for path in paths:
        try:
            tensor_files.check(path)
        except (DamagedFile, OSError) as error:
            damaged.append(f"{path.relative_to(run.folder)} ({first_line(error)})")
    text = f"damaged: {', '.join(damaged[:5])}" if damaged else f"{len(paths)} have their checksums"
    yield Check("files", DIFFERS if damaged else OK, text)


def _options(run: Run, first: dict[str, Any]) -> Iterator[Check]:
    """The configuration against the options that the record begins with."""
    now, then = recorded_options(run.options()), dict(first["options"])
    lengthened = run.config().get("lengthened", [])
    if lengthened:
        now["epochs"] = lengthened[0]["epochs_before"]
    changed = [
        f"{name} is {now[name]!r}, was {then[name]!r}"
        for name in sorted(now.keys() & then.keys())
        if now[name] != then[name]
    ]
    yield Check(
        "options", DIFFERS if changed else OK, "; ".join(changed) or f"{len(now)} are alike"
    )


def _parts(options: TrainOptions, run: Run, folder: Path) -> Parts:
    """Device, images and backbone; maps are computed anew, and rounded as a cache rounds them."""
    parts = Parts.of(options, run)
    if run.feature_cache(options) is not None:
        parts.features = FeatureCache(
            folder,
            parts.backbone,
            amp=options.amp,
            tf32=options.tf32,
            compiled=options.compile and options.method == "neural",
        )
    return parts


def _backbone(run: Run, first: dict[str, Any], parts: Parts) -> Check:
    known = {run.config().get("backbone", {}).get("digest"), first["backbone"]}
    found = parts.backbone.identity
    if known == {found}:
        return Check("backbone", OK, f"its weights are {found}")
    told = " and ".join(sorted(map(str, known)))
    return Check("backbone", DIFFERS, f"its weights are {found}, were {told}")


def _tolerance(options: TrainOptions, parts: Parts) -> float:
    halves = options.amp or (options.tf32 and parts.device.type == "cuda")
    return TOLERANCE["rounded" if halves else "float32"]


def _images(name: str, wrong: list[str], looked_at: int, of: int) -> Check:
    if not wrong:
        every = "all" if looked_at == of else f"of {of}"
        return Check(name, OK, f"{looked_at} are alike ({every})")
    return Check(name, DIFFERS, f"{len(wrong)} of {looked_at}: {', '.join(wrong[:5])}")


class _Recorded:
    """A run and the rows of its record.

    Attributes:
        tolerance: of numbers that the machine rounds.
    """

    def __init__(
        self,
        run: Run,
        options: TrainOptions,
        parts: Parts,
        rows: list[dict[str, Any]],
        wishes: Wishes,
    ) -> None:
        self.run, self.options, self.parts = run, options, parts
        self.rows, self.wishes = rows, wishes
        self.tolerance = _tolerance(options, parts)
        self._begin()

    def _begin(self) -> None:
        """What one kind of run needs besides."""
        raise NotImplementedError

    def checks(self) -> Iterator[Check]:
        """Each as it is done."""
        raise NotImplementedError


class _NeuralRun(_Recorded):
    """A run that trained ψ."""

    def _begin(self) -> None:
        rows = self.rows
        self.rows = [row for row in rows if row["step"] > 0]
        self.kappa = next((r["dataset_kappa"] for r in rows[::-1] if "dataset_kappa" in r), None)
        self.full = [row for row in self.rows if "after" in row]
        self._loaders: dict[int, TrainLoader] = {}  # by batch size
        self.edges: DatasetEdges | None = None
        self.step: TrainingStep | None = None

    def checks(self) -> Iterator[Check]:
        if self.options.edges == "dataset":
            yield self._dataset_graph()
        if self.options.teacher == "spectral":
            yield from self._teacher()
        yield self._first_epoch()
        yield from self._steps()
        yield self._checkpoint()

    def _dataset_graph(self) -> Check:
        graph = DatasetGraph.load(self.run)
        if graph is None or self.kappa is None:
            return Check("κ of the data set", OPEN, "none is kept")
        self.edges = DatasetEdges(graph.to(self.parts.device), self.parts.dataset, self.options)
        if not is_exact(self.kappa, graph_digest(graph.kappa)):
            return Check("κ of the data set", DIFFERS, "the file is not what was recorded")
        found = graph_digest(computed_graph(self.options, self.run, self.parts).kappa)
        return _compared("κ of the data set", self.kappa, found, self.tolerance)

    def _teacher(self) -> Iterator[Check]:
        run = Run(self.run.path(FOLDER))
        same = {n: getattr(self.options, n) for n in ("data_root", "weights", "device", "strict")}
        options = run.options()
        for name, value in same.items():
            setattr(options, name, value)
        yield from verify(run, options, self.wishes, "teacher: ")

    def _first_epoch(self) -> Check:
        """Images by their hashes, of the first epoch, in which each is seen."""
        rows = [row for row in self.rows if row["epoch"] == 0]
        total = sum(len(row["images"]) for row in rows)
        random.Random(self.wishes.seed).shuffle(rows)
        wrong, looked_at = [], 0
        for row in rows:
            if looked_at >= self.wishes.images:
                break
            names, images = self._batch(row)
            wrong += _unlike(row["images"], image_hashes(images), names)
            looked_at += len(names)
        return _images("images", wrong, looked_at, total)

    def _batch(self, row: dict[str, Any]) -> tuple[list[str], Tensor]:
        """Names and pixels of a step's images."""
        loader = self._loader(row["batch_size"])
        accumulate = self.options.accumulate
        first = row["at"] * accumulate
        views = [v for i in range(accumulate) for v in loader.views_of(row["epoch"], first + i)]
        names = [self.parts.dataset.names[view.index] for view in views]
        return names, torch.stack([view.image for view in views])

    def _loader(self, batch_size: int) -> TrainLoader:
        if batch_size not in self._loaders:
            self._loaders[batch_size] = loader_of(
                self.options, self.parts.dataset, self.edges, batch_size
            )
        return self._loaders[batch_size]

    def _steps(self) -> Iterator[Check]:
        """The last recorded step, and some of the others."""
        if not self.full:
            yield Check("steps", OPEN, "none is recorded that could be repeated")
            return
        others = self.full[:-1]
        draw = random.Random(self.wishes.seed)
        chosen = draw.sample(others, min(self.wishes.steps, len(others)))
        for row in sorted([*chosen, self.full[-1]], key=lambda row: row["step"]):
            yield self._repeated(row)

    def _repeated(self, row: dict[str, Any]) -> Check:
        name = f"step {row['step']}"
        names, images = self._batch(row)
        if wrong := _unlike(row["images"], image_hashes(images), names):
            return Check(name, DIFFERS, f"its images: {', '.join(wrong[:5])}")
        torch.set_num_threads(self.wishes.threads or row["threads"])
        self.step = TrainingStep(self.options, self.parts.backbone, self.parts.features)
        path = self.run.state_path(row["step"])
        try:
            take_state(self.step, tensor_files.unpacked(path)[0], path)
        except (DamagedFile, FileNotFoundError, KeyError, ValueError) as error:
            return Check(name, DIFFERS, f"the state before it cannot be read ({first_line(error)})")
        if self.options.teacher == "spectral":
            self.step.teacher = self._loaded_teacher
        graph = None
        if self.edges is not None:
            graph = self.edges.graph(row["batch_size"], row["epoch"], row["at"])
        with watched(self.step) as found:
            self.step(images, self._progress(row), row["step"], graph)
        return self._judged(name, row, found)

    def _progress(self, row: dict[str, Any]) -> float:
        steps = len(self._loader(row["batch_size"])) // self.options.accumulate
        epochs = self.options.epochs
        for entry in reversed(self.run.config().get("lengthened", [])):
            if row["step"] <= entry["after_step"]:
                epochs = entry["epochs_before"]
        return (row["epoch"] + row["at"] / steps) / epochs

    @functools.cached_property
    def _loaded_teacher(self) -> Teacher:
        run = Run(self.run.path(FOLDER))
        pairs = self.options.graph().pixel_graphs
        model = SpectralModel.from_state(run.load()[0], pairs, run.folder)
        return Teacher(model.to(self.parts.device), self.parts.backbone, self.options)

    def _judged(self, name: str, row: dict[str, Any], found: dict[str, Any]) -> Check:
        """A step done once more against its row."""
        if moved := _other_hashes(row["before"], found["before"]):
            return Check(name, DIFFERS, f"ψ before it: {_some(moved)}")
        exact = True
        pairs = [
            (part, old[part], new.get(part))
            for old, new in zip(row["graphs"], found["graphs"], strict=False)
            for part in old
        ] + [(part, row[part], found[part]) for part in ("gradient", "update")]
        if len(row["graphs"]) != len(found["graphs"]) or any(new is None for *_, new in pairs):
            return Check(name, DIFFERS, "it has other graphs than were recorded")
        for part, old, new in pairs:
            strict = part == "kappa" and exact  # the kernels give the same bits for the same input
            if text := difference(old, new, 0.0 if strict else self._allowed(part)):
                return Check(name, DIFFERS, f"{_TITLES.get(part, part)} {text}")
            exact = exact and is_exact(old, new)
        if exact and (moved := _other_hashes(row["after"], found["after"])):
            return Check(name, DIFFERS, f"ψ after it: {_some(moved)}")
        parts = ", ".join(_TITLES.get(part, part) for part in row["graphs"][0])
        how = "to the bit" if exact else f"but for rounding (below {self.tolerance:g})"
        return Check(name, OK, f"images, {parts}, gradient and ψ are alike {how}")

    def _allowed(self, part: str) -> float:
        """Of one kind of numbers: Adam enlarges the rounding of small gradients."""
        return 10 * self.tolerance if part == "update" else self.tolerance

    def _checkpoint(self) -> Check:
        """ψ of the checkpoint against what the last recorded step left."""
        name = "ψ"
        loaded = self.run.load()
        if loaded is None:
            return Check(name, DIFFERS, "there is no checkpoint")
        weights, metadata = loaded
        last = self.full[-1] if self.full else None
        if last is None or str(last["step"]) != metadata.get("step"):
            return Check(
                name,
                OPEN,
                f"the checkpoint is of step {metadata.get('step')}, which is not recorded: the run "
                "was stopped before its end",
            )
        if moved := _other_hashes(last["after"], state_hashes(weights)):
            return Check(name, DIFFERS, f"the checkpoint is not what step {last['step']} left: "
                         f"{_some(moved)}")  # fmt: skip
        apart = self._apart(weights)
        if apart > 1:
            return Check(
                name, DIFFERS, f"the checkpoint is {apart:.2g} times too far from step "
                f"{last['step']} done once more"
            )  # fmt: skip
        how = "" if apart else ", to the bit"
        return Check(name, OK, f"the checkpoint is what step {last['step']} leaves{how}")

    def _apart(self, weights: dict[str, Tensor]) -> float:
        """The largest distance of a weight from the one repeated, over what is allowed."""
        if self.step is None:
            return math.inf
        allowed = _RATES * float(self.step.optimizer.param_groups[0]["lr"])
        repeated, most = self.step.psi.state_dict(), 0.0
        for name, weight in weights.items():
            other = repeated[name].detach().cpu()
            if not weight.is_floating_point() or torch.equal(weight, other):
                continue
            most = max(
                most, float(((weight - other).abs() / (allowed + 1e-5 * weight.abs())).max())
            )
        return most


_TITLES = {"kappa": "κ", "outputs": "ψ's outputs", "targets": "the teacher's targets"}


def _compared(name: str, old: Digest, new: Digest, tolerance: float) -> Check:
    text = difference(old, new, tolerance)
    how = "to the bit" if is_exact(old, new) else f"but for rounding (below {tolerance:g})"
    return Check(name, DIFFERS if text else OK, text or f"is alike {how}")


def _unlike(old: list[str], new: list[str], names: list[str]) -> list[str]:
    """Names of images whose hashes differ."""
    if len(old) != len(new):
        return [f"{len(new)} images, were {len(old)}"]
    return [name for name, a, b in zip(names, old, new, strict=True) if a != b]


def _other_hashes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Names of tensors that differ."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _Repeated(SpectralTrainer):
    """A spectral run's checkpoint, and its images read once more; nothing is written."""

    def _open(self) -> tuple[dict[str, Tensor], int]:
        found = self.run.load()
        if found is None:
            raise UserError(f"{self.run.folder}: expected a checkpoint, there is none")
        return found[0], int(found[1]["step"])


class _SpectralRun(_Recorded):
    """A run of ``--method spectral``: its κ, eigenpairs, rows and clusters."""

    def _begin(self) -> None:
        self.told = {row["stage"]: row for row in self.rows if "stage" in row}
        self.trainer = _Repeated(self.options, self.run, self.parts)

    def checks(self) -> Iterator[Check]:
        if not {"features", "eigenpairs", "clusters"} <= self.told.keys():
            raise UserError(f"{self.run.path(STEPS)}: expected a finished run; --resume ends it")
        torch.set_num_threads(self.wishes.threads or self.told["features"]["threads"])
        tensors = self.trainer.tensors
        moved = _other_hashes(self.told["clusters"]["checkpoint"], state_hashes(tensors))
        text = f"differs from what was recorded: {_some(moved)}" if moved else "is as recorded"
        yield Check("model", DIFFERS if moved else OK, text)
        self.model = self.trainer._model().to(self.parts.device)
        yield from self._features()
        if not self._whole:
            yield Check(
                "κ, eigenpairs, clusters",
                OPEN,
                f"--keep {self.options.keep} left a part of the patches: to verify them too, "
                "train with --keep float16",
            )
            return
        yield from self._eigenpairs()
        yield from self._clusters()

    @property
    def _whole(self) -> bool:
        """Whether all patches are kept."""
        patches = len(self.told["features"]["images"]) * self.trainer._cells()
        return len(self.model.embedding.rows) == patches

    def _features(self) -> Iterator[Check]:
        """Every image of the graph by its hash; the rows of some batches computed once more."""
        told, trainer = self.told["features"], self.trainer
        size = self.options.batch_size
        batches = range(-(-len(told["images"]) // size))
        draw = random.Random(self.wishes.seed)
        chosen = set(draw.sample(batches, min(self.wishes.steps, len(batches))))
        hashes, near, apart, images = [], [], [], 0
        for number, batch in enumerate(trainer._batches()):
            hashes += image_hashes(batch)
            first = images * trainer._cells()
            images += len(batch)
            if trainer._pairs and self._whole:
                height, width = batch.shape[-2:]
                grid = self.parts.backbone.grid((height, width))
                near.append(trainer._pixel_lists(batch, grid, first))
            if number in chosen:
                apart.append(self._rows_apart(batch, first))
        names = [self.parts.dataset.names[index] for index in trainer.indices]
        wrong = _unlike(told["images"], hashes, names)
        if told["indices"] != trainer.indices:
            wrong = wrong or ["others can be read than then"]
        yield _images("images", wrong, len(hashes), len(hashes))
        self.pixel = torch.cat(near) if near else None
        most, name = max(apart, default=0.0), f"rows of {len(apart)} batches"
        if most > self.tolerance:
            yield Check(name, DIFFERS, f"by {most:.2g} (up to {self.tolerance:g} is rounding)")
        else:
            how = f"but for rounding ({most:.1g})" if most else "to the bit"
            yield Check(name, OK, f"are alike {how}")

    def _rows_apart(self, batch: Tensor, first: int) -> float:
        """The largest distance of a patch's row, of length 1, from the one that is kept."""
        features = self.parts.features(batch.to(self.parts.device))
        kept = self.model.embedding.rows
        rows = self.model.rows(features).to(kept.dtype)
        places = torch.arange(first, first + len(rows))
        if not self._whole:
            total = len(self.told["features"]["images"]) * self.trainer._cells()
            chosen = chosen_rows(total, len(kept), self.options.seed)
            inside = (chosen >= first) & (chosen < first + len(rows))
            rows = rows[(chosen[inside] - first).to(rows.device)]
            places = inside.nonzero().flatten()
        if not len(places):
            return 0.0
        kept = kept[places.to(kept.device)]
        return float((rows.float() - kept.float()).norm(dim=1).max())

    def _eigenpairs(self) -> Iterator[Check]:
        """κ once more from the kept rows, and how far θ and v are from eigenpairs of it."""
        embedding, trainer = self.model.embedding, self.trainer
        told = self.told["eigenpairs"]
        trainer.tensors = {"rows": embedding.rows}
        if self.pixel is not None:
            trainer.tensors["pixel"] = self.pixel
        lists = neighbour_lists(embedding.rows, embedding.k, "cosine")
        graph = trainer._kappa(lists)
        yield _compared("κ of the data set", told["kappa"], graph_digest(graph), self.tolerance)
        moved = difference(told["vectors"], digest(embedding.vectors), 0.0)
        yield Check("eigenvectors", DIFFERS if moved else OK, moved or "are as recorded")
        values, vectors = embedding.values.to(graph.device), embedding.vectors
        residuals = (spmm(graph, vectors) - vectors * values.to(vectors.dtype)).double()
        found = residuals.square().sum(0).sqrt().cpu()
        scale = float(values.abs().max())
        wrong = (found - embedding.residuals).abs() > 1e-2 * embedding.residuals + 2e-6 * scale
        worst = float((found - embedding.residuals).abs().max()) if len(found) else 0.0
        text = f"|κv − θv| of {len(found)} pairs is as recorded, {float(found.max()):.2g} at most"
        if wrong.any():
            pairs = [str(i) for i in wrong.nonzero().flatten().tolist()]
            text = f"|κv − θv| of pairs {_some(pairs)} are not as recorded, by {worst:.2g}"
        yield Check("residuals", DIFFERS if wrong.any() else OK, text)

    def _clusters(self) -> Iterator[Check]:
        """K-means once more on the kept eigenvectors, and the patches' clusters."""
        model = self.model
        if model.spanned is not None:
            again = model.span().spanned
            apart = float((again - model.spanned).norm() / model.spanned.norm().clamp_min(1e-30))
            outcome = DIFFERS if apart > 1e-5 else OK
            yield Check("spanned features", outcome, f"are {apart:.2g} of their norm apart")
        rows = model.cluster_rows(model.embedding.vectors)
        labels = model.kmeans.predict(rows)
        same = content_hash(labels) == self.told["clusters"]["labels"]
        fitted = KMeans(self.options.num_eigenfunctions, self.options.seed).fit(rows)
        share = float((fitted.predict(rows) == labels).double().mean())
        exact = torch.equal(fitted.centers, model.kmeans.centers)
        if not same or share < 0.999:
            yield Check(
                "clusters",
                DIFFERS,
                f"{share:.2%} of {len(labels)} patches have the same one by K-means done once more",
            )
        else:
            how = "to the bit" if exact else f"for {share:.2%} of them"
            yield Check("clusters", OK, f"K-means gives {len(labels)} patches the same, {how}")
        self.model.kmeans = fitted
        temperature = self.model.calibrated().temperature
        apart = abs(temperature / model.temperature - 1) if model.temperature else math.inf
        yield Check(
            "temperature", DIFFERS if apart > 1e-2 else OK, f"fitted again it is {temperature:.4g}"
        )
