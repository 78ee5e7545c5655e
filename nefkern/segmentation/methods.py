"""The ways to clusters that the paper compares, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nefkern.runtime.errors import UserError


@dataclass(frozen=True)
class Method:
    """One way from an image to K clusters, or to the classes themselves.

    Attributes:
        name: as given on the command line.
        title: what it is, in a line.
        source: the map it looks at: "logits", "hidden", "graph", "concat" or "segments".
        kmeans: whether K-means, fitted on the training images, makes the clusters; else the argmax.
        trained: False replaces ψ by a freshly initialised one.
        normalize: whether every channel is standardised and every feature LayerNorm'ed first.
        per_segment: whether K-means counts equal rows once: a segment, however many its patches.
        spectral: whether the map holds eigenfunctions: K-means then sees them as spectral
            clustering does, columns scaled to one norm over the training images, and unit rows (Ng,
            Jordan, Weiss, NIPS 2001).
        supervised: whether it learns classes from annotated training images.
    """

    name: str
    title: str
    source: str
    kmeans: bool = True
    trained: bool = True
    normalize: bool = False
    per_segment: bool = False
    spectral: bool = False
    supervised: bool = False

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
        Method(
            "probe-ours",
            "linear probe on ψ's hidden features, trained on annotations",
            "hidden",
            kmeans=False,
            supervised=True,
        ),
        Method(
            "probe",
            "linear probe on the graph features, trained on annotations",
            "graph",
            kmeans=False,
            supervised=True,
        ),
    )
}

ALIASES = {
    "hidden": "ours*",
    "untrained": "ours*-untrained",
    "linear-probe": "probe-ours,probe",
}
"""Names without a star, which shells would expand, and one for several."""


def of_run(methods: list[Method], *, quantized: bool) -> list[Method]:
    """The methods as a run's eigenfunctions ask for: a continuous ψ is clustered by K-means on its
    outputs (section 3.5), since the argmax of signed functions says nothing."""
    return methods if quantized else [_continuous(method) for method in methods]


def _continuous(method: Method) -> Method:
    if method.source != "logits":
        return method
    whose = "ψ's" if method.trained else "a freshly initialised ψ's"
    title = f"K-means on {whose} continuous outputs, columns and rows of unit norm"
    return replace(method, title=title, kmeans=True, spectral=True)


CONTINUOUS = _continuous(METHODS["ours"])
"""How a continuous ψ makes clusters."""


def parse_methods(names: list[str], flag: str = "--methods") -> list[Method]:
    """Methods by name, in order, each once; ``flag`` is where the names came from.

    Raises:
        UserError: an unknown name.
    """
    methods: dict[str, Method] = {}
    for name in names:
        for full_name in ALIASES.get(name, name).split(","):
            if full_name not in METHODS:
                known = ", ".join([*METHODS, *ALIASES])
                raise UserError(f"{flag}: expected names among {known}; got {name!r}")
            methods[full_name] = METHODS[full_name]
    return list(methods.values())
