"""The options of training: one dataclass that the command line, the YAML file and the run share."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nefkern.images.layers import parse_high, parse_input_size
from nefkern.runtime.commandline import MAX_SEED, MAX_WORKERS
from nefkern.runtime.errors import UserError
from nefkern.training.presets import PRESETS

if TYPE_CHECKING:
    from nefkern.data import TrainTransform
    from nefkern.images.graph import GraphConfig
    from nefkern.spectral.eigenfunction import EigenfunctionConfig


def _option(default: Any, help: str, group: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, "group": group, **extra})


@dataclass
class TrainOptions:
    """Everything that decides a run. Defaults are the paper's; ``PRESETS`` has each data set's."""

    # method
    method: str = _option(
        "neural",
        "neural: ψ learns the leading eigenfunctions of κ batch by batch, as in the paper; "
        "spectral: one κ over all patches of all images, its exact leading eigenvectors, K-means "
        "on them, and their Nyström extension to other images: no training, minutes become "
        "seconds, better segments (docs/quality.md); auto: spectral for samples and folder, unless "
        "an option of ψ or a share for --k is given or several processes work; neural for the "
        "paper's data sets",
        "method",
        choices=("auto", "neural", "spectral"),
        shown="auto",
    )

    # data
    data: str = _option(
        "samples",
        "what to train on: samples (photographs that come inside installed packages), folder "
        "(images/{split}), or one of the paper's data sets (python -m nefkern.data); all but "
        "samples with --data-root",
        "data",
        choices=tuple(PRESETS),
    )
    data_root: str | None = _option(None, "the data set's folder", "data", metavar="DIR")
    split: str = _option("train", "which split to train on", "data")
    crop: int = _option(480, "side of the square training crops, in pixels", "data")
    resize: int | None = _option(
        None,
        "shorter side that the random resize starts from "
        "[13/12 of the crop, the paper's 520 for 480]",
        "data",
    )
    augment: bool = _option(
        True,
        "random resize, crop, flip and photometric distortion, those of "
        "Strudel et al. 2021; off: one plain crop of each image",
        "data",
    )
    views: int = _option(
        0,
        "augmented views of each image, seen in turn, the same for every seed, so that their "
        "features can be kept (--feature-cache); 0: new ones in every epoch, as in the paper; "
        "--method spectral and --edges dataset take all of them for their graph, with 0 one plain "
        "crop of each image",
        "data",
    )
    strict: bool = _option(
        False, "an unreadable image is an error, not reported and skipped", "data"
    )
    workers: int | None = _option(
        None,
        "processes that load images; 0: none beside the main one [half the cores of a process, "
        "at most 8]",
        "data",
    )

    # backbone
    backbone: str = _option("vit_small_patch16_384", "any timm model name", "backbone")
    weights: str = _option(
        "auto",
        "FILE (.safetensors, .pth), packaged, hub, random, or auto: "
        "packaged where installed, else the hub",
        "backbone",
    )
    high: str = _option(
        "auto",
        "graph features: of a transformer final (after the last norm), block:N (a block's output, "
        "before any norm), keys:N (of a block's attention), keys (of the last one's), late (the "
        "block three quarters of the way through, which knows parts best); of other networks "
        "stage:N, or late (the last two); N from 0; several side by side, as block:8,block:11; "
        "auto: keys for DINO v1, else final [spectral: late]",
        "backbone",
        metavar="MAPS",
    )
    input_size: str = _option(
        "auto",
        "what images are resized to before the backbone: crop (not at all), native (the input size "
        "of its training), or their shorter side in pixels; auto: native for CLIP, as in the "
        "paper, and for models that take one size only, else crop",
        "backbone",
        metavar="SIZE",
    )
    feature_cache: str | None = _option(
        None,
        "keep feature maps in this folder, keyed by content; "
        "for data seen again (--views, --no-augment)",
        "backbone",
        metavar="DIR",
    )

    # graph
    k: str = _option(
        "256",
        "feature neighbours of a patch among all patches of the batch: a "
        "number, or a share of them such as 2%% (the paper's 256 is 1.8%%); with --method spectral "
        "among all patches of all images [spectral: 64]",
        "graph",
    )
    pixel_graphs: str = _option(
        "10:2.0,5:0.1",
        "pixel graphs k̃:λ, neighbours and weight of the position, comma-separated",
        "graph",
    )
    alpha: float = _option(
        0.3,
        "weight α of the pixel graph: more where objects are large, less for thin ones "
        "[spectral: 0.5]",
        "graph",
    )
    graph_features: str = _option(
        "high",
        "what neighbours are near by: high, the backbone's last map, as in the paper; all: low, "
        "mid and high side by side, each channel scaled to variance 1 over the batch",
        "graph",
        choices=("high", "all"),
    )
    graph_scope: str = _option(
        "rank",
        "with several processes (torchrun), the patches that a graph joins: rank, those of one "
        "process's share of the batch; global, those of the whole batch",
        "graph",
        choices=("rank", "global"),
    )

    # data set's graph
    teacher: str = _option(
        "none",
        "spectral: compute the leading eigenvectors of the data set's κ, as --method spectral does "
        "(one plain crop of each image; kept in RUN/teacher, a run of its own), and let ψ learn "
        "them by regression: every training view, augmented or not, is labelled by Nyström's "
        "extension. What comes after those steps (--teacher-share) is training as usual, from that "
        "start; with --no-gumbel K-means on ψ's outputs makes the clusters, else their argmax",
        "data set's graph",
        choices=("none", "spectral"),
    )
    teacher_share: float | None = _option(
        None,
        "share of the steps, the first ones, that are regression, in (0, 1] [1]",
        "data set's graph",
    )
    teacher_loss: str = _option(
        "rows",
        "of the regression: rows, 1 − cosine of a patch's outputs and targets; values, their "
        "squared difference",
        "data set's graph",
        choices=("rows", "values"),
    )
    edges: str = _option(
        "batch",
        "batch: κ is made anew of each batch of random images; dataset: batches are drawn along "
        "the edges of the data set's κ (computed once, kept in RUN/graph.safetensors), groups of "
        "joined images together, and see that κ among their patches, weighted so that R = "
        "Ψκ(F,F)Ψᵀ is estimated without bias; images are then seen in the crops that are the "
        "graph's nodes: --views of each, with 0 one plain crop",
        "data set's graph",
        choices=("batch", "dataset"),
    )
    dataset_k: str = _option(
        "64",
        "feature neighbours of a patch in the data set's κ, among the patches of all images: a "
        "number, or a share of them; for --teacher and --edges dataset",
        "data set's graph",
    )

    # eigenvectors
    eigenvectors: int | None = _option(
        None,
        "m, leading eigenvectors that K-means sees [2K; with few clusters more, 256 or a hundredth "
        "of the patches]",
        "eigenvectors",
        metavar="M",
    )
    cluster_on: str = _option(
        "both",
        "what K-means sees of a patch: vectors, its unit row of the eigenvectors; both, beside "
        "that its features as far as the eigenvectors span them, of length 0.7",
        "eigenvectors",
        choices=("vectors", "both"),
    )
    graph_images: int | None = _option(
        None,
        "images whose patches the graph joins, evenly spread over the data set; the others get "
        "their clusters by the extension [as many as have 131,072 patches]",
        "eigenvectors",
        metavar="N",
    )
    keep: str = _option(
        "float16",
        "what is kept of the patches, for the extension to other images: all (in full precision), "
        "float16, or landmarks:N (N random ones, or a share of them as landmarks:25%%, in half "
        "precision: that much smaller and faster; on a small set 25%% cost 0.8 points of mIoU, "
        "10%% up to 2.7)",
        "eigenvectors",
    )

    # eigenfunctions
    num_eigenfunctions: int = _option(
        256, "K, the number of eigenfunctions and clusters", "eigenfunctions", flags=("-K",)
    )
    psi: str = _option(
        "transformer",
        "how ψ's blocks mix patches: transformer, by linear attention over the whole image; "
        "convolution, by 3 × 3 convolutions on the patch grid",
        "eigenfunctions",
        choices=("transformer", "convolution"),
    )
    blocks: int = _option(2, "residual blocks of ψ", "eigenfunctions")
    heads: int = _option(
        18,
        "attention heads, or groups of the convolution; the authors' number for every backbone",
        "eigenfunctions",
    )
    head_dim: int = _option(64, "channels of a head", "eigenfunctions")
    mlp_hidden: int = _option(
        576, "hidden width of the MLP; the authors' for every backbone", "eigenfunctions"
    )
    feature_map: str = _option(
        "softmax", "of the linear attention", "eigenfunctions", choices=("softmax", "elu")
    )
    orthogonal_head: bool = _option(True, "keep the head's columns orthogonal", "eigenfunctions")
    gumbel: bool = _option(
        True,
        "quantise by Gumbel-Softmax; off: continuous eigenfunctions, clustered by K-means "
        "on them at the end",
        "eigenfunctions",
    )
    standardize: bool | None = _option(
        None,
        "scale channels to mean 0 and variance 1: ψ's input over the first batch [on for backbones "
        "that are not transformers: their maps differ in scale]; with --method spectral the graph "
        "features over the data set [on]",
        "eigenfunctions",
    )
    temperature: str = _option(
        "1.0:0.3", "Gumbel-Softmax temperature start:end, annealed on a cosine", "eigenfunctions"
    )

    # objective
    beta: float = _option(0.08, "β at K = 256, scaled with 256/K", "objective")
    t: float = _option(0.01, "t, scale of the objective", "objective")
    min_norm: float = _option(1.0, "lower clamp of the columns' norm", "objective")

    # optimisation
    epochs: int = _option(
        40,
        "passes over the images; with --resume, more than the run had train it longer: learning "
        "rate and temperature then follow their cosines over the new number, from the epoch "
        "reached, so that both rise again",
        "optimisation",
    )
    batch_size: int = _option(
        16,
        "images of a batch, over all processes together; halved when memory runs out (the paper "
        "takes 8 then, and the authors' command for Cityscapes has 8)",
        "optimisation",
    )
    accumulate: int = _option(
        1, "batches, each with a graph of its own, whose gradients make a step", "optimisation"
    )
    lr: float = _option(1e-3, "learning rate of Adam", "optimisation")
    final_lr: float = _option(1e-5, "where its cosine decay ends", "optimisation")
    amp: bool = _option(False, "bfloat16 autocast for the backbone and ψ", "optimisation")
    tf32: bool = _option(
        True,
        "on a GPU, TF32 (11 significant bits) for the float32 matrix products and convolutions of "
        "the backbone and ψ, several times as fast; κ and the objective stay in float32",
        "optimisation",
    )
    compile: bool = _option(
        False,
        "torch.compile ψ and the backbone: a first step of a minute or two, then faster ones",
        "optimisation",
    )
    device: str = _option(
        "auto", "cpu, cuda, cuda:1 ...; auto: cuda where there is one", "optimisation"
    )
    seed: int = _option(0, "of everything random", "optimisation")

    # run
    out: str | None = _option(None, "the run folder [runs/<data>-<backbone>]", "run", metavar="DIR")
    resume: bool = _option(False, "go on from the checkpoint in --out, if there is one", "run")
    pictures: int = _option(12, "overlays to draw at the end", "run")
    record_steps: int | None = _option(
        None,
        "steps whose state before is kept, so that others can repeat them (python -m "
        "nefkern.verify), beside the first step, which needs none; three times ψ's weights each; "
        "0: nothing is recorded [1 for every 256 steps, from 1 to 8, within 512 MiB]",
        "run",
        metavar="N",
    )
    checkpoint_seconds: float = _option(
        60.0,
        "least time between two checkpoints; there is always one at the end and after an interrupt",
        "run",
    )

    def graph(self) -> GraphConfig:
        """The options of κ."""
        from nefkern.images.graph import GraphConfig  # here: --help should not wait for torch

        return GraphConfig(self.k, self.alpha, parse_pairs("--pixel-graphs", self.pixel_graphs))

    def eigenfunction(self, *, transformer: bool) -> EigenfunctionConfig:
        """The options of ψ, for a backbone that is a transformer or not."""
        from nefkern.spectral.eigenfunction import EigenfunctionConfig

        return EigenfunctionConfig(
            num_eigenfunctions=self.num_eigenfunctions,
            kind=self.psi,
            blocks=self.blocks,
            heads=self.heads,
            head_dim=self.head_dim,
            mlp_hidden=self.mlp_hidden,
            feature_map=self.feature_map,
            orthogonal=self.orthogonal_head,
            quantize=self.gumbel,
            standardize=not transformer if self.standardize is None else self.standardize,
        )

    def temperatures(self) -> tuple[float, float]:
        """Start and end of the Gumbel-Softmax temperature."""
        try:
            start, end = (float(part) for part in self.temperature.split(":"))
        except ValueError:
            start = end = 0.0
        if not (0 < start < math.inf and 0 < end < math.inf):
            raise UserError(
                f"--temperature {self.temperature}: expected start:end, both above 0, as 1.0:0.3"
            )
        return start, end

    def base_size(self) -> int:
        """Shorter side that the random resize starts from."""
        return self.resize or round(self.crop * 13 / 12)

    def transform(self) -> TrainTransform:
        """The augmentation; without one, plain crops."""
        from nefkern.data import TrainTransform

        if self.augmented:
            return TrainTransform(self.base_size(), self.crop)
        return TrainTransform(self.crop, self.crop, ratio=(1.0, 1.0), flip=0.0, photometric=False)

    @property
    def augmented(self) -> bool:
        """Whether views are augmented: those of the data set's κ are only if asked for."""
        new_views = self.method == "neural" and self.edges == "batch"
        return self.augment and (new_views or self.views > 0)

    @property
    def kind(self) -> str:
        """Of the run's functions: "quantised", "continuous" or "spectral"."""
        if self.method == "spectral":
            return "spectral"
        return "quantised" if self.gumbel else "continuous"

    @property
    def num_views(self) -> int:
        """Different views of each image; 0: new ones in every epoch."""
        return self.views if self.augmented else 1

    @property
    def regression_share(self) -> float:
        """Share of the steps, the first ones, in which ψ learns from its teacher; 0 without one."""
        if self.teacher == "none":
            return 0.0
        return 1.0 if self.teacher_share is None else self.teacher_share

    @property
    def batch_kappa(self) -> bool:
        """Whether a step of the training makes κ of its batch."""
        return self.edges == "batch" and self.regression_share < 1

    def kept(self, rows: int) -> int:
        """How many of the patches ``--keep`` keeps for the extension.

        Raises:
            UserError: neither all, float16 nor landmarks:N.
        """
        kind, _, amount = self.keep.partition(":")
        if self.keep in ("all", "float16"):
            return rows
        share = amount.endswith("%")
        try:
            number = float(amount[:-1]) / 100 * rows if share else int(amount)
        except (ValueError, OverflowError):
            number = 0
        if kind != "landmarks" or not 0 < number < math.inf or (share and number > rows):
            raise UserError(
                f"--keep {self.keep}: expected all, float16, or landmarks:N with a number of "
                "patches or a share of them, as landmarks:25%"
            )
        return min(rows, max(1, round(number)))

    def run_folder(self) -> Path:
        """Where the run goes."""
        name = self.data
        if self.data == "folder" and self.data_root:
            name = os.path.basename(os.path.abspath(self.data_root)) or name  # of "." too
        return Path(self.out or f"runs/{name}-{self.backbone.replace('/', '_')}")

    def check(self) -> None:
        """Raise a UserError that names the first option out of range."""
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at most {most}")
        for name in ("lr", "t", "min_norm"):
            if not 0 < getattr(self, name) < math.inf:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: expected more than 0")
        if self.data != "samples" and not self.data_root:
            raise UserError(f"--data {self.data}: expected --data-root DIR beside it")
        if self.data == "samples" and self.data_root:
            raise UserError(
                f"--data-root {self.data_root}: expected --data folder beside it, or one of "
                f"{', '.join(name for name in PRESETS if name not in ('samples', 'folder'))}"
            )
        parse_high(self.high)
        parse_input_size(self.input_size)
        self.graph()
        self.temperatures()
        self._check_dataset_graph()
        self.kept(sys.maxsize)

    def _check_dataset_graph(self) -> None:
        """Refuse what makes no sense of a teacher, and of the data set's edges."""
        from nefkern.images.graph import resolve_neighbours

        resolve_neighbours(self.dataset_k, sys.maxsize, flag="--dataset-k")
        if self.teacher_share is not None:
            if not 0 < self.teacher_share <= 1:
                raise UserError(
                    f"--teacher-share {self.teacher_share}: expected more than 0 and at most 1"
                )
            if self.teacher == "none":
                raise UserError(
                    f"--teacher-share {self.teacher_share}: expected --teacher spectral beside it"
                )
        if self.edges == "dataset" and self.batch_size < 2:
            raise UserError(
                f"--batch-size {self.batch_size}: expected at least 2 with --edges dataset, whose "
                "batches are made of pairs of images"
            )
        if self.edges == "dataset" and self.accumulate > 1:
            raise UserError(
                f"--accumulate {self.accumulate}: expected 1 with --edges dataset; take a larger "
                "--batch-size instead"
            )


