"""A run folder: configuration, checkpoints that survive a kill, and the record of every step."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from nefkern.runtime import tensor_files
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import naming, remove_parts, replace_file
from nefkern.runtime.locks import NAME as LOCK
from nefkern.runtime.locks import FolderLock
from nefkern.runtime.structured import parse_json, parse_yaml, read_text
from nefkern.runtime.tensor_files import DamagedFile
from nefkern.training.option_parsing import converted, upgraded
from nefkern.training.options import TrainOptions
from nefkern.version import __version__

log = logging.getLogger(__name__)

T = TypeVar("T")

CONFIG, CHECKPOINT, METRICS = "config.yaml", "checkpoint.safetensors", "metrics.jsonl"
#: The checkpoint before the last.
PREVIOUS = "checkpoint-previous.safetensors"
CLUSTERS, GRAPH = "clusters.safetensors", "graph.safetensors"
#: What others verify a run by: :mod:`nefkern.training.proof`.
STEPS, STATES = "steps.jsonl", "steps"

#: The folder of a run's own feature cache.
FEATURES = "features"

#: The backbone's weights, of runs that brought them along from the model hub.
BACKBONE = "backbone.safetensors"

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


#: Of the configuration, where it has them.
_PARTS = {"backbone": dict, "dataset": dict, "versions": dict, "lengthened": list}

#: Options that do not change what a run computes.
FREE_OPTIONS = frozenset(
    (
        *("resume", "out", "pictures", "workers", "checkpoint_seconds", "device", "strict"),
        "record_steps",
    )
)


#: What runs did before an option was there, where that is not its default.
BEFORE = {"input_size": "crop", "method": "neural"}


def _differ(name: str, before: Any, now: Any) -> bool:
    if name == "feature_cache":  # maps in it are rounded; where it lies is of no consequence
        return bool(before) != bool(now)
    return before != now


def _is_of_a_start(path: Path) -> bool:
    """Whether a process that was killed before its run had a configuration left this."""
    return path.name == LOCK or (path.name.startswith(f".{CONFIG}") and path.suffix == ".part")


class Run:
    """The folder of one training run.

    The checkpoint's weights and the optimiser's state are two files; the weights name the state
    that belongs to them and are replaced last, so that both are always of the same step. Both have
    checksums, and the checkpoint before is kept beside the last, for when that turns out damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: FolderLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process does not hold the lock."""
        return {**vars(self), "_lock": None}

    @classmethod
    def create(cls, options: TrainOptions, *, longer: bool = False) -> Run:
        """Make the run's folder, or take the one to resume; it is this process's as long as the
        run, or another of the same folder, is in use.

        Args:
            options: all of them; checked.
            longer: a run to resume may be of fewer epochs, and is then trained on.

        Raises:
            UserError: it holds a run and ``--resume`` was not given, or one of other options; it
                is in use by another process.
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
        elif run.folder.exists() and not all(map(_is_of_a_start, run.folder.iterdir())):
            raise UserError(f"--out {run.folder}: is not empty and holds no run")
        run.folder.mkdir(parents=True, exist_ok=True)
        run._lock = FolderLock.of(run.folder, "--out")
        if run.path(CONFIG).exists():
            run._fall_back()
            if run.path(CHECKPOINT).exists():
                run._check_same(options, longer)
        remove_parts(run.folder, "**/.*.part")
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
            content = parse_yaml(read_text(self.path(CONFIG)))
            content["options"]["backbone"]
            for name, kind in _PARTS.items():
                if not isinstance(content.get(name, kind()), kind):
                    raise TypeError(f"{name}: expected {kind.__name__}")
            return {**content, "options": upgraded(content["options"], content.get("backbone"))}
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.folder}: not a run folder (no {CONFIG}); make one with "
                "python -m nefkern.train"
            ) from None
        except (ValueError, KeyError, TypeError):
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
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        digest = _sha256(content)
        # A step's state may be written twice, at the end of an epoch too: never over the one that
        # the checkpoint names.
        name = f"state-{step:07d}-{digest[:8]}.pt"
        replace_file(self.path(name), content)
        told = {"step": str(step), "state": name, "state_sha256": digest}
        if position := state.get("position"):
            told["epoch"] = str(position["epoch"])
        self._write_checkpoint(weights, told)
        kept = {name, self._metadata(PREVIOUS).get("state")}
        for old in self.folder.glob("state-*.pt"):
            if old.name not in kept:
                old.unlink(missing_ok=True)

    def save_stage(self, tensors: dict[str, Tensor], stage: str, step: int) -> None:
        """Replace the checkpoint by what a run of ``--method spectral`` has after a stage, its
        ``step``-th."""
        self._write_checkpoint(tensors, {"step": str(step), "stage": stage})

    def _write_checkpoint(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        content = tensor_files.packed(tensors, metadata | {"nefkern": __version__})
        if self._metadata(CHECKPOINT).get("step", metadata["step"]) != metadata["step"]:
            self._keep_previous()
        replace_file(self.path(CHECKPOINT), content)

    def _keep_previous(self) -> None:
        """Let the last checkpoint be the one before, which a kill at any moment leaves there."""
        part = self.path(f".{PREVIOUS}.part")
        with contextlib.suppress(OSError):  # a file system without links keeps one checkpoint
            part.unlink(missing_ok=True)
            os.link(self.path(CHECKPOINT), part, follow_symlinks=False)
            try:
                part.replace(self.path(PREVIOUS))
            finally:
                part.unlink(missing_ok=True)  # it stays where both already are one file, too

    def _metadata(self, name: str) -> dict[str, str]:
        """Those of a file of tensors; none of one that is not there or not whole."""
        try:
            return tensor_files.metadata_of(self.path(name))
        except (OSError, DamagedFile):
            return {}

    # ---- damage ----

    def _fall_back(self) -> None:
        """Take the checkpoint before the last, if only that one is whole; says so."""
        wrong = self._damage(CHECKPOINT)
        if not wrong or not self.path(PREVIOUS).exists() or self._damage(PREVIOUS):
            return
        step = self._metadata(PREVIOUS)["step"]
        log.warning("%s; going on from the one before, %s, of step %s", wrong, PREVIOUS, step)
        self.path(PREVIOUS).replace(self.path(CHECKPOINT))

    def _way_back(self) -> str:
        """What to do about a damaged checkpoint, if there is something to do."""
        if not self.path(PREVIOUS).exists() or self._damage(PREVIOUS):
            return ""
        step = self._metadata(PREVIOUS)["step"]
        return f"; {PREVIOUS}, of step {step}, is whole: --resume goes on from it"

    def damage(self) -> str:
        """What is wrong with the last checkpoint; "" of one that is whole."""
        return self._damage(CHECKPOINT)

    def _damage(self, name: str) -> str:
        """What is wrong with a checkpoint, its state included; "" of one that is whole."""
        try:
            tensor_files.check(self.path(name))
            metadata = tensor_files.metadata_of(self.path(name))
        except FileNotFoundError:
            return f"{self.path(name)}: is missing"
        except DamagedFile as error:
            return f"{self.path(name)}: is damaged ({error})"
        try:
            int(metadata["step"])
            if "stage" not in metadata:
                self._state(metadata)
        except (KeyError, ValueError):
            return f"{self.path(name)}: is damaged (its metadata say no step)"
        except UserError as error:
            return str(error)
        return ""

    def _state(self, metadata: dict[str, str]) -> bytes:
        """The file of the optimiser's state that a checkpoint names.

        Raises:
            UserError: it is not there, or not as it was written.
        """
        name = metadata.get("state", "")
        if not re.fullmatch(r"state-\d+(-[0-9a-f]+)?\.pt", name):  # a path could lead anywhere
            raise UserError(f"--resume: {self.path(CHECKPOINT)} names no state of this run")
        path = self.path(name)
        if not path.exists():
            raise UserError(f"--resume: {path} is missing, and it belongs to the checkpoint")
        content = path.read_bytes()
        if metadata.get("state_sha256", _sha256(content)) != _sha256(content):
            raise UserError(f"--resume: {path} is damaged; start anew with another --out")
        return content

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
        replace_file(self.path(name), tensor_files.packed(tensors))

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        """What :meth:`save_tensors` kept, or None.

        Raises:
            UserError: the file is damaged.
        """
        told = "damaged (%s); remove it, and --resume makes it anew"
        found = self._read(name, told, tensor_files.unpacked)
        return found and found[0]

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Weights and metadata of the checkpoint, or None where there is none yet.

        Raises:
            UserError: the file is damaged.
        """
        return self._of_checkpoint(tensor_files.unpacked)

    def _of_checkpoint(self, reader: Callable[[Path], T]) -> T | None:
        try:
            return self._read(CHECKPOINT, "not a readable checkpoint (%s)", reader)
        except UserError as error:
            raise UserError(f"{error}{self._way_back()}") from None

    def save_clusters(self, tensors: dict[str, Tensor]) -> None:
        """Keep the clusters that belong to the checkpoint: K-means on a continuous ψ's outputs."""
        content = tensor_files.packed(tensors, {"step": self._step()})
        replace_file(self.path(CLUSTERS), content)

    def load_clusters(self) -> dict[str, Tensor] | None:
        """The clusters of the checkpoint, or None: none were kept, or those of an earlier step.

        Raises:
            UserError: the file is damaged.
        """
        told = "not a readable file of clusters (%s); remove it, and --resume makes it anew"
        found = self._read(CLUSTERS, told, tensor_files.unpacked)
        return found[0] if found and found[1].get("step") == self._step() else None

    def _read(self, name: str, told: str, reader: Callable[[Path], T]) -> T | None:
        """What ``reader`` gives of a safetensors file, or None where there is none; ``told`` is
        what an error says of a damaged one, with a place for the reason."""
        try:
            return reader(self.path(name))
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            raise UserError(f"{self.path(name)}: {told % error}") from None

    def _step(self) -> str:
        """Of the checkpoint."""
        return (self._told() or {}).get("step", "")

    def _told(self) -> dict[str, str] | None:
        """The checkpoint's metadata, of which nothing else is read; None where there is none yet.

        Raises:
            UserError: the file is damaged, as far as its header shows it.
        """
        return self._of_checkpoint(tensor_files.metadata_of)

    def weights(self, options: TrainOptions) -> str:
        """Of the backbone, where they come from: the run's own file, or as the options say."""
        own = self.path(BACKBONE)
        return str(own) if own.exists() else options.weights

    def feature_cache(self, options: TrainOptions) -> Path | None:
        """Where training keeps the backbone's maps; None: it sees no crop twice."""
        if options.feature_cache:
            return Path(options.feature_cache)
        if options.method == "spectral":
            return None  # sees each crop once, and keeps what it needs of it
        return self.path(FEATURES) if options.num_views else None

    def load_state(self, metadata: dict[str, str]) -> dict[str, Any]:
        """The optimiser's state that belongs to a checkpoint of these metadata.

        Raises:
            UserError: it is missing or damaged.
        """
        content = self._state(metadata)
        try:  # nothing but tensors and plain data is taken from the pickle in it
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no exception of its own for a damaged file
            path = self.path(metadata["state"])
            raise UserError(
                f"--resume: {path} is damaged; start anew with another --out"
            ) from error

    def epochs_done(self) -> int:
        """Whole epochs behind the checkpoint; 0 where there is none yet."""
        told = self._told()
        if told is None:
            return 0
        # Checkpoints of earlier versions tell it in their state alone.
        return int(told["epoch"]) if "epoch" in told else self._position(told)["epoch"]

    def _position(self, metadata: dict[str, str]) -> dict[str, int]:
        return self.load_state(metadata)["position"]

    def is_trained(self, options: TrainOptions) -> bool:
        """Whether the checkpoint is that of a run of these options at its end."""
        if options.method == "neural":
            return self.epochs_done() >= options.epochs
        return (self._told() or {}).get("stage") == STAGES[-1]

    # ---- the record ----

    def truncate_metrics(self, step: int) -> None:
        """Drop the record of steps after ``step``: a resumed run writes them again."""
        self._write_metrics([row for row in self.metrics() if row["step"] <= step])

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a row to the record, all or nothing."""
        self._write_metrics([*self.metrics(), row])

    def _write_metrics(self, rows: list[dict[str, Any]]) -> None:
        replace_file(self.path(METRICS), _as_lines(rows))

    def metrics(self) -> list[dict[str, Any]]:
        """The record, a dict a step, up to the first line that is none, as when half written."""
        return self._rows(METRICS)

    # ---- what others verify it by ----

    def begin_steps(self, row: dict[str, Any]) -> None:
        """Begin the record of steps anew, by its first row."""
        replace_file(self.path(STEPS), _as_lines([row]))

    def truncate_steps(self, step: int) -> None:
        """Drop what is recorded of steps after ``step``."""
        if self.path(STEPS).exists():
            kept = [row for row in self.steps() if row["step"] <= step]
            replace_file(self.path(STEPS), _as_lines(kept))

    def append_step(self, row: dict[str, Any]) -> None:
        """Add a row to the record of steps, if that was begun."""
        path = self.path(STEPS)
        if path.exists():
            with naming(path), open(path, "ab", buffering=0) as file:
                file.write(_as_lines([row]).encode())

    def steps(self) -> list[dict[str, Any]]:
        """The record of steps, a dict each, as :meth:`metrics`."""
        return self._rows(STEPS)

    def state_path(self, step: int) -> Path:
        """Of the state before a step."""
        return self.path(STATES) / f"{step:07d}.safetensors"

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.path(name)
        rows = []
        for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
            try:
                row = parse_json(line)
            except ValueError:
                break
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                break
            rows.append(row)
        return rows


def _as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
