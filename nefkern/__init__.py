"""nefkern: spectral clustering as a neural network, at kernel speed.

The operators are in :mod:`nefkern.ops`; ``Segmenter`` loads a trained run; the commands are
``python -m nefkern.train``, ``evaluate``, ``segment`` and ``info``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nefkern.version import __version__

if TYPE_CHECKING:
    from nefkern.backends import backend
    from nefkern.segmentation.segmenter import Segmenter

__all__ = ["Segmenter", "__version__", "backend"]

# Looked up on first use, so that importing the operators alone does not import the pipeline, and
# `--help` does not import torch.
_HOMES = {"Segmenter": "nefkern.segmentation.segmenter", "backend": "nefkern.backends"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
