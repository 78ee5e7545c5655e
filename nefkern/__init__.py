"""nefkern: spectral clustering as a neural network, at kernel speed."""

from __future__ import annotations

from nefkern.backends import backend
from nefkern.version import __version__


__all__ = ["__version__", "backend"]
