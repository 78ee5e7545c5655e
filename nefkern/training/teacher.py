"""``--teacher spectral``: ψ learns the eigenvectors of the data set's κ by regression.

The teacher is a run of ``--method spectral`` in a folder of the run. What it says of an image is
Nyström's extension of its eigenvectors to the image's patches, so that any view, augmented or not,
has targets.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.images.backbone import Backbone, Features
from nefkern.images.graph import resolve_neighbours
from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import make_folder
from nefkern.training.options import TrainOptions
from nefkern.training.parts import Parts
from nefkern.training.presets import NEURAL_ONLY, SPECTRAL_ONLY
from nefkern.training.runs import Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.spectral_model import SpectralModel

#: The teacher's run, within the run's folder.
FOLDER = "teacher"

#: Bytes of targets that are kept for views seen again.
_KEPT_BYTES = 1 << 30


class _TeacherTrainer(SpectralTrainer):
    flag, k_flag, way_out = "--teacher spectral", "--dataset-k", "do without a teacher"


def check_data_set(options: TrainOptions, patches: int) -> None:
    """Refuse what a training cannot have that looks at the data set's κ, if it does.

    Args:
        options: of the training.
        patches: of one crop of every image.

    Raises:
        UserError: several processes, or more neighbours than patches.
    """
    if options.teacher == "spectral":
        asking = "--teacher spectral"
    elif options.edges == "dataset":
        asking = "--edges dataset"
    else:
        return
    if distributed.ranks() > 1:
        raise UserError(
            f"{asking}: works in one process, not in {distributed.ranks()}; start it without "
            "torchrun"
        )
    resolve_neighbours(
        options.dataset_k,
        patches,
        "the data set",
        "take more images or a larger --crop",
        "--dataset-k",
    )


def spectral_options(options: TrainOptions, folder: object, **changes: object) -> TrainOptions:
    """Those of a run of ``--method spectral`` beside a run that trains ψ: the same images, backbone
    and pixel graphs; ``--dataset-k`` neighbours, and one plain crop of each image."""
    others = NEURAL_ONLY | SPECTRAL_ONLY  # a file may hold any of both
    usual = {f.name: f.default for f in dataclasses.fields(options) if f.name in others}
    usual |= {"eigenvectors": options.num_eigenfunctions, "cluster_on": "vectors"}  # ψ's K
    usual |= {"k": options.dataset_k, "views": 0, "resume": True, "out": str(folder)}
    return dataclasses.replace(options, **usual | {"method": "spectral"} | changes)


def teacher_of(options: TrainOptions, run: Run, parts: Parts) -> Teacher:
    """Compute the data set's eigenvectors, or take up what is there of them.

    Raises:
        UserError: options that the data set cannot carry; fewer than K eigenvectors that have an
            extension.
        KeyboardInterrupt: after a signal; the stages done are kept.
    """
    make_folder(run.folder, run.path(FOLDER))
    asked = spectral_options(options, run.path(FOLDER), pictures=0)
    model = _TeacherTrainer(asked, Run.create(asked), parts).train()
    if model.num_functions < options.num_eigenfunctions:
        raise UserError(
            f"--teacher spectral: {model.num_functions} of the {options.num_eigenfunctions} "
            f"eigenvectors that ψ is to learn have an extension to other images; lower "
            "--alpha or -K"
        )
    return Teacher(model, parts.backbone, options)


class Teacher:
    """Targets for ψ's outputs, and how far these are from them.

    A continuous ψ learns the eigenvectors V themselves, in their order. The K functions of a
    quantised one should tell clusters apart by their argmax: it learns V Q, a basis of the same
    space whose axes lie as near as possible to the centres of K-means on V's unit rows
    (:func:`indicator_rotation`).

    Args:
        model: the data set's eigenvectors, K of them, with their K-means.
        backbone: that ψ sees images through.
        options: of the run.

    Attributes:
        share: of the training's steps that are regression, the first ones.
    """

    def __init__(self, model: SpectralModel, backbone: Backbone, options: TrainOptions) -> None:
        self.model, self.backbone = model, backbone
        self.share, self.kind = options.regression_share, options.teacher_loss
        self.rotation = indicator_rotation(model.kmeans.centers) if options.gumbel else None
        self._keep = options.num_views > 0  # views come again
        self._kept: dict[bytes, Tensor] = {}

    def teaches(self, progress: float) -> bool:
        """Whether the step at ``progress`` of the training, in [0, 1], is one of regression."""
        return progress < self.share

    def loss(self, outputs: Tensor, features: Features, images: Tensor) -> tuple[Tensor, Tensor]:
        """How far ψ's outputs are from their targets.

        Args:
            outputs: ``[B, h·w, K]``, of ψ.
            features: of the images.
            images: uint8 ``[B, 3, crop, crop]``.

        Returns:
            The loss, see :func:`regression_loss`, and the mean cosine of rows with their targets.
        """
        targets = self.targets(features, images)
        outputs = outputs.float()
        cosine = F.cosine_similarity(outputs, targets, dim=-1).mean()
        return regression_loss(outputs, targets, self.kind), cosine.detach()

    def targets(self, features: Features, images: Tensor) -> Tensor:
        """Values of the functions to learn at the patches, ``[B, h·w, K]`` float32, each of mean
        square 1 over the data set.

        An image's targets do not depend on the others of its batch. Those of views that come again
        are kept, as far as a gigabyte goes.
        """
        if not self._keep:
            return self._computed(features, images)
        keys = [_digest(image) for image in images]
        found = [self._kept.get(key) for key in keys]
        new = [place for place, one in enumerate(found) if one is None]
        if new:
            part = Features(features.high[new], features.concat[new], features.grid)
            for place, one in zip(new, self._computed(part, images[new]), strict=True):
                found[place] = one
                self._remember(keys[place], one)
        return torch.stack(found)

    def _computed(self, features: Features, images: Tensor) -> Tensor:
        found = self.model.functions(features, self.backbone.seen(images))
        return found if self.rotation is None else found @ self.rotation

    def _remember(self, key: bytes, targets: Tensor) -> None:
        size = targets.numel() * targets.element_size()
        if (len(self._kept) + 1) * size <= _KEPT_BYTES:
            self._kept[key] = targets.clone()


def _digest(image: Tensor) -> bytes:
    return hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).digest()


def regression_loss(outputs: Tensor, targets: Tensor, kind: str) -> Tensor:
    """The mean over rows of the squared error, over twice what targets of mean 0 would give.

    "rows": of rows scaled to unit length, |u/|u| − v/|v||² / 2 = 1 − cos(u, v): what K-means on
    unit rows sees, indifferent to lengths. "values": of the values as they are, |u − v|² / 2K for
    targets of mean square 1.

    Args:
        outputs: u, ``[..., K]``, floating point.
        targets: v, of the same shape.
        kind: which.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "rows":
        return (1 - F.cosine_similarity(outputs, targets, dim=-1)).mean()
    if kind == "values":
        return F.mse_loss(outputs, targets) / 2
    raise ValueError(f"kind: expected rows or values, got {kind!r}")


def indicator_rotation(centers: Tensor) -> Tensor:
    """Q, orthogonal, for which unit rows x of a cluster have their largest part in one place of xQ.

    Eigenvectors are determined up to a rotation of their space; spectral clustering may turn them
    towards indicators of clusters and take the argmax (Yu, Shi, "Multiclass spectral clustering",
    ICCV 2003). Here in one step, from the clusters that K-means found: among all orthogonal
    matrices Q comes nearest to having their centres as columns, C Q ≈ I (the orthogonal Procrustes
    problem: Q = V Uᵀ of C = U S Vᵀ).

    Args:
        centers: C, ``[K, K]``, of K-means on unit rows; each counts as its direction.

    Returns:
        ``[K, K]`` float32.
    """
    u, _, vh = torch.linalg.svd(F.normalize(centers.double(), dim=1))
    return (u @ vh).mT.float().contiguous()
