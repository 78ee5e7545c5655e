"""ψ: the network whose K outputs become the eigenfunctions of κ (sections 3.4 and 3.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from nefkern.ops import linear_attention
from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError, first_line

KINDS = ("transformer", "convolution")

#: Standard deviation that the weights start from: the authors' code's.
INITIAL_STD = 0.02


@dataclass(frozen=True)
class EigenfunctionConfig:
    """The shape of ψ; the defaults are the paper's, and where it is silent the authors' code's.

    Heads and MLP are of one size for every backbone, as in the authors' configuration: at K = 256 ψ
    has 13.6, 27.2 and 36.2 million parameters on ViT-S, B and L.

    Attributes:
        num_eigenfunctions: K.
        kind: how tokens learn of each other (section 3.4 offers both): "transformer", by linear
            attention over the whole image, or "convolution", by 3 × 3 convolutions on its grid.
        blocks: residual blocks.
        heads: attention heads, or groups of the convolution.
        head_dim: channels of each.
        mlp_hidden: hidden width of the MLP.
        feature_map: of the attention: "softmax" (the authors') or "elu" (Katharopoulos et al.
            2020).
        orthogonal: keep the columns of the head orthogonal by a parametrisation.
        quantize: Gumbel-Softmax outputs, near one-hot; False gives continuous eigenfunctions.
        standardize: scale every input channel to mean 0 and variance 1, see
            :meth:`Eigenfunction.fit_scale`.
    """

    num_eigenfunctions: int = 256
    kind: str = "transformer"
    blocks: int = 2
    heads: int = 18
    head_dim: int = 64
    mlp_hidden: int = 576
    feature_map: str = "softmax"
    orthogonal: bool = True
    quantize: bool = True
    standardize: bool = False


class SelfAttention(nn.Module):
    """Linear self-attention over the tokens of each image, ``[B, n, D] → [B, n, D]``."""

    def __init__(self, width: int, config: EigenfunctionConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.feature_map = config.feature_map
        inner = self.heads * self.head_dim
        self.qkv = nn.Linear(width, 3 * inner)
        self.project = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, n, head_dim]
        out = linear_attention(q, k, v, feature_map=self.feature_map)
        return self.project(out.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """1 × 1, grouped 3 × 3 with zero padding, GELU and 1 × 1 convolution on the patch grid,
    ``[B, h·w, D] → [B, h·w, D]``: attention's shape, with the 3 × 3 neighbours in its place."""

    def __init__(self, width: int, config: EigenfunctionConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.expand = nn.Linear(width, inner)  # 1 × 1: tokens need not become a map for it
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, groups=config.heads)
        self.project = nn.Linear(inner, width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = self.expand(x).transpose(1, 2).unflatten(2, grid)
        tokens = self.mix(maps).flatten(2).transpose(1, 2)
        return self.project(F.gelu(tokens))


class Block(nn.Module):
    """A pre-norm block: attention or convolution, then an MLP, each with a residual connection."""

    def __init__(self, width: int, config: EigenfunctionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        if config.kind == "transformer":
            self.attention = SelfAttention(width, config)
        else:
            self.convolution = Convolution(width, config)
        self.norm2 = nn.LayerNorm(width)
        hidden = config.mlp_hidden
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.kind = config.kind

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        y = self.norm1(x)
        x = x + (self.attention(y) if self.kind == "transformer" else self.convolution(y, grid))
        return x + self.mlp(self.norm2(x))


class OrthonormalRows(nn.Module):
    """A parametrisation that makes the rows of a wide matrix orthonormal.

    The Q of weightᵀ = QR (R's diagonal positive), had from the Cholesky factor of the Gram matrix
    in float64: two small products and a triangular solve, forward and backward. The Householder
    products of ``torch.nn.utils.parametrizations.orthogonal`` go column by column in the backward
    pass and took a third of a training step at K = 128.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """``[K, D] → [K, D]`` with K ≤ D, rows of full rank."""
        rows = weight.double()
        factor = _cholesky(rows @ rows.mT)
        return torch.linalg.solve_triangular(factor, rows, upper=False).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Orthonormal rows are their own parameters."""
        return self.forward(weight)


def _cholesky(gram: Tensor) -> Tensor:
    """The Cholesky factor of a matrix ``[K, K]``.

    Of one that has none: an error on the CPU; on a GPU NaN, which the loss shows when it is read,
    since to ask at once would make the host wait for all that is enqueued.
    """
    if not gram.is_cuda:
        return torch.linalg.cholesky(gram)
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.where(failed == 0, factor, math.nan)


class Eigenfunction(nn.Module):
    """ψ: residual blocks, LayerNorm, and a linear head with orthogonal columns.

    Weights start from a truncated normal of std 0.02 and biases from zero, as in the authors' code;
    an orthogonal head starts from the orthonormal rows of such a weight.

    Args:
        width: D, channels of the concatenated maps: 3C for a transformer backbone.
        config: the rest of the shape.

    Raises:
        UserError: K below 2, more orthogonal columns asked for than the width, an unknown kind or
            feature map.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, width: int, config: EigenfunctionConfig) -> None:
        super().__init__()
        count = config.num_eigenfunctions
        if count < 2:
            raise UserError(f"--num-eigenfunctions {count}: expected at least 2")
        if config.orthogonal and count > width:
            raise UserError(
                f"--num-eigenfunctions {count}: expected at most {width}, the width of ψ's input, "
                "with an orthogonal head; use --no-orthogonal-head for more"
            )
        if config.kind not in KINDS:
            raise UserError(f"--psi {config.kind}: expected {' or '.join(KINDS)}")
        if config.feature_map not in ("elu", "softmax"):
            raise UserError(f"--feature-map {config.feature_map}: expected elu or softmax")
        self.config = config
        # Identity until fit_scale; saved with the weights.
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.blocks = nn.ModuleList(Block(width, config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, count)
        self.apply(_initialize)
        if config.orthogonal:
            # Weight rows of nn.Linear are the columns of the head's matrix.
            register_parametrization(self.head, "weight", OrthonormalRows())

    def load(self, weights: dict[str, Tensor], source: object) -> None:
        """Take the weights of a checkpoint; ``source`` is where they came from, for the message.

        Raises:
            UserError: they are of another version of nefkern.
        """
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"{source}: its checkpoint does not fit this version of nefkern "
                f"({first_line(error)})"
            ) from None

    def hidden(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The features before the head, ``[B, h·w, D] → [B, h·w, D]``; what Ours* clusters.

        Raises:
            ValueError: another number of tokens than the ``grid`` of ``h × w`` patches has.
        """
        h, w = grid
        if h * w != x.shape[1]:
            raise ValueError(f"grid: expected (h, w) of {x.shape[1]} patches, got {h} × {w}")
        if self.config.standardize:
            x = (x - self.shift) * self.scale
        for block in self.blocks:
            x = block(x, (h, w))
        return self.norm(x)

    @torch.no_grad()
    def fit_scale(self, x: Tensor) -> None:
        """Take the input's scale from a batch ``[B, n, D]``, if the configuration asks for it.

        The stages of a convolutional network differ in scale by an order of magnitude, and without
        this the LayerNorms see little but the loudest channels.
        """
        if self.config.standardize:
            rows = x.flatten(0, 1).float()
            self.shift.copy_(rows.mean(0))
            self.scale.copy_(1 / rows.std(0).clamp_min(1e-6))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The head's output, ``[B, h·w, D] → [B, h·w, K]``, for a ``grid`` of ``h × w`` patches."""
        return self.head(self.hidden(x, grid))

    def quantize(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """Training outputs: soft Gumbel-Softmax over the K channels, or the logits as they are.

        The same as ``F.gumbel_softmax``, but every process draws the noise of all and takes that of
        its own rows: as one process with all rows would, and their generators stay alike.
        """
        if not self.config.quantize:
            return logits
        logits = logits.float()
        count = len(logits) * distributed.ranks()
        noise = logits.new_empty(count, *logits.shape[1:]).exponential_()
        noise = -noise[distributed.own_rows(count)].log()
        return ((logits + noise) / temperature).softmax(-1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
        nn.init.zeros_(module.bias)


def cosine_schedule(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` to ``end`` as ``progress`` goes from 0 to 1."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def annealed_temperature(progress: float, start: float = 1.0, end: float = 0.3) -> float:
    """The Gumbel-Softmax temperature at ``progress`` in [0, 1] (section 3.5)."""
    return cosine_schedule(progress, start, end)


@torch.no_grad()
def live_clusters(logits: Tensor) -> Tensor:
    """Which of the K clusters win the argmax somewhere: bool ``[K]`` for logits ``[..., K]``."""
    winners = logits.flatten(0, -2).argmax(-1)
    live = winners.new_zeros(logits.shape[-1], dtype=torch.bool)
    return live.index_fill(0, winners, True)  # a bincount would wait for the device
