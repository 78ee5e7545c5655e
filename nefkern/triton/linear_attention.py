"""``linear_attention`` in Triton: the formulas stand in its reference.

Keys first: every program sums φ(k)ᵀv over one chunk of a head's tokens, and a second kernel joins
the chunks in order, so that the result does not depend on how programs are scheduled. Then queries,
by chunks too: a program reads the state once and keeps it beside the tensor cores while its tiles
of tokens pass. The backward pass computes φ anew and goes the same way: queries (dq and dS by
chunks), join, keys. Tiles are multiplied in their own precision; feature maps, sums and states are
float32; "softmax" finds the largest key as it goes and rescales what it has.
``linear_attention_pieces`` says how products are rounded.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from nefkern.backends import interpreting
from nefkern.reference.linear_attention import empty_token_major
from nefkern.triton.configs import Shipped, device_of, launch
from nefkern.triton.linear_attention_backward import (
    join_gradients,
    key_gradients,
    query_gradients,
)
from nefkern.triton.linear_attention_forward import answer_queries, join_keys, sum_keys

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 128  # of a head: a [D, E] state must fit the registers of a program
#: Architectures that multiply from shared memory, by major compute capability.
LARGE_TILES = {9: ("sm_90",), 10: ("sm_100",)}
ROWS = 16  # of a state that one program joins
CHUNK = 256  # tokens of one program; more where there would be over 64 chunks


def accepts(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    return q.dtype in DTYPES and max(q.shape[-1], v.shape[-1]) <= MAX_CHANNELS


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass: out, state and stats as the reference's."""
    q, k, v = _channels_last(q, k, v)
    b, h, n, d = q.shape
    m, e = v.shape[2:]
    state, stats = (
        q.new_empty((b, h, d, e), dtype=torch.float32),
        q.new_empty((b, h, 2, d), dtype=torch.float32),
    )
    out = _result(q, (b, h, n, e))
    heads = b * h
    if not heads:
        return out.to(q.dtype), state, stats
    shape = d, e, feature_map, q.dtype
    chunk, parts = _chunks(m, d, e)
    sums = state.new_empty((heads, parts, d, e))
    totals, shifts = state.new_empty((2, heads, parts, d)).unbind()
    with device_of(q):
        launch(sum_keys, (heads, parts))(
            k, v, k if mask is None else mask.contiguous(), sums, totals, shifts, h, m, d, e,
            chunk, *k.stride()[:3], *v.stride()[:3], HAS_MASK=mask is not None,
            **_options(sum_keys, *shape, _large_tiles(k, v) if mask is None else 0),
        )  # fmt: skip
        launch(join_keys, (heads, triton.cdiv(d, ROWS)))(
            sums, totals, shifts, state, stats, d, e, parts, **_options(join_keys, *shape)
        )
        chunk, parts = _chunks(n, d, e)
        launch(answer_queries, (heads, parts))(
            q, state, stats, out, h, n, d, e, eps, chunk, *q.stride()[:3], *out.stride()[:3],
            **_options(answer_queries, *shape, _large_tiles(q, out)),
        )  # fmt: skip
    return _rounded(out, q.dtype), state, stats


def linear_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: Tensor,
    stats: Tensor,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: dq, dk and dv as the reference's."""
    grad, q, k, v = _channels_last(grad, q, k, v)
    b, h, n, d = q.shape
    m, e = v.shape[2:]
    dq, dk, dv = (_result(x, x.shape) for x in (q, k, v))
    heads = b * h
    if not heads:
        return tuple(x.to(q.dtype) for x in (dq, dk, dv))
    shape = d, e, feature_map, q.dtype
    chunk, parts = _chunks(n, d, e)
    sums, shifts = state.new_empty((heads, parts, d, e)), state.new_empty((heads, parts, d))
    dstate, shift = torch.empty_like(state), state.new_empty((heads, d))
    with device_of(q):
        large = _large_tiles(grad, q, dq)
        for results in _results_at_a_time(query_gradients, d, e, q.dtype):
            launch(query_gradients, (heads, parts))(
                grad, q, state, stats, dq, sums, shifts, h, n, d, e, eps, chunk,
                *grad.stride()[:3], *q.stride()[:3], *dq.stride()[:3], **results,
                **_options(query_gradients, *shape, large),
            )  # fmt: skip
        launch(join_gradients, (heads, triton.cdiv(d, ROWS)))(
            sums, shifts, state, stats, dstate, shift, d, e, parts,
            **_options(join_gradients, *shape),
        )  # fmt: skip
        chunk, parts = _chunks(m, d, e)
        large = _large_tiles(k, v, dk, dv) if mask is None else 0
        for results in _results_at_a_time(key_gradients, d, e, q.dtype):
            launch(key_gradients, (heads, parts))(
                k, v, k if mask is None else mask.contiguous(), stats, dstate, shift, dk, dv, h, m,
                d, e, chunk, *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
                HAS_MASK=mask is not None, **results, **_options(key_gradients, *shape, large),
            )  # fmt: skip
    return tuple(_rounded(x, q.dtype) for x in (dq, dk, dv))


