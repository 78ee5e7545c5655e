"""nefkern: spectral clustering as a neural network, at kernel speed."""

from __future__ import annotations

from nefkern.backends import backend

__version__ = "0.1.0"
__all__ = ["__version__", "backend"]
