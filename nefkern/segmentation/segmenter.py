"""A trained run, ready to segment images (section 3.6)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from nefkern.data.constants import LONGEST
from nefkern.data.images import read_image, upright_pixels
from nefkern.images.backbone import Backbone, Features
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.graph import image_kappa, kappa, resolve_neighbours, standardized
from nefkern.images.loading import load_backbone
from nefkern.ops import CSRGraph
from nefkern.runtime.commandline import EDGES
from nefkern.runtime.devices import choose_device
from nefkern.runtime.errors import UserError
from nefkern.runtime.hub import run_folder
from nefkern.segmentation.clusterer import Clusterer
from nefkern.segmentation.flip import flip_averaged
from nefkern.segmentation.graph_edges import GraphRefiner
from nefkern.segmentation.heads import NeuralHead, SpectralHead
from nefkern.segmentation.methods import CONTINUOUS
from nefkern.segmentation.refinement import Job, Refiner
from nefkern.segmentation.windows import Predictor, Replay, sliding_clusters, sliding_windows
from nefkern.spectral.eigenfunction import Eigenfunction
from nefkern.training.options import TrainOptions
from nefkern.training.runs import CHECKPOINT, CLUSTERS, CONFIG, STAGES, Run
from nefkern.training.spectral_model import SpectralModel


@dataclass
class Maps:
    """What one pass over a batch gives, all on the patch grid ``h × w`` of the padded images.

    Attributes:
        logits: ``[B, K, h, w]`` float32: the head's output over the final temperature; that of a
            continuous ψ as it is; of a spectral run K-means' scores, whose argmax is the cluster.
        hidden: ``[B, D, h, w]``: ψ's features before the head; of a spectral run the unit rows of
            the extended eigenvectors.
        graph: ``[B, C, h, w]``: the backbone's graph features F.
        concat: ``[B, D, h, w]``: ψ's input.
        padded: ``(H, W)`` that the grid spans, in pixels of the images: padding included, and not
            whole where the backbone sees the images resized.
        functions: ``[B, m, h, w]`` float32: the functions themselves, ψ's outputs or the extended
            eigenvectors.
    """

    logits: Tensor
    hidden: Tensor
    graph: Tensor
    concat: Tensor
    padded: tuple[float, float]
    functions: Tensor


class Segmenter:
    """Backbone and a run's functions together: from images to clusters.

    Args:
        backbone: frozen feature extractor.
        trained: the eigenfunctions ψ, or what a run of ``--method spectral`` keeps.
        options: the run's options (temperature, crop, amp).
        cache: keep the backbone's maps in this folder; None keeps nothing.
        seen: a folder of maps that is only read, as those of the run's training.
        clusterer: K-means on the outputs of a continuous ψ, without which it has no clusters.
            A spectral run brings its own.
        flip: average logits over an image and its mirror image.
    """

    def __init__(
        self,
        backbone: Backbone,
        trained: Eigenfunction | SpectralModel,
        options: TrainOptions,
        *,
        cache: Path | None = None,
        seen: Path | None = None,
        clusterer: Clusterer | None = None,
        flip: bool = False,
    ) -> None:
        self.backbone, self.options, self.flip = backbone, options, flip
        self.head: NeuralHead | SpectralHead
        if isinstance(trained, SpectralModel):
            self.head = SpectralHead(trained)
            clusterer = self.head.clusterer
        else:
            self.head = NeuralHead(trained, options)
        self.clusterer = clusterer
        self.features = FeatureCache(cache, backbone, amp=options.amp, tf32=options.tf32, also=seen)
        self.graph_config = options.graph()
        self.num_clusters = options.num_eigenfunctions
        # In pixels of the images: 1 where the backbone sees them resized, to any size.
        self.patch = backbone.alignment
        # Sliding windows lie on the patch grid and overlap by a third, as the paper's 480 / 320.
        self.window = -(-options.crop // self.patch) * self.patch
        self.stride = max(1, round(self.window / self.patch * 2 / 3)) * self.patch

    @classmethod
    def load(
        cls,
        run: str | Path,
        device: str = "auto",
        *,
        cache: Path | None = None,
        flip: bool = False,
        amp: bool | None = None,
    ) -> Segmenter:
        """Load a run folder, or a run on the model hub.

        Args:
            run: what ``python -m nefkern.train`` wrote; or a repository of
                ``python -m nefkern.push``: text such as "hf://owner/name",
                "hf://owner/name@revision", or "owner/name" where there is no such folder. Of a
                repository only safetensors and YAML are taken.
            device: "cpu", "cuda", or "auto".
            cache: keep the backbone's maps in this folder, for images seen again.
            flip: average logits over an image and its mirror image: twice the time.
            amp: whether the backbone runs in bfloat16; None: as in the run's training.

        Raises:
            UserError: no run there, a repository that cannot be had, no checkpoint yet or one of
                another version, or other backbone weights than the run's.
        """
        folder = Run(run_folder(run))
        options, config = folder.options(), folder.config()
        if amp is not None:
            options = replace(options, amp=amp)
        found = folder.load()
        if found is None:
            raise UserError(f"{run}: holds no checkpoint yet")
        backbone = load_backbone(
            options.backbone,
            folder.weights(options),
            high=options.high,
            input_size=options.input_size,
            device=choose_device(device),
        )
        if backbone.identity != config.get("backbone", {}).get("digest"):
            raise UserError(
                f"{run}: was trained on other weights of {options.backbone} than are found now "
                f"({backbone.identity}); see --weights in its config.yaml"
            )
        return cls(
            backbone,
            _trained(folder, options, backbone, *found),
            options,
            cache=cache,
            seen=folder.feature_cache(options),
            clusterer=clusters_of(folder, options, backbone.mean.device),
            flip=flip,
        )

    @property
    def kind(self) -> str:
        """Of the functions: "quantised", "continuous" or "spectral"."""
        return self.head.kind

    @property
    def num_functions(self) -> int:
        """m: K functions of ψ, or the eigenvectors of a spectral run."""
        return self.head.num_functions

    @property
    def psi(self) -> Eigenfunction:
        """ψ; a spectral run has none."""
        return self.head.psi

    def untrained(self, seed: int) -> Segmenter:
        """The same backbone with ψ freshly initialised: the control of what training adds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            psi = Eigenfunction(self.backbone.concat_dim, self.psi.config)
        return Segmenter(self.backbone, psi.to(self.device), self.options)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.backbone.mean.device

    def pad(self, images: Tensor) -> tuple[Tensor, tuple[float, float]]:
        """Images ``[B, 3, H, W]`` as the backbone sees them, completed to whole patches, on its
        device; and what these span in pixels of the images."""
        return self.backbone.seen(images.to(self.device)), self.backbone.extent(images.shape[-2:])

    @torch.no_grad()
    def maps(self, images: Tensor) -> Maps:
        """All maps of a batch from one pass.

        Args:
            images: ``[B, 3, H, W]`` RGB, uint8 or float in [0, 1], of one size.
        """
        images = images.to(self.device)
        features = self.features(images)
        h, w = features.grid
        found = self.head(features, self.backbone.seen(images))

        def as_map(tokens: Tensor) -> Tensor:
            return tokens.transpose(1, 2).unflatten(2, (h, w))

        return Maps(
            logits=as_map(found.logits),
            hidden=as_map(found.hidden),
            graph=as_map(features.high),
            concat=as_map(features.concat),
            padded=self.backbone.extent(images.shape[-2:]),
            functions=as_map(found.functions),
        )

    @torch.no_grad()
    def kappa(self, images: Tensor, maps: Maps, *, per_image: bool = False) -> CSRGraph:
        """κ of a batch, made as in training.

        Args:
            images: ``[B, 3, H, W]``, what ``maps`` come from.
            maps: of :meth:`maps`.
            per_image: each image's own κ instead, on one diagonal; with as many feature neighbours
                as a patch had in a training batch, as far as the image has them.

        Raises:
            UserError: as many neighbours asked for as the batch has patches.
        """
        images, grid = self.backbone.seen(images.to(self.device)), maps.graph.shape[2:]
        near_by = self._near_by(maps, per_image)
        if not per_image:
            return kappa(near_by, images, grid, self.graph_config)
        return image_kappa(near_by, images, grid, self.graph_config, self._neighbours())

    def _neighbours(self) -> int:
        """Feature neighbours that a patch had in the training's graph."""
        if isinstance(self.head, SpectralHead):
            return self.head.model.neighbours
        cells = math.prod(self.backbone.grid((self.window, self.window)))
        return resolve_neighbours(self.options.k, self.options.batch_size * cells)

    def _near_by(self, maps: Maps, per_image: bool) -> Tensor:
        """The rows that feature neighbours are near by in, ``[B·h·w, ·]``; see training."""
        height, width = maps.graph.shape[2:]
        high, concat = (m.flatten(2).transpose(1, 2) for m in (maps.graph, maps.concat))
        if isinstance(self.head, SpectralHead):
            return self.head.model.rows(Features(high, concat, (height, width)))
        if self.options.graph_features == "high":
            return high.flatten(0, 1)
        return torch.cat([standardized(r) for r in concat]) if per_image else standardized(concat)

    @torch.no_grad()
    def project(self, concat: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """ψ alone, on a ``grid`` of ``h × w`` patches: its input ``[B, h·w, D]`` to logits
        ``[B, h·w, K]`` and hidden ``[B, h·w, D]``."""
        found = self.head.project(concat, grid)
        return found.logits, found.hidden

    def logits(
        self, image: Tensor, *, window: int | None = None, stride: int | None = None
    ) -> Tensor:
        """Cluster logits at the image's resolution, see :meth:`cluster_logits`.

        Args:
            image: ``[3, H, W]`` RGB, uint8 or float in [0, 1].
            window, stride: sliding windows in pixels; None takes the training crop and two thirds
                of it. Images no larger than the window go through whole.

        Returns:
            ``[K, H, W]`` float32.
        """
        return sliding_windows(self.predict, image, *self._windows(window, stride))

    def _windows(self, window: int | None, stride: int | None) -> tuple[int, int]:
        return window or self.window, stride or self.stride

    def predict(self, images: Tensor) -> tuple[Tensor, tuple[float, float]]:
        """Cluster logits on the patch grid, and the size in pixels that the grid spans: the
        predictor that :mod:`nefkern.segmentation.windows` asks for.
        """
        if self.flip:
            return flip_averaged(self._predict, self.pad)(images)
        return self._predict(images)

    def _predict(self, images: Tensor) -> tuple[Tensor, tuple[float, float]]:
        maps = self.maps(images)
        return self.cluster_logits(maps), maps.padded

    def cluster_logits(self, maps: Maps) -> Tensor:
        """What the argmax is taken of, ``[B, K, h, w]``.

        ψ's outputs, where they are quantised. Those of a continuous ψ are signed functions, up to a
        rotation; as in spectral clustering, K-means on them makes the clusters (section 3.5):
        columns scaled to one norm over the training images, rows to unit norm. A spectral run's
        logits are K-means' scores already.

        Raises:
            UserError: see :meth:`require_clusters`.
        """
        self.require_clusters()
        if self.kind == "continuous":
            return self.clusterer.logits({"logits": maps.logits})
        return maps.logits

    def require_clusters(self) -> None:
        """Raise a UserError if this is a continuous ψ without its K-means."""
        if self.clusterer is None and self.kind == "continuous":
            raise UserError(
                "continuous eigenfunctions (--no-gumbel) become clusters by K-means on them, and "
                f"the run has none ({CLUSTERS}); make them with python -m nefkern.train --config "
                "RUN/config.yaml --out RUN --resume"
            )

    def merged(self, count: int, flag: str = "count") -> Tensor:
        """Which of ``count`` groups each cluster is merged to, int64 ``[K]`` on the CPU: the tree
        of the run's clusters, cut; see :mod:`nefkern.spectral.merging`.

        Raises:
            UserError: more than there are clusters, or a quantised ψ, whose clusters are functions
                and have no centres; ``flag`` is where the number came from.
        """
        self.require_clusters()
        if self.clusterer is None:
            raise UserError(
                f"{flag} {count}: merges the clusters of K-means, as runs of --method spectral and "
                "continuous eigenfunctions (--no-gumbel) have them; this run's are ψ's own outputs"
            )
        if not 1 <= count <= self.num_clusters:
            raise UserError(
                f"{flag} {count}: expected 1 to {self.num_clusters}, the run's clusters"
            )
        return self.clusterer.merged(count)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Cluster logits ``[K, ...]`` as probabilities, as the CRF needs them."""
        quantised = self.kind == "quantised"
        return logits.softmax(0) if quantised else self.clusterer.probabilities(logits)

    def __call__(self, image: object, *, edges: str = "bilinear") -> Tensor:
        """Segment one image at its own resolution.

        The backbone sees it at the scale of training, its shorter side as long as a crop, and in
        one piece, so that no window's edge shows; only an image more than twice as long as wide
        goes through in windows, and a strip is enlarged no further than to ``LONGEST`` crops.
        Logits are up-sampled to the image's pixels before the argmax, in strips: memory does not
        grow with K times the pixels.

        Args:
            image: a path, a PIL image (either is turned upright and made RGB), a ``[H, W, 3]``
                uint8 array, or a ``[3, H, W]`` tensor (uint8, or float in [0, 1]).
            edges: "bilinear": as they are up-sampled; "graph": drawn to the image's by a solve on
                its pixels (:mod:`nefkern.segmentation.graph_edges`); "crf": by a fully connected
                CRF, eight to ten times slower (:mod:`nefkern.segmentation.crf`).

        Returns:
            The cluster of every pixel, ``[H, W]`` int64 on the CPU.

        Raises:
            UserError: not an image, values out of range, or an image smaller than a patch; "crf"
                without pydensecrf.
            ValueError: other ``edges``.
        """
        if edges not in EDGES:
            raise ValueError(f"edges: expected one of {', '.join(EDGES)}, got {edges!r}")
        pixels = as_image(image)
        name = image if isinstance(image, (str, Path)) else "image"
        self.check_size(pixels, name=name)
        predict, *cut = self.at_training_scale(pixels)
        if edges == "bilinear":
            return sliding_clusters(predict, *cut, batch_size=1).cpu()
        refiner = GraphRefiner() if edges == "graph" else Refiner()
        job = self.refinable(Replay(predict), *cut, self.training_scale(pixels), name=str(name))
        with refiner([job]) as results:
            return next(iter(results)).labels.cpu()

    def refinable(
        self,
        replay: Replay,
        pixels: Tensor,
        window: int,
        stride: int,
        scale: float = 1.0,
        *,
        name: str,
        context: object = None,
    ) -> Job:
        """What has to be known to draw an image's edges: the clusters that win a pixel, and their
        probabilities.

        Args:
            replay: of the predictor; it keeps what that says.
            pixels, window, stride: as :mod:`nefkern.segmentation.windows` takes them.
            scale: by how much the predictor enlarges pixels.
            name, context: of the job.
        """
        clusters = sliding_clusters(replay, pixels, window, stride, batch_size=1)
        shown = occurring(clusters).to(clusters.device)
        logits = sliding_windows(replay.select(shown), pixels, window, stride, batch_size=1)
        whole = pixels if pixels.dtype == torch.uint8 else (255 * pixels).round().byte()
        patch = self._patch_side(pixels, window, scale)
        return Job(name, whole, self.probabilities(logits), shown, context, patch)

    def _patch_side(self, pixels: Tensor, window: int, scale: float) -> float:
        """Side of a patch in pixels of an image whose windows reach the network enlarged by
        ``scale``, and the backbone perhaps resized once more; of the mean area."""
        height, width = (max(1, round(min(side, window) * scale)) for side in pixels.shape[1:])
        extent, grid = self.backbone.extent((height, width)), self.backbone.grid((height, width))
        return math.sqrt(math.prod(extent) / math.prod(grid)) / scale

    def check_size(self, pixels: Tensor, name: object = "image") -> None:
        """Raise a UserError that names the image if it is smaller than a patch."""
        if min(pixels.shape[1:]) < self.patch:
            raise UserError(
                f"{name}: {pixels.shape[2]} × {pixels.shape[1]} pixels, expected at least one "
                f"patch, {self.patch} × {self.patch}"
            )

    def training_scale(self, pixels: Tensor) -> float:
        """By how much :meth:`__call__` enlarges ``[3, H, W]`` pixels."""
        short, long = sorted(pixels.shape[1:])
        return min(self.options.crop / short, max(1.0, LONGEST * self.options.crop / long))

    def at_training_scale(self, pixels: Tensor) -> tuple[Predictor, Tensor, int, int]:
        """How :meth:`__call__` looks at ``[3, H, W]`` pixels: predictor, pixels, window, stride."""
        scale = self.training_scale(pixels)

        def predict(crops: Tensor) -> tuple[Tensor, tuple[float, float]]:
            size = [max(self.patch, round(side * scale)) for side in crops.shape[2:]]
            logits, padded = self.predict(resize(crops, size, antialias=True))
            # The grid's extent, in pixels of the crops: padding included.
            extent = [p * c / s for p, c, s in zip(padded, crops.shape[2:], size, strict=True)]
            return logits, (extent[0], extent[1])

        window = round(2 * self.options.crop / scale)
        return predict, pixels, window, -(-2 * window // 3)


def _trained(
    run: Run,
    options: TrainOptions,
    backbone: Backbone,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
) -> Eigenfunction | SpectralModel:
    """What the checkpoint holds, on the backbone's device."""
    if options.method == "spectral":
        if metadata.get("stage") != STAGES[-1]:
            raise UserError(
                f"{run.folder}: is not complete; python -m nefkern.train --config "
                f"{run.path(CONFIG)} --out {run.folder} --resume goes on"
            )
        pairs = options.graph().pixel_graphs
        model = SpectralModel.from_state(tensors, pairs, run.path(CHECKPOINT))
        channels = backbone.concat_dim if model.every else backbone.dim
        if model.kmeans is None or model.embedding.rows.shape[1] != channels:
            raise UserError(f"{run.path(CHECKPOINT)}: does not fit the run's backbone")
        return model.to(backbone.mean.device)
    psi = Eigenfunction(
        backbone.concat_dim, options.eigenfunction(transformer=backbone.is_transformer)
    )
    psi.load(tensors, run.folder)
    return psi.to(backbone.mean.device)


def clusters_of(run: Run, options: TrainOptions, device: torch.device) -> Clusterer | None:
    """The clusters that a run of a continuous ψ keeps, if it does."""
    found = run.load_clusters() if options.kind == "continuous" else None
    if found is None:
        return None
    try:
        clusterer = Clusterer(CONTINUOUS, options.num_eigenfunctions).load(found)
        if clusterer.kmeans.centers.shape[1] != options.num_eigenfunctions:
            raise ValueError("centers: of other functions")
    except ValueError as error:
        raise UserError(
            f"{run.path(CLUSTERS)}: not the run's clusters ({error}); remove it, and --resume "
            "makes it anew"
        ) from None
    return clusterer.to(device)


def occurring(clusters: Tensor) -> Tensor:
    """The clusters that win a pixel, int64 and ascending: ``unique`` without sorting."""
    counts = torch.zeros(0, dtype=torch.int64)
    for part in clusters.flatten().split(1 << 22):
        seen = part.bincount(minlength=len(counts)).cpu()
        seen[: len(counts)] += counts
        counts = seen
    return counts.nonzero().flatten()


def as_image(image: object) -> Tensor:
    """Any of the accepted forms as ``[3, H, W]``; see :meth:`Segmenter.__call__`."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Tensor):
        return _checked(image)
    if isinstance(image, Image.Image):
        return upright_pixels(image, "image")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise UserError(f"image: expected uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def _checked(image: Tensor) -> Tensor:
    """A tensor in one of the accepted forms, floats in float32."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"image: expected a tensor [3, H, W], got {list(image.shape)}")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise UserError(f"image: expected a uint8 or floating-point tensor, got {image.dtype}")
    image = image.detach().float()
    if image.numel() and not (image.min() >= 0 and image.max() <= 1):  # nor is it with a NaN
        low, high = image.min().item(), image.max().item()
        raise UserError(f"image: expected values in [0, 1], it has {low:.4g} to {high:.4g}")
    return image
