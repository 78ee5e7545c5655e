"""Backbones by name: timm's model, its weights from where they are, frozen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nefkern.images import weights as sources
from nefkern.images.backbone import Backbone
from nefkern.images.layers import parse_input_size
from nefkern.images.pretraining import statistics
from nefkern.images.probe import PYRAMID_STRIDE
from nefkern.runtime.errors import UserError, first_line
from nefkern.runtime.hub import go_offline_without_network

log = logging.getLogger(__name__)


def load_backbone(
    name: str,
    weights: str = "auto",
    *,
    high: str = "auto",
    input_size: str | int = "auto",
    device: torch.device | str = "cpu",
) -> Backbone:
    """Build a frozen backbone and say where its weights came from.

    Args:
        name: any timm model name, with or without its pre-training tag.
        weights: a ``.safetensors`` or ``.pth`` file; "packaged" (an installed Python package);
            "hub"; "random" (for trials); or "auto": packaged where installed, else the hub.
        high: the high map. Of a transformer: "final" (after the last norm), "block:N" (the output
            of a block, before any norm; N from 0), "keys:N" (of a block's attention), "keys" (of
            the last one's). Of other networks: "stage:N", "final" (the last one). Several,
            comma-separated, stand side by side, unscaled. "auto": keys for DINO v1 (section 4.1),
            else final.
        input_size: what images are resized to, aspect ratio kept: "crop" (not at all), "native"
            (the input size of the model's training), the shorter side in pixels, or "auto": native
            for CLIP (table 9) and for models of a fixed size, else crop.

    Raises:
        UserError: unknown model, weights that don't fit, an unreachable hub: with the ways out.
    """
    package = sources.packaged(name)
    if weights == "auto":
        weights = "packaged" if package and package.path() else "hub"
    side = parse_input_size(input_size)
    side = side if isinstance(side, int) else None
    model = _create(name, pretrained=weights == "hub", side=side)
    if weights == "packaged":
        path = package.path() if package else None
        if path is None:
            reason = f"pip: {package.install}" if package else "no package carries them"
            raise UserError(f"--weights packaged: no packaged weights for {name} ({reason})")
        sources.load_into(model, package.convert(path, model), f"package {package.distribution}")
        taken = f"the installed package {package.distribution}"
    elif weights == "random":
        taken = "random initialisation (for trials: the segments will be poor)"
    elif weights == "hub":
        taken = "the model hub"
    else:
        sources.load_into(model, sources.read_file(Path(weights)), f"--weights {weights}")
        taken = str(weights)
    mean, std = statistics(model)
    identity = sources.digest(model)
    backbone = Backbone(model, mean, std, high=high, input_size=input_size, identity=identity)
    log.info("backbone %s: weights from %s", name, taken)
    if backbone.side is not None:
        rule = "in one square of" if backbone.fixed else "their shorter side resized to"
        log.info("backbone %s: sees images %s %d pixels", name, rule, backbone.side)
    return backbone.to(device)


def _create(name: str, *, pretrained: bool, side: int | None = None) -> nn.Module:
    import timm

    if not timm.is_model(sources.architecture(name)):
        near = timm.list_models(f"*{sources.architecture(name)[:8]}*")[:5]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"--backbone {name}: timm has no such model{hint}")
    if pretrained:
        go_offline_without_network()
    # Any input size where that can be had, else the one asked for; strides stay at 16 where they
    # can.
    attempts: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"strict_img_size": False}]
    attempts += [{"img_size": side}] if side else []
    attempts += [{"output_stride": PYRAMID_STRIDE}, {}]
    for extra in attempts:
        try:
            # Seeded, so that "random" weights are the same wherever the run is loaded again.
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                return timm.create_model(name, pretrained=pretrained, num_classes=0, **extra)
        except (TypeError, NotImplementedError, AssertionError):
            continue  # an option of another family of models
        except Exception as error:  # hub, network and cache errors come in dozens of classes
            if not pretrained:
                raise
            raise UserError(
                f"--backbone {name}: its weights could not be had from the model hub "
                f"({type(error).__name__}: {first_line(error)}); {sources.ways_out(name)}"
            ) from error
    raise UserError(f"--backbone {name}: timm cannot build it as a feature extractor")
