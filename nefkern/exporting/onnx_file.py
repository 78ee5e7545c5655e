"""One ONNX file of a run: networks, what is before and after them, names and colours."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nefkern.exporting import graph
from nefkern.exporting.network import Network
from nefkern.naming.names import Names
from nefkern.runtime.errors import UserError, first_line
from nefkern.runtime.files import replace_file
from nefkern.segmentation.pictures import palette
from nefkern.segmentation.segmenter import Segmenter
from nefkern.version import __version__

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

IMAGE, LOGITS, CLUSTERS, CLASSES = "image", "logits", "clusters", "classes"
_PIXELS = "pixels"

#: What a protocol buffer, and so a file, may have of bytes.
_MOST_BYTES = (1 << 31) - 1

#: Sides of the example that an export of any size is traced with, in cells: different, and not 1.
_EXAMPLE = (5, 6)


def require_exporter() -> None:
    """Raise a UserError unless the packages that write ONNX are installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"export: needs onnx and onnxscript ({error}); pip install onnx onnxscript"
        ) from None


def export(
    segmenter: Segmenter,
    path: Path,
    names: Names | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Write the file.

    Args:
        segmenter: on the CPU, with clusters.
        path: where to.
        names: of clusters: the file then gives classes too.
        size: ``(H, W)`` of the only images it shall take; None: of any.

    Raises:
        UserError: the backbone cannot be exported so, or the file would be too large.
    """
    segmenter.require_clusters()
    model = traced(segmenter, size)
    assembled(model, segmenter, names, size)
    facts = describe(segmenter, names, size)
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        model.metadata_props.add(key=f"nefkern.{key}", value=text)
    content = serialized(model)
    replace_file(path, content)


def describe(
    segmenter: Segmenter, names: Names | None, size: tuple[int, int] | None
) -> dict[str, Any]:
    """What the file's metadata tell, as text or JSON."""
    count = segmenter.num_clusters
    facts: dict[str, Any] = {
        "version": __version__,
        "method": segmenter.kind,
        "backbone": segmenter.options.backbone,
        "crop": segmenter.options.crop,
        "patch": segmenter.backbone.patch,
        "size": list(size) if size else "any",
        "clusters": count,
        "colours": ["#{:02x}{:02x}{:02x}".format(*c) for c in palette(count).tolist()],
    }
    if names is not None:
        facts["classes"] = names.as_dict()["classes"]
        facts["class_of"] = names.class_of().tolist()
    return facts


# ---- the networks ----


def traced(segmenter: Segmenter, size: tuple[int, int] | None) -> onnx.ModelProto:
    """The networks, from ``pixels`` to ``logits``.

    Raises:
        UserError: see :func:`export`.
    """
    backbone = segmenter.backbone
    if size is None and (backbone.fixed or backbone.multiple != backbone.patch):
        raise UserError(
            f"{segmenter.options.backbone}: its grid depends on more than an image's size in "
            "patches; --size HEIGHT WIDTH exports it for images of one size"
        )
    example, shapes = _example(segmenter, size)
    network = Network(segmenter, None if size is None else _grid(segmenter, size)).eval()
    options: dict[str, Any] = {"dynamo": True, "opset_version": graph.OPSET, "verbose": False}
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (example,),
                input_names=[_PIXELS],
                output_names=[LOGITS],
                dynamic_shapes=(shapes,),
                **options,
            )
    except torch.onnx.OnnxExporterError as error:
        way_out = "" if size else "; --size HEIGHT WIDTH exports it for images of one size"
        raise UserError(
            f"{segmenter.options.backbone}: cannot be exported ({_reason(error)}){way_out}"
        ) from error
    return program.model_proto


def _reason(error: BaseException) -> str:
    """The first line of what an exporter's error comes from: its own are a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


class _quiet:
    """Exporters log what they decompose."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)


def _example(segmenter: Segmenter, size: tuple[int, int] | None) -> tuple[Tensor, dict]:
    """An input, and which of its sizes are free."""
    patch = segmenter.backbone.patch
    h, w = _EXAMPLE if size is None else _grid(segmenter, size)
    shapes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if size is None:
        shapes[2] = patch * torch.export.Dim("h", min=2, max=4096)
        shapes[3] = patch * torch.export.Dim("w", min=2, max=4096)
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, (2, 3, patch * h, patch * w), generator=generator)
    return example.float(), shapes


def _grid(segmenter: Segmenter, size: tuple[int, int]) -> tuple[int, int]:
    """Of an image of ``size`` at the scale of training."""
    scale = segmenter.training_scale(torch.empty(3, *size, device="meta"))
    height, width = (max(segmenter.patch, round(side * scale)) for side in size)
    return segmenter.backbone.grid((height, width))


# ---- the file ----


def assembled(
    model: onnx.ModelProto,
    segmenter: Segmenter,
    names: Names | None,
    size: tuple[int, int] | None,
) -> None:
    """Put what is before and after the networks around them, in place."""
    import onnx
    from onnx import TensorProto, helper

    text_in = graph.before(segmenter, _PIXELS)
    text_out = graph.after(LOGITS, CLUSTERS)
    outputs = f"int32[B, H, W] {CLUSTERS}"
    if names is not None:
        text_out += graph.classes(names.class_of().tolist(), CLUSTERS, CLASSES)
        outputs += f", uint8[B, H, W] {CLASSES}"
    kept = {IMAGE, _PIXELS, LOGITS, CLUSTERS, CLASSES}
    inputs = f"uint8[B, 3, H, W] {IMAGE}"
    first = graph.nodes(text_in, inputs, f"float[B, 3, P, Q] {_PIXELS}", kept)
    last = graph.nodes(text_out, f"float[B, K, h, w] {LOGITS}", outputs, kept)
    network = model.graph
    middle = list(network.node)
    del network.node[:], network.input[:], network.output[:]
    network.node.extend([*first, *middle, *last])
    sides = list(size) if size else ["height", "width"]
    value = helper.make_tensor_value_info
    network.input.append(value(IMAGE, TensorProto.UINT8, ["batch", 3, *sides]))
    network.output.append(value(CLUSTERS, TensorProto.INT32, ["batch", *sides]))
    if names is not None:
        network.output.append(value(CLASSES, TensorProto.UINT8, ["batch", *sides]))
    count = segmenter.num_clusters
    network.output.append(value(LOGITS, TensorProto.FLOAT, ["batch", count, "h", "w"]))
    network.name = "nefkern"
    model.producer_name, model.producer_version = "nefkern", __version__
    if model.ByteSize() <= _MOST_BYTES:
        onnx.checker.check_model(model)


def serialized(model: onnx.ModelProto) -> bytes:
    """The file's bytes; a UserError where they are too many for one file."""
    if (size := model.ByteSize()) > _MOST_BYTES:
        raise UserError(
            f"export: {size / 1e9:.1f} GB, and one ONNX file holds 2 GB; train with "
            "--keep landmarks:N, so that the run keeps fewer patches"
        )
    return model.SerializeToString()
