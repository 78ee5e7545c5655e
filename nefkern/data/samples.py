"""Real colour photographs that come inside well-kept packages: data with no download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from nefkern.data.dataset import ImageDataset
from nefkern.runtime.errors import UserError

# (package to import, folder in it, files). Only photographs of things a person would name:
# no micrographs, star fields, drawings, grayscale pictures or second views of a scene.
_SOURCES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "skimage",
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    ),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("foolbox", "data", ("imagenet_??_*.jpg",)),
)
_INSTALL = "pip install scikit-image scikit-learn foolbox"


def open_samples(*, strict: bool = False) -> ImageDataset:
    """The photographs of those packages that are installed: 27 with all of them.

    5 come from scikit-image, 2 from scikit-learn, 20 from foolbox. The packages are located,
    not imported, and only files they ship are taken, so nothing is ever downloaded.

    Raises:
        UserError: none of the packages is installed.
    """
    paths = [path for source in _SOURCES for path in _files(*source)]
    if not paths:
        raise UserError(f"data 'samples': no package with photographs found, try: {_INSTALL}")
    return ImageDataset(paths, strict=strict)


def _files(package: str, folder: str, patterns: tuple[str, ...]) -> list[Path]:
    # find_spec of a top-level name does not run the package, unlike importlib.resources.files.
    spec = find_spec(package)
    roots = [Path(root) / folder for root in (spec and spec.submodule_search_locations) or ()]
    return [path for root in roots for name in patterns for path in sorted(root.glob(name))]
