"""A run's networks as an exporter can trace them: from the pixels behind the grid to logits.

The same formulas as :mod:`nefkern.segmentation.heads`, of PyTorch's own operators, in float32, and
without a branch on a size. The operators that a trained ψ and Nyström's extension use elsewhere
(:mod:`nefkern.ops`) mean nothing to other programs, and graphs of one image are small enough to be
dense.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from nefkern.images.backbone import Backbone, Features
from nefkern.reference.knn import unit_rows
from nefkern.runtime.errors import UserError
from nefkern.segmentation.clusterer import Clusterer
from nefkern.segmentation.heads import NeuralHead, SpectralHead
from nefkern.segmentation.segmenter import Segmenter
from nefkern.spectral.eigenfunction import Eigenfunction, SelfAttention
from nefkern.spectral.kmeans import KMeans
from nefkern.spectral.nystrom import steps
from nefkern.training.spectral_model import SpectralModel


class Network(nn.Module):
    """Backbone and head of a segmenter.

    Args:
        segmenter: of any kind.
        grid: ``(h, w)`` of the only images it is for; None: of any.
    """

    def __init__(self, segmenter: Segmenter, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.backbone = segmenter.backbone if grid else of_whole_cells(segmenter.backbone)
        self.grid = grid
        head = segmenter.head
        if isinstance(head, SpectralHead):
            self.head: nn.Module = SpectralLogits(head.model)
        else:
            self.head = NeuralLogits(head, segmenter.clusterer)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of the patch grid.

        Args:
            pixels: RGB from 0 to 255, float32 ``[B, 3, p h, p w]`` for patches of side p: what
                :meth:`nefkern.images.backbone.Backbone.seen` gives.

        Returns:
            float32 ``[B, K, h, w]``; the argmax is the cluster.
        """
        colours, patch = pixels / 255, self.backbone.patch
        grid = self.grid or (pixels.shape[2] // patch, pixels.shape[3] // patch)
        logits = self.head(self._features(colours, grid), _cell_colours(colours, patch))
        return logits.transpose(1, 2).unflatten(2, grid)

    def _features(self, colours: Tensor, grid: tuple[int, int]) -> Features:
        """:meth:`Backbone.forward` of padded images; only those of one grid are padded further."""
        backbone = self.backbone
        inputs = (colours - backbone.mean) / backbone.std
        if self.grid:
            padded = backbone.padded_maps(inputs)
            maps = [m[..., : grid[0], : grid[1]].flatten(2) for m in padded]
        else:  # of sizes that are known to be the grid's, which spares the exporter a proof each
            whole, cells = backbone.maps(inputs), grid[0] * grid[1]
            maps = [m.reshape(m.shape[0], m.shape[1], cells) for m in whole]
        tokens = [m.transpose(1, 2) for m in maps]
        concat = torch.cat(tokens, dim=-1)
        return Features(concat[..., -backbone.dim :], concat, grid)


def of_whole_cells(backbone: Backbone) -> Backbone:
    """A copy for images of whole cells, where padding that depends on an image's size does not.

    TensorFlow's "SAME" padding completes an image to whole strides; between strides that divide the
    cells' the images are whole already, and what is left is the kernel's own.

    Raises:
        UserError: a network whose strides go beyond its cells.
    """
    if not any(isinstance(m, Conv2dSame) for m in backbone.modules()):
        return backbone
    twin = copy.deepcopy(backbone)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dSame):
                setattr(parent, name, PaddedConvolution(child))
    image = torch.linspace(0, 1, 3 * 35 * backbone.patch**2).view(3, 5 * backbone.patch, -1)
    pairs = zip(twin.maps(image[None]), backbone.maps(image[None]), strict=True)
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs):
        raise UserError(
            f"{type(backbone.model).__name__}: how it pads depends on an image's size; --size "
            "HEIGHT WIDTH exports it for images of one size"
        )
    return twin


