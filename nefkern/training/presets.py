"""Presets of data sets and methods for training and scoring, and options of one method only."""

from __future__ import annotations

from typing import Any

#: What ``--data samples`` takes instead of the paper's values, wherever nothing else is said: a few
#: dozen photographs and two cores ask for fewer clusters, smaller batches and a packaged backbone.
SAMPLES: dict[str, Any] = {
    "backbone": "vit_small_patch14_dinov2",
    "crop": 336,
    "views": 2,
    "k": "2%",
    "num_eigenfunctions": 32,
    "epochs": 20,
    "batch_size": 9,
    "amp": True,
    "workers": 0,
}

#: What each data set takes wherever nothing else is said (section 4.1). The paper gives no sizes
#: for ImageNet: it takes Pascal Context's, on which the run is scored. Batches are of 16 images, in
#: the paper "or 8 if out of memory"; the authors' command for Cityscapes has 8. The last three are
#: not the paper's: VOC's images are Pascal Context's, the others are seen as large as the field's
#: protocols show them.
PRESETS: dict[str, dict[str, Any]] = {
    "samples": SAMPLES,
    "folder": {},
    "pascal_context": {"crop": 480, "resize": 520},
    "cityscapes": {"crop": 768, "resize": 1024},
    "ade20k": {"crop": 512, "resize": 512, "num_eigenfunctions": 512, "epochs": 20},
    "imagenet": {"crop": 480, "resize": 520, "epochs": 5},
    "voc2012": {"crop": 480, "resize": 520},
    "cocostuff": {"crop": 320, "resize": 320},
    "potsdam": {"crop": 200, "resize": 200},
}

#: Data sets that ``--method auto`` computes the spectrum of; the others are the paper's.
COMPUTED = ("samples", "folder", "voc2012", "cocostuff", "potsdam")

#: What ``--method spectral`` takes instead, wherever nothing else is said (docs/quality.md).
SPECTRAL: dict[str, Any] = {"k": "64", "alpha": 0.5, "high": "late", "views": 0}

#: Options of one method only.
NEURAL_ONLY = frozenset((
    "graph_scope", "psi", "blocks", "heads", "head_dim", "mlp_hidden", "feature_map",
    "orthogonal_head", "gumbel", "temperature", "beta", "t", "min_norm", "epochs",
    "accumulate", "lr", "final_lr", "compile", "checkpoint_seconds", "record_steps",
    "teacher", "teacher_share", "teacher_loss", "edges", "dataset_k",
))  # fmt: skip
SPECTRAL_ONLY = frozenset(("eigenvectors", "cluster_on", "graph_images", "keep"))

#: Window and stride of protocol B, in pixels.
WINDOWS = {
    "pascal_context": (480, 320),
    "cityscapes": (768, 512),
    "ade20k": (512, 512),
    "voc2012": (480, 320),
    "cocostuff": (320, 320),
    "potsdam": (200, 200),
}

#: Data sets that can be scored on.
ANNOTATED = ("folder", *WINDOWS)

#: Number of classes by protocol, where a data set has two ways to count them.
CLASSES = {
    "pascal_context": {"crop320": 59, "sliding": 60},
    "cityscapes": {"crop320": 27, "sliding": 19},
}
