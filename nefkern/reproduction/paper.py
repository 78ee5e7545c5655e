"""The paper's experiments: what every row of its tables was trained and scored on, and its numbers.

Only what the text says of a row stands here. Sizes, epochs, K and the number of classes of each
data set are those of :mod:`nefkern.training.presets`. All numbers are in percent, the paper's own
after a CRF on clusters, before they are matched (section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

#: Supervised on ImageNet-21k, then on ImageNet, at 384 × 384.
VIT_S, VIT_B, VIT_L = (f"vit_{size}_patch16_384" for size in ("small", "base", "large"))

#: OpenAI trained with the quick GELU, which timm's other names for these weights do not have.
CLIP_B, CLIP_L, CLIP_L_336 = (
    f"vit_{model}.openai"
    for model in (
        "base_patch16_clip_quickgelu_224",
        "large_patch14_clip_quickgelu_224",
        "large_patch14_clip_quickgelu_336",
    )
)

PASCAL, CITY, ADE, NET = "pascal_context", "cityscapes", "ade20k", "imagenet"

#: What the paper calls the data sets that it scores on.
TITLES = {PASCAL: "Pascal Context", CITY: "Cityscapes", ADE: "ADE20K"}


class Number(NamedTuple):
    """A method's numbers in a row.

    The accuracy is None where the paper gives mean IoU alone, and both are where it has not run
    the method.
    """

    accuracy: float | None
    mean_iou: float | None
    matching: Literal["iou", "hungarian"] = "iou"


class Cited(NamedTuple):
    """Another method's mean IoU on a data set, which the paper cites beside its own."""

    method: str
    data: str
    mean_iou: float


@dataclass(frozen=True)
class Row:
    """One setting of a table.

    Attributes:
        name: unique in its table, for the command line.
        title: what the paper calls it.
        data: the data set it is scored on.
        numbers: the paper's, of methods by their names in :mod:`nefkern.segmentation.methods`.
        backbone: a timm model.
        clusters: K; "classes": as many as there are; None: the data set's.
        alpha, beta: None: the default of training.
        trained_on: the data set it is trained on, where that is another.
    """

    name: str
    title: str
    data: str
    numbers: tuple[tuple[str, Number], ...]
    backbone: str = VIT_S
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
    """A table or a figure of the paper, or a comparison that stands in its text.

    Attributes:
        number: as the paper counts tables; "figure-2" is a figure.
        title: what it shows.
        rows: by name.
        protocol: how images are scored, of ``python -m nefkern.evaluate``.
        cited: methods that the paper did not run.
        annotation: of a figure, whether it shows the annotation beside image and result.
    """

    number: str
    title: str
    rows: Mapping[str, Row] = field(repr=False)
    protocol: Literal["crop320", "sliding"] = "crop320"
    cited: tuple[Cited, ...] = ()
    annotation: bool = True

    @property
    def is_of_eigenfunctions(self) -> bool:
        """Whether it shows ψ itself, and has nothing to score."""
        return self.number == "figure-eigenfunctions"

    @property
    def is_figure(self) -> bool:
        """Whether pictures are what it shows."""
        return self.number.startswith("figure-")

    @property
    def stem(self) -> str:
        """Its files' name, without a suffix."""
        return self.number if self.is_figure else f"table-{self.number}"

    def __str__(self) -> str:
        return self.stem.replace("-", " ")


def _table(
    number: str,
    title: str,
    methods: str,
    rows: list[tuple[str, str, str, dict[str, Any], str]],
    protocol: str = "crop320",
    **more: Any,
) -> Table:
    """A table from its text; ``more`` are other attributes of :class:`Table`.

    Args:
        methods: the columns; "ours/hungarian" is ours by that matching.
        rows: name, title, data, other attributes of :class:`Row`, and a cell for each method:
            "accuracy/mIoU", "-" for an accuracy that the paper does not give.
    """
    columns = methods.split()
    made = [
        Row(name, caption, data, _numbers(columns, cells.split()), **setting)
        for name, caption, data, setting, cells in rows
    ]
    return Table(number, title, {row.name: row for row in made}, protocol, **more)


def _numbers(columns: list[str], cells: list[str]) -> tuple[tuple[str, Number], ...]:
    return tuple(_number(*pair) for pair in zip(columns, cells, strict=True))


def _number(column: str, cell: str) -> tuple[str, Number]:
    method, _, matching = column.partition("/")
    accuracy, mean_iou = cell.split("/")
    number = Number(None if accuracy == "-" else float(accuracy), float(mean_iou))
    return method, number._replace(matching=matching) if matching else number