_LEAST = {
    "crop": 1, "resize": 1, "views": 0, "workers": 0, "num_eigenfunctions": 2, "blocks": 0,
    "heads": 1, "head_dim": 1, "mlp_hidden": 1, "beta": 0, "epochs": 1, "batch_size": 1,
    "accumulate": 1, "eigenvectors": 1, "graph_images": 1, "final_lr": 0, "pictures": 0,
    "checkpoint_seconds": 0, "seed": 0, "record_steps": 0,
}  # fmt: skip

#: Beyond these is a slip of the keyboard, and more than any memory or patience holds.
_MOST = {
    "seed": MAX_SEED, "workers": MAX_WORKERS, "crop": 1 << 16, "resize": 1 << 16, "blocks": 256,
    "heads": 1 << 12, "head_dim": 1 << 14, "mlp_hidden": 1 << 20, "num_eigenfunctions": 1 << 20,
    "batch_size": 1 << 20, "epochs": 1 << 40, "views": 1 << 31, "accumulate": 1 << 31,
    "eigenvectors": 1 << 20, "pictures": 1 << 20, "record_steps": 1 << 20,
}  # fmt: skip


def parse_pairs(flag: str, text: str) -> tuple[tuple[int, float], ...]:
    """Read "10:2.0,5:0.1" as ((10, 2.0), (5, 0.1)); an empty text gives no pairs."""
    try:
        parts = [part.split(":") for part in text.split(",") if part.strip()]
        return tuple((int(k), float(weight)) for k, weight in parts)
    except ValueError:
        raise UserError(f"{flag} {text}: expected pairs k̃:λ such as 10:2.0,5:0.1") from None
