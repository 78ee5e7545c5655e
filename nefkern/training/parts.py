"""What a run is made from: device, images and backbone, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nefkern.data import ImageDataset, open_dataset
from nefkern.images.backbone import Backbone
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.loading import load_backbone
from nefkern.runtime import distributed
from nefkern.runtime.devices import choose_device
from nefkern.runtime.errors import UserError
from nefkern.training.options import TrainOptions
from nefkern.training.runs import Run


@dataclass
class Parts:
    """Device, images and backbone of a run.

    Attributes:
        features: the backbone with its cache.
    """

    device: torch.device
    dataset: ImageDataset
    backbone: Backbone
    features: FeatureCache

    @classmethod
    def of(cls, options: TrainOptions, run: Run) -> Parts:
        """Those that the options ask for; nothing is written.

        Raises:
            UserError: a device, data set or backbone that cannot be had.
        """
        device = choose_device(options.device)
        torch.manual_seed(options.seed)
        dataset = open_dataset(
            options.data, root=options.data_root, split=options.split, strict=options.strict
        )
        backbone = load_backbone(
            options.backbone,
            options.weights,
            high=options.high,
            input_size=options.input_size,
            device=device,
        )
        if options.crop < backbone.alignment:
            raise UserError(
                f"--crop {options.crop}: expected at least {backbone.patch}, a patch of the "
                "backbone"
            )
        features = FeatureCache(
            run.feature_cache(options),
            backbone,
            amp=options.amp,
            tf32=options.tf32,
            compiled=options.compile and options.method == "neural",
        )
        return cls(device, dataset, backbone, features)

    def facts(self, options: TrainOptions) -> dict[str, Any]:
        """What the configuration records beside the options."""
        return {
            "backbone": {"name": options.backbone, **self.backbone.facts()},
            "dataset": {"images": len(self.dataset), "classes": list(self.dataset.classes)},
            "device": str(self.device),
            "processes": distributed.ranks(),
        }

    def check_same(self, config: dict[str, Any]) -> None:
        """Refuse to go on with a run of other weights or images.

        Args:
            config: of the run.

        Raises:
            UserError: they differ.
        """
        known = config.get("backbone", {}).get("digest")
        if known != self.backbone.identity:
            raise UserError(
                f"--resume: the backbone's weights ({self.backbone.identity}) are not those of the "
                f"run ({known}); give the --weights it was trained with"
            )
        images = config.get("dataset", {}).get("images")
        if images != len(self.dataset):
            raise UserError(
                f"--resume: the run was trained on {images} images, there are {len(self.dataset)} "
                "now; start anew with another --out"
            )
