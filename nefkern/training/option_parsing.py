"""From command lines and YAML files to :class:`~nefkern.training.options.TrainOptions`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

from nefkern.runtime.errors import UserError
from nefkern.runtime.structured import parse_yaml, read_text
from nefkern.training.options import TrainOptions
from nefkern.training.presets import COMPUTED, NEURAL_ONLY, PRESETS, SPECTRAL, SPECTRAL_ONLY

log = logging.getLogger(__name__)

#: What stands below a group's title in the help.
_GROUPS = {
    "eigenfunctions": "of ψ: --method neural; but -K is for both",
    "objective": "--method neural",
    "data set's graph": "κ of the patches of all images, computed once: --method neural",
    "optimisation": "--method neural; but --batch-size, --amp, --tf32, --device and --seed are for "
    "both",
    "eigenvectors": "--method spectral",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for every option, in groups, with defaults shown and none set."""
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(TrainOptions):
        meta = dict(f.metadata)
        title = meta.pop("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title, _GROUPS.get(title))
        group = groups[title]
        usual = meta.pop("shown", f.default)
        shown = f" [{_show(usual)}]" if usual is not None else ""
        for data, preset in PRESETS.items():
            if f.name in preset and f.default != preset[f.name]:
                shown += f" [{data}: {_show(preset[f.name])}]"
        help_text = meta.pop("help") + shown.replace("%", "%%")
        flags = [f"--{f.name.replace('_', '-')}", *meta.pop("flags", ())]
        kind = f.type.partition(" |")[0]
        if kind == "bool":
            meta["action"] = argparse.BooleanOptionalAction
        else:
            meta["type"] = {"int": int, "float": float}.get(kind, str)
        group.add_argument(*flags, default=argparse.SUPPRESS, help=help_text, **meta)


def _show(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def resolve(flags: dict[str, Any], config: Path | None = None) -> TrainOptions:
    """Options from the command line's flags, over a YAML file, over the defaults.

    Raises:
        UserError: an unknown key, a value of the wrong type, an option out of range.
    """
    given = {**(read_config(config) if config else {}), **flags}
    given["method"], why = _method(given)
    _check_method(given["method"], flags)
    usual = SPECTRAL if given["method"] == "spectral" else {}
    options = TrainOptions(**{**PRESETS[given.get("data", "samples")], **usual, **given})
    options.check()
    if why:
        log.info("--method %s, since %s", options.method, why)
    return options


def _method(given: dict[str, Any]) -> tuple[str, str]:
    """What ``--method auto`` stands for, and why if it is not for the data alone."""
    asked = given.get("method", "auto")
    if asked != "auto":
        return asked, ""
    if given.get("data", "samples") not in COMPUTED:
        return "neural", ""
    of_psi = sorted(NEURAL_ONLY & set(given))
    if of_psi:
        return "neural", f"--{of_psi[0].replace('_', '-')} is an option of ψ"
    k = str(given.get("k", "")).strip()
    if k.endswith("%"):
        return "neural", f"--k {k} is a share of a batch's patches"
    if os.environ.get("WORLD_SIZE", "1") != "1":  # torchrun's
        return "neural", "several processes work"
    return "spectral", ""


def _check_method(method: str, flags: dict[str, Any]) -> None:
    """Refuse flags that the method has no use for; a file may hold the options of both."""
    others = NEURAL_ONLY if method == "spectral" else SPECTRAL_ONLY
    for name in flags:
        if name in others:
            other = "neural" if method == "spectral" else "spectral"
            raise UserError(
                f"--{name.replace('_', '-')}: is an option of --method {other}; expected none of "
                f"those with --method {method}"
            )


def read_config(path: Path) -> dict[str, Any]:
    """Options in a YAML file: a mapping of option names, or the ``options`` of a run's config."""
    try:
        content = parse_yaml(read_text(path))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--config {path}: not a YAML file ({error})") from None
    if isinstance(content, dict) and "options" in content:
        content = upgraded(content["options"], content.get("backbone"))
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected a mapping of option names to values")
    fields = {f.name: f for f in dataclasses.fields(TrainOptions)}
    options = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name == "mlp_ratio":
            raise UserError(
                f"--config {path}: mlp_ratio is an option no more: heads and mlp_hidden give the "
                "number of ψ's heads and the width of its MLP"
            )
        if name not in fields:
            raise UserError(f"--config {path}: unknown option {key!r}")
        options[name] = converted(f"--config {path}", fields[name], value)
    return options


def upgraded(options: Any, backbone: Any) -> Any:
    """A run's options in the terms of this version, from those of its ``config.yaml``.

    ψ's heads and MLP once followed the backbone: as many heads as cover 3C channels, and
    ``mlp_ratio`` times C hidden ones. There was one method, then K-means saw K eigenvectors of
    features as they came, of every image. What cannot be told is left as it is.

    Args:
        options: the file's ``options``.
        backbone: the file's ``backbone``, which knows both widths.
    """
    if isinstance(options, dict):
        options = {"method": "neural"} | options
        if options["method"] == "spectral" and "cluster_on" not in options:
            vectors = options.get("eigenvectors") or options.get("num_eigenfunctions")
            once = {"cluster_on": "vectors", "standardize": False, "graph_images": sys.maxsize}
            options = options | once | {"eigenvectors": vectors}
    try:
        ratio, head_dim = float(options["mlp_ratio"]), options["head_dim"]
        shape = {
            "heads": -(-backbone["concat_dim"] // head_dim),
            "mlp_hidden": max(1, round(ratio * backbone["dim"])),
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return options
    kept = {name: value for name, value in options.items() if name != "mlp_ratio"}
    return {**shape, **kept}


def converted(source: str, f: dataclasses.Field, value: Any) -> Any:
    """A value from YAML in the type of its option.

    Raises:
        UserError: of another type, or none of the choices; ``source`` says where it stands.
    """
    kind, _, optional = f.type.partition(" |")
    if value is None and optional:
        return None
    wanted = {"int": int, "float": float, "bool": bool, "str": str}[kind]
    if wanted is float and type(value) in (int, str):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3, without a point, as text
            return float(value)
    if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if wanted is not type(value):
        raise UserError(f"{source}: {f.name}: expected {kind}, got {value!r}")
    if f.metadata.get("choices") and value not in f.metadata["choices"]:
        choices = ", ".join(f.metadata["choices"])
        raise UserError(f"{source}: {f.name}: expected one of {choices}, got {value!r}")
    return value
