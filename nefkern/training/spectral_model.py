"""The data set's own eigenvectors, carried to other images: what ``--method spectral`` keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.images.backbone import Features
from nefkern.images.graph import pixel_graph
from nefkern.reference.csr import sums_of
from nefkern.reference.knn import unit_rows
from nefkern.runtime.errors import UserError
from nefkern.runtime.states import BOOL, FLOATS, INTEGERS, check_state
from nefkern.spectral.embedding import Embedding
from nefkern.spectral.kmeans import KMeans
from nefkern.spectral.temperature import fitted_temperature

#: Rows that are widened to float32 at once.
_BLOCK = 1 << 16

#: Length of the features' rows beside the eigenvectors' of 1: half their share in a distance.
_TOLD = 0.7

_EMBEDDING, _CLUSTERS, _SCALE = "embedding.", "kmeans.", "channels."
_NEIGHBOURS, _EVERY, _SPANNED, _TEMPERATURE = "neighbours", "every", "spanned", "temperature"

#: Rows whose neighbours a temperature is fitted to.
_CALIBRATED = 2048

#: What the parts of a state have in common.
_STATE = {
    _NEIGHBOURS: (INTEGERS, ""),
    f"[{_EVERY}]": (BOOL, ""),
    f"{_EMBEDDING}vectors": (FLOATS, "N m"),
    f"{_EMBEDDING}rows": (FLOATS, "N C"),
    f"[{_SCALE}mean]": (FLOATS, "C"),
    f"[{_SCALE}std]": (FLOATS, "C"),
    f"[{_SPANNED}]": (FLOATS, "m C"),
    f"[{_CLUSTERS}centers]": (FLOATS, "K D"),
    f"[{_TEMPERATURE}]": (FLOATS, ""),
}


def _check(state: dict[str, Tensor]) -> None:
    """Raise ValueError unless the parts of a state fit each other."""
    sizes = check_state(state, _STATE)
    if int(state[_NEIGHBOURS]) < 1:
        raise ValueError(f"{_NEIGHBOURS}: expected at least 1, got {int(state[_NEIGHBOURS])}")
    if _TEMPERATURE in state and float(state[_TEMPERATURE]) <= 0:
        raise ValueError(f"{_TEMPERATURE}: expected above 0, got {float(state[_TEMPERATURE])}")
    width = sizes["m"] + (sizes["C"] if _SPANNED in state else 0)
    if sizes.get("D", width) != width:
        raise ValueError(f"{_CLUSTERS}centers: expected {width} columns, got {sizes['D']}")


@dataclass
class ChannelScale:
    """Mean of every channel over the data set's patches, and what it is divided by, ``[C]`` each:
    the standard deviation, larger where its map has more channels than others."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: Tensor, widths: tuple[int, ...] = ()) -> ChannelScale:
        """That of rows ``[N, C]``.

        Args:
            rows: of the data set.
            widths: channels of the maps that they are made of, C together: every map gets the same
                weight, its channels a variance of C over its width and their number. (): one map.
        """
        blocks = rows.split(_BLOCK)
        mean = sum(block.double().sum(0) for block in blocks) / len(rows)
        squares = sum((block.double() - mean).square().sum(0) for block in blocks)
        std = (squares / max(1, len(rows) - 1)).sqrt().float().clamp_min(1e-6)
        widths = widths or (len(std),)
        for part, width in zip(std.split(widths), widths, strict=True):
            part *= (width * len(widths) / len(std)) ** 0.5
        return cls(mean.float(), std)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows with mean 0 and a mean variance of 1, float32."""
        return (rows.float() - self.mean) / self.std

    def to(self, device: torch.device | str) -> ChannelScale:
        """The same on a device."""
        return ChannelScale(self.mean.to(device), self.std.to(device))

    def state(self) -> dict[str, Tensor]:
        """Tensors that the constructor takes back."""
        return {"mean": self.mean, "std": self.std}


@dataclass
class SpectralModel:
    """From an image's features to eigenvectors of the data set's κ at its patches, and clusters.

    Attributes:
        embedding: the eigenpairs; its rows are the data set's patches as :meth:`rows` makes them.
        pixel_graphs: (k̃, λ) of each pixel graph.
        neighbours: k of the data set's graph; the embedding has fewer if it has landmarks only.
        scale: of the channels of what neighbours are near by in; None: as they come.
        every: whether that is all maps side by side, not F alone.
        spanned: V̂ᵀX ``[m, C]``, the coefficients of the data set's rows X in its eigenvectors
            V̂ of mean square 1, if clusters are told by :meth:`cluster_rows` of both; None: by
            eigenvectors alone.
        kmeans: on :meth:`cluster_rows`; None before it is fitted.
        temperature: at which K-means' scores are log-probabilities, see :meth:`calibrated`.
    """

    embedding: Embedding
    pixel_graphs: tuple[tuple[int, float], ...]
    neighbours: int
    scale: ChannelScale | None = None
    every: bool = False
    spanned: Tensor | None = None
    kmeans: KMeans | None = None
    temperature: float | None = None

    @property
    def num_functions(self) -> int:
        """m."""
        return len(self.embedding.values)

    def rows(self, features: Features) -> Tensor:
        """What neighbours are near by in, unit rows float32 ``[B·h·w, C]``."""
        found = (features.concat if self.every else features.high).flatten(0, 1).float()
        return unit_rows(found if self.scale is None else self.scale(found))

    def span(self) -> SpectralModel:
        """The same with :attr:`spanned`, from all rows ``[N, C]`` of the data set: not of landmarks
        alone."""
        vectors, rows = self.embedding.vectors, self.embedding.rows
        blocks = zip(vectors.split(_BLOCK), rows.split(_BLOCK), strict=True)
        product = sum(v.double().T @ x.double() for v, x in blocks)
        return replace(self, spanned=(product / len(rows) / self.size()).float())

    def cluster_rows(self, functions: Tensor) -> Tensor:
        """What K-means sees of :meth:`functions`: unit rows of the eigenvectors v (Ng, Jordan,
        Weiss, NIPS 2001), and beside them those of v V̂ᵀX / N, the features as far as the leading
        eigenvectors span them.

        The eigenvectors alone weigh all directions alike: right where clusters are separate, as
        objects are; among the gradual differences of a street scene the features' own variances
        are the better measure. Side by side they are at no place far behind the better
        (docs/quality.md).

        Args:
            functions: ``[..., m]``.

        Returns:
            float32 ``[..., m]`` or ``[..., m + C]``.
        """
        rows = F.normalize(functions.float(), dim=-1)
        if self.spanned is None:
            return rows
        told = F.normalize(functions.float() @ self.spanned, dim=-1)
        return torch.cat([rows, _TOLD * told], dim=-1)

    def calibrated(self) -> SpectralModel:
        """The same with :attr:`temperature`: that at which K-means' scores of the data set's rows
        make the clusters of their neighbours in the graph likeliest
        (:mod:`nefkern.spectral.temperature`); of :data:`_CALIBRATED` rows at most."""
        rows = self.embedding.rows
        some = slice(None, None, -(-len(rows) // _CALIBRATED))
        near = self.embedding.neighbours(rows[some])
        own = torch.arange(len(rows), device=rows.device)[some]
        weights = near.similarities.masked_fill(near.indices == own[:, None], 0)
        scores = self.kmeans.logits(self.cluster_rows(self.embedding.vectors[some]))
        told, at = near.indices.clamp(min=0).long().unique(return_inverse=True)
        clusters = self.kmeans.predict(self.cluster_rows(self.embedding.vectors[told]))[at]
        rows = torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]
        votes = sums_of(
            weights.to(scores.dtype).flatten(), (rows + clusters).flatten(), scores.numel()
        )
        votes = votes.view_as(scores)
        return replace(self, temperature=fitted_temperature(scores, votes))

    def size(self) -> Tensor:
        """Root mean square of the eigenvectors' values."""
        return self.embedding.size

    @torch.no_grad()
    def functions(self, features: Features, images: Tensor) -> Tensor:
        """Eigenvectors at the patches of other images, by Nyström's extension with the pixel term.

        Every image's patches have neighbours in the data set and in their own image: its values do
        not depend on the batch.

        Args:
            features: of the images.
            images: ``[B, 3, H, W]``, the pixels behind the grid
                (:meth:`nefkern.images.backbone.Backbone.seen`).

        Returns:
            float32 ``[B, h·w, m]``, of the size that has a mean square of 1 over the data set.
        """
        pixel = None
        if self.embedding.alpha > 0:
            pixel = pixel_graph(images, features.grid, self.pixel_graphs)
        found = self.embedding.extend(self.rows(features), pixel).float()
        found /= self.size()
        return found.unflatten(0, (len(images), -1))

    def to(self, device: torch.device | str) -> SpectralModel:
        """The same on a device."""
        return replace(
            self,
            embedding=self.embedding.to(device),
            scale=None if self.scale is None else self.scale.to(device),
            spanned=None if self.spanned is None else self.spanned.to(device),
            kmeans=None if self.kmeans is None else self.kmeans.to(device),
        )

    def state(self) -> dict[str, Tensor]:
        """All of it but the pixel graphs, as tensors; see :meth:`from_state`."""
        parts = {_EMBEDDING: self.embedding.state()}
        parts[_SCALE] = {} if self.scale is None else self.scale.state()
        parts[_CLUSTERS] = {} if self.kmeans is None else self.kmeans.state()
        found = {head + name: one for head, part in parts.items() for name, one in part.items()}
        if self.spanned is not None:
            found[_SPANNED] = self.spanned
        if self.temperature is not None:
            found[_TEMPERATURE] = torch.tensor(self.temperature, dtype=torch.float64)
        return found | {
            _NEIGHBOURS: torch.tensor(self.neighbours),
            _EVERY: torch.tensor(self.every),
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], pixel_graphs: tuple[tuple[int, float], ...], source: object
    ) -> SpectralModel:
        """From what :meth:`state` gave; ``source`` names the file in an error.

        Raises:
            UserError: not such a state.
        """
        try:
            _check(state)
            embedding, scale, clusters = (
                {n.removeprefix(head): t for n, t in state.items() if n.startswith(head)}
                for head in (_EMBEDDING, _SCALE, _CLUSTERS)
            )
            temperature = state.get(_TEMPERATURE)
            return cls(
                Embedding.from_state(embedding),
                pixel_graphs,
                int(state[_NEIGHBOURS]),
                ChannelScale(**scale) if scale else None,
                bool(state.get(_EVERY, bool(scale))),  # once, only all maps were scaled
                state.get(_SPANNED),
                KMeans(len(clusters["centers"])).load(clusters) if clusters else None,
                None if temperature is None else float(temperature),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{source}: not a checkpoint of --method spectral ({error})") from None