_TABLES = (
    _table(
        "1",
        "backbones on Pascal Context",
        "kmeans ours ours*",
        [
            ("vit-s", "ViT-S", PASCAL, {}, "61.9/28.9 70.4/38.8 74.6/39.6"),
            ("vit-b", "ViT-B", PASCAL, {"backbone": VIT_B}, "58.7/30.9 69.7/37.5 73.2/37.6"),
            ("vit-l", "ViT-L", PASCAL, {"backbone": VIT_L}, "45.3/19.3 63.2/33.2 71.9/35.0"),
        ],
        cited=(
            Cited("MaskCLIP", PASCAL, 25.5),
            Cited("MaskCLIP+", PASCAL, 31.1),
            Cited("ReCo", PASCAL, 27.2),
        ),
    ),
    _table(
        "2",
        "backbones on Cityscapes",
        "kmeans ours ours*",
        [
            ("vit-s", "ViT-S", CITY, {}, "77.0/22.4 83.4/28.2 84.6/30.0"),
            ("vit-b", "ViT-B", CITY, {"backbone": VIT_B}, "74.8/23.2 81.4/26.8 84.2/30.7"),
            ("vit-l", "ViT-L", CITY, {"backbone": VIT_L}, "66.3/20.9 80.3/26.3 84.2/30.0"),
        ],
        cited=(
            Cited("MaskCLIP", CITY, 10.0),
            Cited("ReCo", CITY, 19.3),
            Cited("ReCo+", CITY, 24.2),
        ),
    ),
    _table(
        "3",
        "the protocol of supervised segmentation",
        "kmeans ours ours*",
        [
            (PASCAL, "Pascal Context", PASCAL, {}, "56.3/31.9 67.4/41.4 68.9/41.3"),
            (CITY, "Cityscapes", CITY, {}, "75.5/34.2 86.1/46.7 88.3/52.8"),
        ],
        "sliding",
        cited=(
            Cited("DeepLabv3+, supervised", PASCAL, 48.5),
            Cited("DeepLabv3+, supervised", CITY, 77.3),
        ),
    ),
    _table(
        "4",
        "ADE20K",
        "kmeans ours ours*",
        [(ADE, "ADE20K", ADE, {}, "50.7/19.2 63.3/21.6 62.5/23.6")],
        "sliding",
    ),
    _table(
        "5",
        "the number of eigenfunctions K on Pascal Context",
        "ours",
        [
            ("K64", "K = 64", PASCAL, {"clusters": 64}, "67.1/27.8"),
            ("K128", "K = 128", PASCAL, {"clusters": 128}, "71.6/33.2"),
            ("K256", "K = 256", PASCAL, {"clusters": 256}, "70.4/38.8"),
            ("K512", "K = 512", PASCAL, {"clusters": 512}, "71.1/37.9"),
        ],
    ),
    _table(
        "6",
        "the weight α of the pixel graph",
        "ours",
        [
            (f"{data}-alpha{alpha}", f"{title}, α = {alpha}", data, {"alpha": float(alpha)}, cell)
            for data, title, cells in (
                (PASCAL, "Pascal Context", "-/38.6 -/37.9 -/38.8 -/38.9 -/38.0"),
                (CITY, "Cityscapes", "-/27.2 -/26.7 -/28.2 -/28.1 -/27.9"),
            )
            for alpha, cell in zip(["0", "0.1", "0.3", "0.5", "0.7"], cells.split(), strict=True)
        ],
    ),
    _table(
        "7",
        "the weight β of the penalty on Pascal Context",
        "ours ours*",
        [
            ("beta0.04", "β = 0.04", PASCAL, {"beta": 0.04}, "-/38.8 -/39.0"),
            ("beta0.08", "β = 0.08", PASCAL, {"beta": 0.08}, "-/38.8 -/39.6"),
            ("beta0.16", "β = 0.16", PASCAL, {"beta": 0.16}, "-/39.0 -/39.3"),
        ],
    ),
    _table(
        "8",
        "zero-shot transfer from ImageNet",
        "ours",
        [
            (PASCAL, "ImageNet to Pascal Context", PASCAL, {"trained_on": NET}, "55.8/15.2"),
            (CITY, "ImageNet to Cityscapes", CITY, {"trained_on": NET}, "81.2/18.5"),
        ],
    ),
    _table(
        "9",
        "backbones pre-trained by CLIP on Pascal Context",
        "ours",
        [
            ("clip-b", "CLIP ViT-B/16", PASCAL, {"backbone": CLIP_B}, "-/37.2"),
            ("clip-l", "CLIP ViT-L/14", PASCAL, {"backbone": CLIP_L}, "-/38.7"),
            ("clip-l-336", "CLIP ViT-L/14 at 336", PASCAL, {"backbone": CLIP_L_336}, "-/44.0"),
        ],
    ),
    _table(
        "4.4",
        "as many clusters as classes on Pascal Context (text of section 4.4)",
        "ours/hungarian ours",
        [("classes", "K = number of classes", PASCAL, {"clusters": "classes"}, "-/23.5 -/27.7")],
    ),
    # The numbers are those of tables 1, 4 and 2: these are pictures of the same segments.
    _table(
        "figure-2",
        "segments on Pascal Context: image, annotation, K-means, ours",
        "kmeans ours",
        [("vit-s", "ViT-S", PASCAL, {}, "61.9/28.9 70.4/38.8")],
    ),
    _table(
        "figure-3",
        "segments on ADE20K: image, ours",
        "ours",
        [(ADE, "ADE20K", ADE, {}, "63.3/21.6")],
        "sliding",
        annotation=False,
    ),
    _table(
        "figure-cityscapes",
        "segments on Cityscapes (appendix): image, annotation, K-means, ours",
        "kmeans ours",
        [("vit-s", "ViT-S", CITY, {}, "77.0/22.4 83.4/28.2")],
    ),
    _table(
        "figure-eigenfunctions",
        "ψ's raw outputs beside the image (appendix), the exact eigenvectors below",
        "",
        [("vit-s", "ViT-S on Pascal Context", PASCAL, {}, "")],
    ),
)

#: Every table and figure by its number.
TABLES = {table.number: table for table in _TABLES}
