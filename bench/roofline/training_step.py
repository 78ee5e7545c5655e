"""The kernels of a training step by Triton and PyTorch, at the paper's size."""

from __future__ import annotations

from collections.abc import Iterator

from bench.roofline.counts import SECTOR, attention_code, counts
from bench.roofline.model import Kernel
from bench.roofline.sizes import (
    BLOCKS,
    ENTRIES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    NEIGHBOURS,
    PATCHES,
    VIT_BLOCKS,
    VIT_TOKENS,
    WIDTH,
    B,
    C,
    K,
    N,
)
from nefkern.triton.rates import H100


def graph_kernels() -> Iterator[Kernel]:
    """κ: both neighbour searches, both graphs, their sum."""
    scores, candidates, capacity = 4.0 * N * N, N * 300, N * (NEIGHBOURS + NEIGHBOURS // 2)
    yield Kernel("κ", "knn: rows rounded", "stream", moved=N * C * (4 * 5 + 2), launches=12)
    yield Kernel("κ", "knn: scores", "tile product", {"half": 2.0 * N * N * C},
                 N * C * 2, scores, 32 << 20, 26)  # fmt: skip
    # Extremes, about ten halvings of the interval, and the collection.
    yield Kernel("κ", "knn: selection", "selection", cached=12 * scores, resident=32 << 20,
                 launches=26)  # fmt: skip
    yield Kernel("κ", "knn: re-rank", "gather", {"float32": 2.0 * candidates * C},
                 N * C * 4, candidates * C * 4.0, N * C * 4, 26)  # fmt: skip
    yield Kernel("κ", "knn: sort, results", "sort", moved=capacity * 8 * 8 + N * NEIGHBOURS * 8,
                 launches=78)  # fmt: skip
    # 5 channels: all values in float32, then the same selection, twice (k̃ = 10 and 5).
    near = 2 * 4.0 * N * PATCHES
    yield Kernel("κ", "knn of pixels", "selection", {"float32": 2 * 10.0 * N * PATCHES},
                 near, 12 * near, 32 << 20, 40)  # fmt: skip
    yield Kernel("κ", "normalized_adjacency", "sort", moved=1.1e9 * (1 + 15 / NEIGHBOURS),
                 launches=40)  # fmt: skip
    yield Kernel("κ", "add", "stream", moved=2 * 8.0 * ENTRIES + 8 * 2 * ENTRIES, launches=6)


def sparse(dtype: str, bytes_: int) -> Kernel:
    """κU by gathered rows."""
    return Kernel(
        "objective",
        f"spmm, {dtype}",
        "gather",
        {"float32": 2.0 * ENTRIES * K},
        8.0 * ENTRIES + 2 * N * K * bytes_,
        float(ENTRIES * K * bytes_),
        N * K * bytes_,
    )


#: Operations of the formula (reference/normalized_adjacency.py), a kernel each.
BACKWARD_LAUNCHES = 78


def gradient_kernels() -> Iterator[Kernel]:
    """Of κ's values by Triton, and of the lists' weights by PyTorch where csrc/cuda is not built;
    no step has need of them."""
    for name, case, kernel, times, launches, kind in (
        ("sddmm, float32", "sddmm of photographs (Triton)", "sddmm", float(ENTRIES), 1, "gather"),
        ("gradient of κ's weights, PyTorch's", "gradient of kappa's weights (PyTorch)",
         "kappa_backward",
         float(N * NEIGHBOURS), BACKWARD_LAUNCHES, "stream"),
    ):  # fmt: skip
        cost = counts()[case][kernel]
        bytes_ = SECTOR * times * (cost["sectors_read"] + cost["sectors_written"])
        if kind == "gather":  # rows of y again and again
            own = 12.0 * ENTRIES + 8.0 * N * K
            yield Kernel("gradients", name, kind, {"float32": 2.0 * ENTRIES * K}, own, bytes_,
                         4.0 * N * K, launches)  # fmt: skip
        else:
            yield Kernel("gradients", name, kind, moved=bytes_, launches=launches)


def objective_kernels() -> Iterator[Kernel]:
    """Gumbel-Softmax, L2 batch norm, the loss and its gradient, what is logged."""
    yield sparse("float32", 4)
    for name in ("R = UᵀY", "dL/dU = Y M"):
        yield Kernel("objective", name, "thin product", {"float32": 2.0 * N * K * K}, 8.0 * N * K)
    yield Kernel("objective", "Gumbel-Softmax, norms, logging", "stream", moved=27 * 4.0 * N * K,
                 launches=60)  # fmt: skip


CHUNKS = -(-PATCHES // 256)


def attention(amp: bool) -> Kernel:
    """Linear attention, both blocks of ψ, forward and backward: 2 and 4 products of D x D states.

    Arrays of [B, H, N, D]: q, k, v, out; then q, k, v, gradient in, dq, dk, dv. Besides, through
    the cache: S and dS, written by every chunk of 256 tokens, joined, and read by every chunk.
    """
    product = 2.0 * B * HEADS * PATCHES * HEAD_DIM**2
    array = (2.0 if amp else 4.0) * B * HEADS * PATCHES * HEAD_DIM
    states = 4.0 * B * HEADS * HEAD_DIM**2 * (7 * CHUNKS + 3)
    code = {
        arch: (BLOCKS * shared, BLOCKS * issued)
        for arch, (shared, issued) in attention_code(amp).items()
    }
    shared, issued = code[H100.arch]
    return Kernel(
        "ψ",
        f"linear_attention, {'bfloat16' if amp else 'float32'}",
        "register product",
        {"half": BLOCKS * 6 * product * (1 if amp else 3)},
        BLOCKS * 11 * array,
        BLOCKS * (11 * array + states),
        1.0,  # the arrays are in device memory anyway
        launches=BLOCKS * 6,
        shared=shared,
        issued=issued,
        code=code,
    )


def psi_flops() -> float:
    """Products of ψ's forward pass: qkv, projection and MLP of each block, and the head."""
    block = 2 * WIDTH * (3 * WIDTH + WIDTH + 2 * HIDDEN)
    return float(N * (BLOCKS * block + 2 * WIDTH * K))


def psi_parameters() -> int:
    """Weights and biases of ψ."""
    linear = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    block = sum(i * o + o for i, o in linear) + 4 * WIDTH
    return BLOCKS * block + 2 * WIDTH + WIDTH * K + K


def psi_kernels(amp: bool) -> Iterator[Kernel]:
    """ψ forward and backward, and Adam."""
    precision = "half" if amp else "float32"
    yield Kernel("ψ", "products", "library product", {precision: 3 * psi_flops()}, launches=30)
    yield attention(amp)
    # LayerNorm, residuals, GELU, bias gradients: about 30 arrays [N, width] a block, both ways.
    yield Kernel("ψ", "LayerNorm, GELU, residuals", "stream",
                 moved=BLOCKS * 30 * 4.0 * N * WIDTH, launches=BLOCKS * 40)  # fmt: skip
    # Gram matrix, Cholesky, triangular solve and their gradients, in float64.
    yield Kernel("ψ", "orthogonal head", "factorisation", {"float64": 6 * 2.0 * K * K * WIDTH},
                 8.0 * 8 * K * WIDTH, launches=100)  # fmt: skip
    yield Kernel("Adam", "Adam, fused", "stream", moved=28.0 * psi_parameters())


def backbone_flops() -> float:
    """A forward pass of ViT-S/16: qkv, projection, MLP of 4C, softmax attention, patches."""
    block = 2 * C * (3 * C + C + 8 * C) + 4 * (PATCHES + 1) * C
    return float(VIT_TOKENS * (VIT_BLOCKS * block + 2 * 768 * C))


def backbone_kernels(amp: bool) -> Iterator[Kernel]:
    """The frozen backbone, forward."""
    precision, bytes_ = ("half", 2) if amp else ("float32", 4)
    yield Kernel("backbone", "ViT-S/16, forward", "library product", {precision: backbone_flops()},
                 launches=VIT_BLOCKS * 15)  # fmt: skip
    # LayerNorm, residuals, GELU: about 20 arrays [tokens, C] a block.
    yield Kernel("backbone", "LayerNorm, GELU, residuals", "stream",
                 moved=VIT_BLOCKS * 20.0 * bytes_ * VIT_TOKENS * C)  # fmt: skip


def step(amp: bool) -> list[Kernel]:
    """A training step, in order."""
    return [
        *backbone_kernels(amp),
        *graph_kernels(),
        *psi_kernels(amp),
        *objective_kernels(),
    ]
