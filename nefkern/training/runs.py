"""A run folder: configuration, checkpoints that survive a kill, and the record of every step."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nefkern.runtime.errors import UserError, first_line
from nefkern.runtime.files import remove_parts, replace_file
from nefkern.training.options import TrainOptions, converted, upgraded
from nefkern.version import __version__

CONFIG, CHECKPOINT, METRICS = "config.yaml", "checkpoint.safetensors", "metrics.jsonl"
CLUSTERS, GRAPH = "clusters.safetensors", "graph.safetensors"

#: What a run of ``--method spectral`` computes, in this order; each is kept in the checkpoint.
STAGES = ("features", "eigenpairs", "clusters")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version(), "nefkern": __version__}
    for package in ("torch", "torchvision", "timm", "numpy", "scipy", "pillow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


#: Options that do not change what a run computes.
FREE_OPTIONS = frozenset(
    ("resume", "out", "pictures", "workers", "checkpoint_seconds", "device", "strict")
)


#: What runs did before an option was there, where that is not its default.
BEFORE = {"input_size": "crop", "method": "neural"}


def _differ(name: str, before: Any, now: Any) -> bool:
    if name == "feature_cache":  # maps in it are rounded; where it lies is of no consequence
        return bool(before) != bool(now)
    return before != now


def _in_one_order(checkpoint: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: their order is random in what ``save``
    makes, and equal runs are to have equal files."""
    size = int.from_bytes(checkpoint[:8], "little")
    header = json.loads(checkpoint[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return checkpoint[:8] + text.ljust(size) + checkpoint[8 + size :]


class Run:
    """The folder of one training run.

    The checkpoint's weights and the optimiser's state are two files; the weights name the state
    that belongs to them and are replaced last, so that both are always of the same step.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def create(cls, options: TrainOptions, *, longer: bool = False) -> Run:
        """Make the run's folder, or take the one to resume.

        Args:
            options: all of them; checked.
            longer: a run to resume may be of fewer epochs, and is then trained on.

        Raises:
            UserError: it holds a run and ``--resume`` was not given, or one of other options.
        """
        run = cls(options.run_folder())
        if run.folder.exists() and not run.folder.is_dir():
            raise UserError(f"--out {run.folder}: is a file; expected a folder to make")
        if run.path(CONFIG).exists():
            if not options.resume:
                raise UserError(
                    f"--out {run.folder}: holds a run already; --resume goes on with it, "
                    "another --out starts a new one"
                )
            if run.path(CHECKPOINT).exists():
                run._check_same(options, longer)
        elif run.folder.exists() and any(run.folder.iterdir()):
            raise UserError(f"--out {run.folder}: is not empty and holds no run")
        run.folder.mkdir(parents=True, exist_ok=True)
        remove_parts(run.folder)
        return run

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.folder / name

    def _check_same(self, options: TrainOptions, longer: bool) -> None:
        before = self.options()
        for name, value in dataclasses.asdict(options).items():
            old = getattr(before, name)
            if name in FREE_OPTIONS or not _differ(name, old, value):
                continue
            more_epochs = name == "epochs" and value > old
            if more_epochs and longer:
                continue
            way_out = f"train longer (--resume --epochs {value}), " if more_epochs else ""
            raise UserError(
                f"--resume: this run had --{name.replace('_', '-')} {old}, not {value}; "
                f"leave the option as it was, {way_out}or start anew with another --out"
            )

    def write_config(self, options: TrainOptions, **facts: Any) -> None:
        """Write all that is needed to repeat the run: options, versions, data, weights."""
        asked = dataclasses.asdict(options)
        del asked["resume"]  # says how the command was called, not what the run is
        self._write_config({"options": asked, "versions": versions(), **facts})

    def lengthen(self, epochs: int, step: int) -> None:
        """Record in the configuration that training goes on after ``step``, to ``epochs``."""
        content = self.config()
        lengthened = {"after_step": step, "epochs_before": content["options"]["epochs"]}
        content["lengthened"] = [*content.get("lengthened", []), lengthened]
        content["options"]["epochs"] = epochs
        self._write_config(content)

    def _write_config(self, content: dict[str, Any]) -> None:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        replace_file(self.path(CONFIG), text)

    def config(self) -> dict[str, Any]:
        """The run's configuration; that of an earlier version in today's options.

        Raises:
            UserError: the folder holds no run.
        """
        try:
            content = yaml.safe_load(self.path(CONFIG).read_text("utf-8"))
            content["options"]["backbone"]
            return {**content, "options": upgraded(content["options"], content.get("backbone"))}
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.folder}: not a run folder (no {CONFIG}); make one with "
                "python -m nefkern.train"
            ) from None
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
            raise UserError(f"{self.path(CONFIG)}: not a run's configuration") from None

    def options(self) -> TrainOptions:
        """The options the run was trained with; those of another version are left out.

        Raises:
            UserError: no run, or one whose configuration was edited to something impossible.
        """
        path, asked = self.path(CONFIG), BEFORE | self.config()["options"]
        known = [f for f in dataclasses.fields(TrainOptions) if f.name in asked]
        options = TrainOptions(**{f.name: converted(str(path), f, asked[f.name]) for f in known})
        try:
            options.check()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return options

    # ---- checkpoints ----

    def save(self, weights: dict[str, Tensor], state: dict[str, Any], step: int) -> None:
        """Replace the checkpoint: state first, then the weights that name it."""
        name = f"state-{step:07d}.pt"
        buffer = io.BytesIO()
        torch.save(state, buffer)
        replace_file(self.path(name), buffer.getvalue())
        self._write_checkpoint(weights, {"step": str(step), "state": name})
        for old in self.folder.glob("state-*.pt"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def save_stage(self, tensors: dict[str, Tensor], stage: str, step: int) -> None:
        """Replace the checkpoint by what a run of ``--method spectral`` has after a stage, its
        ``step``-th."""
        self._write_checkpoint(tensors, {"step": str(step), "stage": stage})

    def _write_checkpoint(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        content = _saved(tensors, metadata | {"nefkern": __version__})
        replace_file(self.path(CHECKPOINT), _in_one_order(content))

    def part(self, *names: str) -> dict[str, Tensor]:
        """Some tensors of the checkpoint, read without the others; those that it holds."""
        with safe_open(self.path(CHECKPOINT), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118

    @property
    def is_begun(self) -> bool:
        """Whether there is a checkpoint, and options that it holds to."""
        return self.path(CHECKPOINT).exists()

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors in a file of their own."""
        replace_file(self.path(name), _saved(tensors))

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        """What :meth:`save_tensors` kept, or None.

        Raises:
            UserError: the file is damaged.
        """
        found = self._read(name, "damaged (%s); remove it, and --resume makes it anew")
        return found and found[0]

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Weights and metadata of the checkpoint, or None where there is none yet.

        Raises:
            UserError: the file is damaged.
        """
        return self._read(CHECKPOINT, "not a readable checkpoint (%s)")

    def save_clusters(self, tensors: dict[str, Tensor]) -> None:
        """Keep the clusters that belong to the checkpoint: K-means on a continuous ψ's outputs."""
        replace_file(self.path(CLUSTERS), _saved(tensors, {"step": self._step()}))

    def load_clusters(self) -> dict[str, Tensor] | None:
        """The clusters of the checkpoint, or None: none were kept, or those of an earlier step.

        Raises:
            UserError: the file is damaged.
        """
        told = "not a readable file of clusters (%s); remove it, and --resume makes it anew"
        found = self._read(CLUSTERS, told)
        return found[0] if found and found[1].get("step") == self._step() else None

    def _read(self, name: str, told: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata of a safetensors file, or None where there is none; ``told`` is what
        an error says of a damaged one, with a place for the reason."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, dict(file.metadata() or {})
        except SafetensorError as error:
            raise UserError(f"{path}: {told % first_line(error)}") from None

    def _step(self) -> str:
        """Of the checkpoint."""
        found = self.load()
        return found[1].get("step", "") if found else ""

    def feature_cache(self, options: TrainOptions) -> Path | None:
        """Where training keeps the backbone's maps; None: it sees no crop twice."""
        if options.feature_cache:
            return Path(options.feature_cache)
        if options.method == "spectral":
            return None  # sees each crop once, and keeps what it needs of it
        return self.path("features") if options.num_views else None

    def load_state(self, name: str) -> dict[str, Any]:
        """The optimiser's state that belongs to a checkpoint."""
        path = self.path(name)
        if not path.exists():
            raise UserError(f"--resume: {path} is missing, and it belongs to the checkpoint")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no exception of its own for a damaged file
            raise UserError(
                f"--resume: {path} is damaged; start anew with another --out"
            ) from error

    def epochs_done(self) -> int:
        """Whole epochs behind the checkpoint; 0 where there is none yet."""
        found = self.load()
        return self.load_state(found[1]["state"])["position"]["epoch"] if found else 0

    def is_trained(self, options: TrainOptions) -> bool:
        """Whether the checkpoint is that of a run of these options at its end."""
        if options.method == "neural":
            return self.epochs_done() >= options.epochs
        found = self.load()
        return bool(found) and found[1].get("stage") == STAGES[-1]

    # ---- the record ----

    def truncate_metrics(self, step: int) -> None:
        """Drop the record of steps after ``step``: a resumed run writes them again."""
        self._write_metrics([row for row in self.metrics() if row["step"] <= step])

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a row to the record, all or nothing."""
        self._write_metrics([*self.metrics(), row])

    def _write_metrics(self, rows: list[dict[str, Any]]) -> None:
        replace_file(self.path(METRICS), "".join(f"{json.dumps(row)}\n" for row in rows))

    def metrics(self) -> list[dict[str, Any]]:
        """The record, a dict a step, up to the first line that is none, as when half written."""
        path = self.path(METRICS)
        rows = []
        for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
        return rows


def _saved(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of tensors from any device."""
    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
