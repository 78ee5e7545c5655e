"""The paper's experiments: what every row of its tables was trained and scored on, and its numbers.

Only what the text says of a row stands here. Sizes, epochs, K and the number of classes of each
data set are those of :mod:`nefkern.options`. All numbers are in percent, after a CRF (section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

#: Supervised on ImageNet-21k, then on ImageNet, at 384 × 384.
VIT = {"S": "vit_small_patch16_384", "B": "vit_base_patch16_384", "L": "vit_large_patch16_384"}

#: OpenAI trained with the quick GELU, which timm's other names for these weights do not have.
CLIP = {
    "B": "vit_base_patch16_clip_quickgelu_224.openai",
    "L": "vit_large_patch14_clip_quickgelu_224.openai",
    "L-336": "vit_large_patch14_clip_quickgelu_336.openai",
}

TITLES = {"pascal_context": "Pascal Context", "cityscapes": "Cityscapes", "ade20k": "ADE20K"}


class Number(NamedTuple):
    """A method's numbers in a row.

    The accuracy is None where the paper gives mean IoU alone, and both are where it has not run
    the method.
    """

    accuracy: float | None
    mean_iou: float | None
    matching: Literal["iou", "hungarian"] = "iou"


@dataclass(frozen=True)
class Row:
    """One setting of a table.

    Attributes:
        name: unique in its table, for the command line.
        title: what the paper calls it.
        data: the data set it is scored on.
        numbers: the paper's, of methods by their names in :mod:`nefkern.baselines.methods`.
        backbone: a timm model.
        clusters: K; "classes": as many as there are; None: the data set's.
        alpha, beta: None: the default of training.
        trained_on: the data set it is trained on, where that is another.
    """

    name: str
    title: str
    data: str
    numbers: tuple[tuple[str, Number], ...]
    backbone: str = VIT["S"]
    clusters: int | Literal["classes"] | None = None
    alpha: float | None = None
    beta: float | None = None
    trained_on: str | None = None

    @property
    def methods(self) -> list[str]:
        """Names of the methods, each once."""
        return list(dict.fromkeys(name for name, _ in self.numbers))

    def beside(self, methods: list[str]) -> Row:
        """The same row with ``methods`` too, as far as the paper does not have them."""
        more = [(name, Number(None, None)) for name in methods if name not in self.methods]
        return replace(self, numbers=(*self.numbers, *more))


@dataclass(frozen=True)
class Table:
    """A table of the paper, or a comparison that stands in its text.

    Attributes:
        number: as the paper counts them.
        title: what it shows.
        rows: by name.
        protocol: how images are scored, of ``python -m nefkern.evaluate``.
    """

    number: str
    title: str
    rows: Mapping[str, Row] = field(repr=False)
    protocol: Literal["crop320", "sliding"] = "crop320"


def _table(number: str, title: str, rows: list[Row], protocol: str = "crop320") -> Table:
    return Table(number, title, {row.name: row for row in rows}, protocol)


def _methods(kmeans: Number, ours: Number, hidden: Number) -> tuple[tuple[str, Number], ...]:
    return ("kmeans", kmeans), ("ours", ours), ("ours*", hidden)


def _ours(accuracy: float | None, mean_iou: float) -> tuple[tuple[str, Number], ...]:
    return (("ours", Number(accuracy, mean_iou)),)


def _backbones(data: str, numbers: dict[str, tuple[Number, Number, Number]]) -> list[Row]:
    return [
        Row(f"vit-{size.lower()}", f"ViT-{size}", data, _methods(*three), backbone=VIT[size])
        for size, three in numbers.items()
    ]


def _datasets(numbers: dict[str, tuple[Number, Number, Number]]) -> list[Row]:
    return [Row(data, TITLES[data], data, _methods(*three)) for data, three in numbers.items()]


def _alphas(data: str, mean_ious: dict[float, float]) -> list[Row]:
    return [
        Row(f"{data}-alpha{a:g}", f"{TITLES[data]}, α = {a:g}", data, _ours(None, miou), alpha=a)
        for a, miou in mean_ious.items()
    ]


_N = Number

_TABLES = (
    _table(
        "1",
        "backbones on Pascal Context",
        _backbones(
            "pascal_context",
            {
                "S": (_N(61.9, 28.9), _N(70.4, 38.8), _N(74.6, 39.6)),
                "B": (_N(58.7, 30.9), _N(69.7, 37.5), _N(73.2, 37.6)),
                "L": (_N(45.3, 19.3), _N(63.2, 33.2), _N(71.9, 35.0)),
            },
        ),
    ),
    _table(
        "2",
        "backbones on Cityscapes",
        _backbones(
            "cityscapes",
            {
                "S": (_N(77.0, 22.4), _N(83.4, 28.2), _N(84.6, 30.0)),
                "B": (_N(74.8, 23.2), _N(81.4, 26.8), _N(84.2, 30.7)),
                "L": (_N(66.3, 20.9), _N(80.3, 26.3), _N(84.2, 30.0)),
            },
        ),
    ),
    _table(
        "3",
        "the protocol of supervised segmentation",
        _datasets(
            {
                "pascal_context": (_N(56.3, 31.9), _N(67.4, 41.4), _N(68.9, 41.3)),
                "cityscapes": (_N(75.5, 34.2), _N(86.1, 46.7), _N(88.3, 52.8)),
            }
        ),
        "sliding",
    ),
    _table(
        "4",
        "ADE20K",
        _datasets({"ade20k": (_N(50.7, 19.2), _N(63.3, 21.6), _N(62.5, 23.6))}),
        "sliding",
    ),
    _table(
        "5",
        "the number of eigenfunctions K on Pascal Context",
        [
            Row(f"K{k}", f"K = {k}", "pascal_context", _ours(*numbers), clusters=k)
            for k, numbers in {
                64: (67.1, 27.8),
                128: (71.6, 33.2),
                256: (70.4, 38.8),
                512: (71.1, 37.9),
            }.items()
        ],
    ),
    _table(
        "6",
        "the weight α of the pixel graph",
        [
            *_alphas("pascal_context", {0.0: 38.6, 0.1: 37.9, 0.3: 38.8, 0.5: 38.9, 0.7: 38.0}),
            *_alphas("cityscapes", {0.0: 27.2, 0.1: 26.7, 0.3: 28.2, 0.5: 28.1, 0.7: 27.9}),
        ],
    ),
    _table(
        "7",
        "the weight β of the penalty on Pascal Context",
        [
            Row(
                f"beta{beta}",
                f"β = {beta}",
                "pascal_context",
                (("ours", _N(None, ours)), ("ours*", _N(None, hidden))),
                beta=beta,
            )
            for beta, ours, hidden in ((0.04, 38.8, 39.0), (0.08, 38.8, 39.6), (0.16, 39.0, 39.3))
        ],
    ),
    _table(
        "8",
        "zero-shot transfer from ImageNet",
        [
            Row(data, f"ImageNet to {TITLES[data]}", data, _ours(*numbers), trained_on="imagenet")
            for data, numbers in {
                "pascal_context": (55.8, 15.2),
                "cityscapes": (81.2, 18.5),
            }.items()
        ],
    ),
    _table(
        "9",
        "backbones pre-trained by CLIP on Pascal Context",
        [
            Row(f"clip-{size.lower()}", title, "pascal_context", _ours(None, mean_iou), CLIP[size])
            for size, title, mean_iou in (
                ("B", "CLIP ViT-B/16", 37.2),
                ("L", "CLIP ViT-L/14", 38.7),
                ("L-336", "CLIP ViT-L/14 at 336", 44.0),
            )
        ],
    ),
    _table(
        "4.4",
        "as many clusters as classes on Pascal Context (text of section 4.4)",
        [
            Row(
                "classes",
                "K = number of classes",
                "pascal_context",
                (("ours", _N(None, 23.5, "hungarian")), ("ours", _N(None, 27.7))),
                clusters="classes",
            )
        ],
    ),
)

#: Every table by its number.
TABLES = {table.number: table for table in _TABLES}
