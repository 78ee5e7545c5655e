"""What timm tells of a model's pre-training."""

from __future__ import annotations

from typing import Any

from torch import nn


def configuration(model: nn.Module) -> dict[str, Any]:
    """All that timm tells; empty where it knows nothing."""
    return getattr(model, "pretrained_cfg", None) or {}


def is_dino_v1(model: nn.Module) -> bool:
    """Whether DINO's first version trained it: timm's tag says it."""
    return configuration(model).get("tag") == "dino"


def is_clip(model: nn.Module) -> bool:
    """Whether a model is a tower of CLIP's, or began as one: timm's names say it."""
    config = configuration(model)
    names = f"{config.get('architecture') or ''}_{config.get('tag') or ''}"
    return "clip" in names.split("_")


def native_size(model: nn.Module) -> tuple[int, ...]:
    """Sides of the square input that a model was made for, the likeliest first."""
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    trained = (configuration(model).get("input_size") or (None,))[1:]
    own = (own, own) if isinstance(own, int) else tuple(own or ())
    return tuple(size[0] for size in (own, tuple(trained)) if len(size) == 2 and size[0] == size[1])


def interpolation(model: nn.Module) -> str:
    """The interpolation that a model's training resized images by: bicubic (CLIP) or bilinear."""
    told = configuration(model).get("interpolation")
    return "bilinear" if told == "bilinear" else "bicubic"


def statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that its images were normalised by, for RGB in [0, 1]."""
    import timm

    config = timm.data.resolve_model_data_config(model)
    return tuple(config["mean"]), tuple(config["std"])
