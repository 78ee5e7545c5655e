"""Make the pictures of ``docs/gallery.md``: ``python docs/gallery.py`` (a minute or two).

The photographs come inside scikit-image; neither they nor the pictures are kept in the repository.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path

from nefkern.__main__ import main as nefkern
from nefkern.runtime.errors import UserError, command

FOLDER = Path(__file__).with_suffix("")
PAGE = FOLDER.with_suffix(".md")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


def commands() -> list[list[str]]:
    """Those of the page, in order."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ nefkern ")) for line in lines if line.strip()]


def photographs(folder: Path) -> None:
    """Write those that the page names."""
    import skimage
    from PIL import Image

    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")


def run(folder: Path) -> None:
    """The page's commands, in ``folder``."""
    names = {f"{name}.png" for name in PHOTOGRAPHS}
    for given in commands():
        places = {"runs/gallery", "segments", "maps", "merged"} | names
        if nefkern([str(folder / a) if a in places else a for a in given]):
            raise UserError(f"docs/gallery.md: nefkern {' '.join(given)}: failed")


def digits(path: Path) -> None:
    """Eigenvectors of scikit-learn's digits."""
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits

    from nefkern.estimators import SpectralEmbedding

    rows, truth = load_digits(return_X_y=True)
    places = SpectralEmbedding(n_components=2, random_state=0).fit_transform(rows)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for digit in range(10):
        one = places[truth == digit]
        axes.scatter(one[:, 0], one[:, 1], s=6, color=f"C{digit}", label=str(digit))
    axes.legend(ncols=2, frameon=False)
    axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def save(source: Path, target: Path, most: int = 1200) -> None:
    """A picture, no wider than a page needs."""
    from PIL import Image

    image = Image.open(source).convert("RGB")
    image.thumbnail((most, most))
    image.save(target)


@command
def main() -> None:
    """Make all of them."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder)
        run(folder)
        for photograph in PHOTOGRAPHS:
            save(folder / "segments" / f"{photograph}.overlay.png", FOLDER / f"{photograph}.png")
        save(folder / "maps" / "chelsea.eigenmaps.png", FOLDER / "eigenmaps.png")
        save(folder / "merged" / "astronaut.overlay.png", FOLDER / "merged.png")
    digits(FOLDER / "digits.png")


if __name__ == "__main__":
    raise SystemExit(main())