def _channels_last(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _chunks(tokens: int, d: int, e: int) -> tuple[int, int]:
    """A chunk's tokens and the number of chunks: a function of one head's sizes alone.

    The wider the state the longer a chunk, so that tiles remain most of what it reads.
    """
    chunk = CHUNK * max(1, max(d, e) // 64)
    chunk *= max(1, triton.cdiv(tokens, 64 * chunk))
    return chunk, max(1, triton.cdiv(tokens, chunk))


def _result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Stored token-major. The interpreter would cut, not round, to bfloat16."""
    return empty_token_major(like, shape, torch.float32 if interpreting() else like.dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else empty_token_major(x, x.shape, dtype).copy_(x)


def _large_tiles(*tensors: Tensor) -> int:
    """The major compute capability where large tiles are worth their registers (:func:`_tile`),
    else 0."""
    if not tensors[0].is_cuda or not (major := _products_from_shared_memory(tensors[0].device)):
        return 0
    fits = all(x.shape[-1] == 64 and not any(s % 16 for s in x.stride()[:3]) for x in tensors)
    return major if fits else 0


@functools.cache
def _products_from_shared_memory(device: torch.device) -> int:
    major = torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 0
    return major if major in LARGE_TILES else 0


@functools.cache
def _options(
    kernel: Any, d: int, e: int, feature_map: str, dtype: torch.dtype, large: int = 0
) -> dict[str, Any]:
    """A kernel's constexprs, warps and stages."""
    block_d, block_e = (max(16, triton.next_power_of_2(x)) for x in (d, e))
    tokens, warps, stages = _tile(kernel, max(block_d, block_e), dtype, feature_map, large)
    constants = {
        "SOFTMAX": feature_map == "softmax",
        "PRECISION": _precision(dtype),
        "BT": tokens,
        "BD": block_d,
        "BE": block_e,
        "BR": ROWS,
    }
    its = {name: x for name, x in constants.items() if name in kernel.arg_names}
    return its | {"num_warps": warps, "num_stages": stages}


#: Of the two results of a backward kernel, the gradient of its first input and the other.
BOTH = {"INPUT": True, "STATE": True}
ONE_BY_ONE = ({"INPUT": True, "STATE": False}, {"INPUT": False, "STATE": True})


#: Versions of Triton before it hold query_gradients in more registers: it spilled in 3.6.0.
SPARES_REGISTERS = (3, 8)


def _results_at_a_time(
    kernel: Any, d: int, e: int, dtype: torch.dtype
) -> tuple[dict[str, bool], ...]:
    """What each launch of query_gradients or key_gradients makes.

    Wide heads of float32 leave neither registers nor, of 99 KiB, shared memory for both results.
    """
    full = dtype == torch.float32
    channels = 64 if full else MAX_CHANNELS
    old = tuple(map(int, triton.__version__.split(".")[:2])) < SPARES_REGISTERS
    if old and kernel is query_gradients:
        channels = 32 if full else 64
    return ONE_BY_ONE if max(d, e) > channels else (BOTH,)


def _precision(dtype: torch.dtype) -> str:
    """Of products: as linear_attention_pieces names them."""
    if dtype == torch.float32:
        return "split"
    return "bf16" if dtype == torch.bfloat16 and interpreting() else "half"


def _tile(
    kernel: Any, wide: int, dtype: torch.dtype, feature_map: str, large: int
) -> tuple[int, int, int]:
    """Tokens of a tile, warps and stages: as many as leave the registers to the state.

    For strides of any size on every architecture. Large tiles are for heads of 64 channels with
    strides of multiples of 16, as ψ has them, on GPUs that multiply from shared memory (compute
    capability 9 and 10): there they take fewer instructions and nothing spills.
    """
    if kernel in (join_keys, join_gradients):
        return ROWS, 4, 2
    if dtype == torch.float32:
        return _float32_tile(kernel, wide, feature_map, large)
    if large:
        # ptxas takes 80 registers for 64 tokens and spills, outside the loop.
        many = large == 10 and kernel is sum_keys and feature_map == "softmax"
        return 128 if many else 64, 4, 2
    if wide > 64:
        return 32, 8, 1 if kernel is query_gradients else 2
    if wide > 32:
        return 32, 4, 3
    if kernel is query_gradients:
        return 32, 2, 2
    return 64, 4, 2


def _float32_tile(kernel: Any, wide: int, feature_map: str, large: int) -> tuple[int, int, int]:
    if wide > 64:
        return 16, 8, 1
    if kernel is query_gradients and wide > 32:
        if not large:
            return 16, 4, 2
        return (64, 4, 2) if feature_map == "softmax" else (32, 4, 1)
    if large and kernel is not key_gradients:
        return 64, 4, 2
    return 32, 4, 3 if wide > 32 and kernel is sum_keys else 2


def shipped() -> list[Shipped]:
    """Every kernel for heads of up to 128 channels, both maps and all dtypes.

    With a mask and any strides; where all of them are multiples of 16, of heads of 64 channels also
    without a mask, as ψ calls them.
    """
    products = (sum_keys, answer_queries, query_gradients, key_gradients)
    found = []
    for width in (16, 32, 64, 128):
        for feature_map in ("elu", "softmax"):
            for kernel in products:
                for dtype in DTYPES:
                    found += _ship(kernel, width, feature_map, dtype)
            for kernel in (join_keys, join_gradients):  # they see float32 only
                found += _ship(kernel, width, feature_map, torch.float32)
    for feature_map in ("elu", "softmax"):
        for kernel in products:
            for dtype in DTYPES:
                found += _ship_usual(kernel, feature_map, dtype)
    return found


def _ship_usual(kernel: Any, feature_map: str, dtype: torch.dtype) -> list[Shipped]:
    """As ψ calls it: the tile depends on the architecture."""
    found = []
    for large, its in {0: ("sm_80", "sm_86", "sm_89"), **LARGE_TILES}.items():
        for usual in _ship(kernel, 64, feature_map, dtype, masked=False, large=large):
            sizes = (n for n, kind in usual.signature.items() if kind == "i64")
            usual = usual.for_multiples("d", "e", "chunk", *sizes)
            found.append(replace(usual, architectures=its))
    return found


def _ship(
    kernel: Any,
    width: int,
    feature_map: str,
    dtype: torch.dtype,
    *,
    masked: bool = True,
    large: int = 0,
) -> list[Shipped]:
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    kinds = {"mask": "*i1", "eps": "fp32"}
    kinds |= dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), pointer)
    sums = ("sums", "totals", "shifts", "state", "stats", "dstate", "shift")
    kinds |= dict.fromkeys(sums, "*fp32")
    kinds |= dict.fromkeys(("heads", "count", "d", "e", "chunk", "parts"), "i32")
    names = kernel.arg_names
    options = _options(kernel, width, width, feature_map, dtype, large)
    parts = _results_at_a_time(kernel, width, width, dtype) if "STATE" in names else ({},)
    found = []
    for results in parts:
        constants = {"HAS_MASK": masked, **results, **options}
        only = "" if len(parts) == 1 else ", input" if results["INPUT"] else ", state"
        found.append(
            Shipped(
                f"linear_attention {kernel.__name__} {feature_map} {str(dtype)[6:]}"
                f" D = {width}{only}",
                kernel,
                {name: kinds.get(name, "i64") for name in names if not name.isupper()},
                {name: value for name, value in constants.items() if name in names},
                options["num_warps"],
                options["num_stages"],
                product="PRECISION" in names,
            )
        )
    return found
