"""The ways to clusters that the paper compares, by name."""

from __future__ import annotations

from dataclasses import dataclass

from nefkern.errors import UserError


@dataclass(frozen=True)
class Method:
    """One way from an image to K clusters.

    Attributes:
        name: as given on the command line.
        title: what it is, in a line.
        source: the map it looks at: "logits", "hidden", "graph", "concat" or "segments".
        kmeans: whether K-means, fitted on the training images, makes the clusters; else the argmax.
        trained: False replaces ψ by a freshly initialised one.
        normalize: whether every channel is standardised and every feature LayerNorm'ed first.
        per_segment: whether K-means counts equal rows once: a segment, however many its patches.
    """

    name: str
    title: str
    source: str
    kmeans: bool = True
    trained: bool = True
    normalize: bool = False
    per_segment: bool = False

    @property
    def map_name(self) -> str:
        """The map in the dictionary that one pass over a batch gives."""
        return self.source if self.trained else f"{self.source}-untrained"


METHODS = {
    method.name: method
    for method in (
        Method("ours", "argmax of ψ's outputs", "logits", kmeans=False),
        Method("ours*", "K-means on ψ's hidden features", "hidden"),
        Method("kmeans", "K-means on the graph features", "graph"),
        Method(
            "kmeans-concat",
            "K-means on the standardised, LayerNorm'ed low|mid|high features",
            "concat",
            normalize=True,
        ),
        Method(
            "deep-spectral",
            "exact eigenvectors of each image's κ, K-means on its segments",
            "segments",
            per_segment=True,
        ),
        Method(
            "ours-untrained",
            "argmax of a freshly initialised ψ's outputs",
            "logits",
            kmeans=False,
            trained=False,
        ),
        Method(
            "ours*-untrained",
            "K-means on a freshly initialised ψ's hidden features",
            "hidden",
            trained=False,
        ),
    )
}

ALIASES = {"hidden": "ours*", "untrained": "ours*-untrained"}
"""Names without a star, which shells would expand."""


def parse_methods(names: list[str], flag: str = "--methods") -> list[Method]:
    """Methods by name, in order, each once; ``flag`` is where the names came from.

    Raises:
        UserError: an unknown name.
    """
    methods: dict[str, Method] = {}
    for name in names:
        method = METHODS.get(ALIASES.get(name, name))
        if method is None:
            known = ", ".join([*METHODS, *ALIASES])
            raise UserError(f"{flag}: expected names among {known}; got {name!r}")
        methods[method.name] = method
    return list(methods.values())