class PaddedConvolution(nn.Module):
    """A convolution with "SAME" padding, of inputs that its strides divide."""

    def __init__(self, convolution: Conv2dSame) -> None:
        super().__init__()
        self.convolution = convolution
        shape = zip(convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
        height, width = (max((k - 1) * d + 1 - s, 0) for k, s, d in shape)
        self.pad = (width // 2, width - width // 2, height // 2, height - height // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]``, H and W whole strides."""
        own = self.convolution
        return F.conv2d(
            F.pad(x, self.pad), own.weight, own.bias, own.stride, (0, 0), own.dilation, own.groups
        )


def _cell_colours(colours: Tensor, patch: int) -> Tensor:
    """Bilinear down-sampling to the grid, ``[B, 3, h, w]``: of a whole factor, it is the mean of
    the pixels in the middle of a cell, two by two or one."""
    first, last = (patch - 1) // 2, patch // 2
    rows = (colours[..., first::patch, :] + colours[..., last::patch, :]) / 2
    return (rows[..., first::patch] + rows[..., last::patch]) / 2


# ---- ψ ----


class NeuralLogits(nn.Module):
    """ψ, its temperature or its K-means behind it."""

    def __init__(self, head: NeuralHead, clusterer: Clusterer | None) -> None:
        super().__init__()
        self.psi, self.temperature = _plain(head.psi), head.temperature
        self.clusterer = clusterer
        if clusterer is not None:
            self.centers = Centers(clusterer.kmeans)

    def forward(self, features: Features, colours: Tensor) -> Tensor:
        """Logits ``[B, n, K]``; colours say nothing to ψ."""
        outputs = self.psi(features.concat, features.grid) / self.temperature
        if self.clusterer is None:
            return outputs
        return self.centers(self.clusterer.prepared(outputs))


def _plain(psi: Eigenfunction) -> Eigenfunction:
    """A copy of ψ with the head's orthogonal matrix as a matrix and attention of plain products."""
    twin = copy.deepcopy(psi)
    # Not by remove_parametrizations: the copy shares the original's class, which that changes.
    twin.head = nn.Linear(psi.head.in_features, psi.head.out_features)
    twin.head.weight, twin.head.bias = _constant(psi.head.weight), _constant(psi.head.bias)
    block: Any
    for block in twin.blocks:
        if block.kind == "transformer":
            block.attention = PlainAttention(block.attention)
    return twin


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=False)


class PlainAttention(nn.Module):
    """:class:`nefkern.spectral.eigenfunction.SelfAttention` with the formulas of
    :func:`nefkern.ops.linear_attention` written out."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """``[B, n, D] → [B, n, D]``."""
        own = self.attention
        qkv = own.qkv(x).unflatten(-1, (3, own.heads, own.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, n, head_dim]
        if own.feature_map == "softmax":
            out = (q.softmax(-1) / math.sqrt(own.head_dim)) @ (k.softmax(-2).mT @ v)
        else:
            q, k = F.elu(q) + 1, F.elu(k) + 1
            out = q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + 1e-6)
        return own.project(out.transpose(1, 2).flatten(2))


class Centers(nn.Module):
    """:meth:`nefkern.spectral.kmeans.KMeans.logits` of rows ``[..., C]``."""

    origin: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, kmeans: KMeans) -> None:
        super().__init__()
        state = kmeans.state()
        centers = state["centers"] - state["origin"]
        self.register_buffer("origin", state["origin"])
        self.register_buffer("weight", centers)
        self.register_buffer("bias", -0.5 * centers.square().sum(1))

    def forward(self, rows: Tensor) -> Tensor:
        """x·c − ‖c‖²/2, seen from the origin, ``[..., K]``."""
        return F.linear(rows - self.origin, self.weight, self.bias)


# ---- the data set's eigenvectors ----


class SpectralLogits(nn.Module):
    """Nyström's extension with the pixel term, and K-means: see
    :meth:`nefkern.training.spectral_model.SpectralModel.functions`.

    Neighbours are found among the rows that the run keeps by one product; the pixel graph of an
    image is a dense matrix of its patches.
    """

    rows: Tensor
    root: Tensor
    values: Tensor
    vectors: Tensor
    ratio: Tensor

    def __init__(self, model: SpectralModel) -> None:
        super().__init__()
        kept = model.embedding
        self.model, self.k = model, min(kept.k, len(kept.rows))
        self.alpha = kept.alpha
        self.centers = Centers(model.kmeans)
        self.register_buffer("rows", kept.rows)
        self.register_buffer("root", _inverse_root(kept.degrees).float())
        self.count = kept.extended(self.alpha)
        values = kept.values[: self.count].to(kept.vectors.device, torch.float32)
        self.register_buffer("values", values)
        vectors = kept.vectors.float()[:, : self.count]
        self.register_buffer("vectors", vectors)
        self.lost = model.num_functions - self.count
        self.size = model.size()
        self.ratio = self.alpha / values
        self.steps = steps(float(self.ratio.max())) if self.alpha and self.count else 0

    def forward(self, features: Features, colours: Tensor) -> Tensor:
        """Logits ``[B, n, K]``.

        Args:
            features: ``[B, n, ·]``.
            colours: of the cells in [0, 1], ``[B, 3, h, w]``.
        """
        found = self._from_neighbours(self._rows(features))
        if self.steps:
            found = self._with_pixels(found, pixel_matrix(colours, self.model.pixel_graphs))
        found = F.pad(found, (0, self.lost)) / self.size
        return self.centers(self.model.cluster_rows(found))

    def _rows(self, features: Features) -> Tensor:
        """:meth:`SpectralModel.rows` as ``[B, n, C]``."""
        rows = features.concat if self.model.every else features.high
        scale = self.model.scale
        return _unit(rows if scale is None else scale(rows))

    def _from_neighbours(self, rows: Tensor) -> Tensor:
        """κ_F V / λ, ``[B, n, m]``."""
        near = (rows @ _unit(self.rows.float()).T).topk(self.k)
        similarity = near.values.clamp(min=0)
        weights = similarity * _inverse_root(similarity.sum(-1, keepdim=True))
        weights = weights * self.root[near.indices]
        return (weights[..., None, :] @ self.vectors[near.indices])[..., 0, :] / self.values

    def _with_pixels(self, start: Tensor, pixel: Tensor) -> Tensor:
        """(1 − α P / λ)^(-1) start: :func:`nefkern.spectral.nystrom.extend`, the same steps."""
        before, x = start, (pixel @ start) * self.ratio + start
        omega = 2 / (2 - self.ratio.square())
        for _ in range(self.steps - 1):
            step = (pixel @ x) * self.ratio + start - before
            before, x = x, omega * step + before
            omega = 1 / (1 - self.ratio.square() * omega / 4)
        return x


def pixel_matrix(colours: Tensor, pairs: tuple[tuple[int, float], ...]) -> Tensor:
    """The normalised pixel graph (eqs 3, 4) of every image by itself, dense.

    Args:
        colours: of the cells in [0, 1], ``[B, 3, h, w]``.
        pairs: (k̃, λ) of the graphs that are joined.

    Returns:
        ``[B, n, n]``, symmetric.
    """
    batch, _, h, w = colours.shape
    y = torch.arange(h, device=colours.device) / max(h - 1, 1)
    x = torch.arange(w, device=colours.device) / max(w - 1, 1)
    place = torch.stack([x.expand(h, w), y[:, None].expand(h, w)]).flatten(1).T  # [n, 2]
    colour = colours.flatten(2).transpose(1, 2)
    own = torch.eye(h * w, device=colours.device)
    joined = torch.zeros_like(own).expand(batch, -1, -1)
    for k, weight in pairs:
        points = torch.cat([colour, (weight * place).expand(batch, -1, -1)], dim=-1)
        squared = (points[:, :, None] - points[:, None]).square().sum(-1)
        # Columns of their own for lists longer than the image has patches.
        squared = F.pad(squared + torch.where(own > 0, torch.inf, 0), (0, k), value=torch.inf)
        near = squared.topk(k, largest=False).indices
        listed = torch.zeros_like(squared).scatter(-1, near, 1.0)[..., : h * w]
        joined = torch.maximum(joined, torch.maximum(listed, listed.mT))
    joined = joined * (1 - own)
    root = _inverse_root(joined.sum(-1, keepdim=True))
    return joined * root * root.mT


def _unit(rows: Tensor) -> Tensor:
    """:func:`nefkern.reference.knn.unit_rows` of ``[..., C]``."""
    return unit_rows(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])


def _inverse_root(degree: Tensor) -> Tensor:
    return torch.where(degree > 0, degree.clamp_min(1e-30).rsqrt(), 0)
