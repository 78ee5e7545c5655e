"""``linear_attention`` in Triton: the formulas stand in its reference.

Keys first: every program sums φ(k)ᵀv over one chunk of a head's tokens, and a second kernel joins
the chunks in order, so that the result does not depend on how programs are scheduled. Then queries.
The backward pass computes φ anew and goes the same way: queries (dq and dS by chunks), join, keys.
Everything is read in its own precision; feature maps, sums and states are float32; "softmax" finds
the largest key as it goes and rescales what it has. ``linear_attention_pieces`` says how products
are rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from nefkern.backends import interpreting
from nefkern.reference.linear_attention import empty_token_major
from nefkern.triton.configs import Shipped, device_of
from nefkern.triton.linear_attention_backward import (
    join_gradients,
    key_gradients,
    query_gradients,
)
from nefkern.triton.linear_attention_forward import answer_queries, join_keys, sum_keys

MAX_CHANNELS = 128  # a [D, E] state must fit the registers of a program
# Tokens of a tile and channels contracted at a time. Splitting float32 for TF32 keeps both halves
# of both factors in registers, so wide heads take half as many of either.
STEP, WIDE_STEP = 32, 16
ROWS = 16  # of a state that one program joins
COLUMNS = 64  # of dS that one program sums
MAX_TILES = 65_535  # programs along any axis of a grid but the first
CHUNK = 256  # tokens whose sums one program makes; more where there would be over 64 chunks


def accepts(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    return (
        q.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and max(q.shape[-1], v.shape[-1]) <= MAX_CHANNELS
    )


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
    heads, chunk, parts = b * h, *_chunks(m)
    if not heads:
        return out.to(q.dtype), state, stats
    sums = state.new_empty((heads, parts, d, e))
    totals, shifts = state.new_empty((2, heads, parts, d)).unbind()
    shape = d, e, feature_map, q.dtype
    step = _constants(*shape)["BT"]
    with device_of(q):
        sum_keys[(heads, parts)](
            k, v, k if mask is None else mask.contiguous(), sums, totals, shifts, h, m, d, e,
            chunk, *k.stride()[:3], *v.stride()[:3], HAS_MASK=mask is not None,
            **_options(sum_keys, *shape),
        )  # fmt: skip
        join_keys[(heads, triton.cdiv(d, ROWS))](
            sums, totals, shifts, state, stats, d, e, parts, **_options(join_keys, *shape)
        )
        for span in _spans(n, step):
            some, its_out = q[:, :, span], out[:, :, span]
            answer_queries[(heads, triton.cdiv(some.shape[2], step))](
                some, state, stats, its_out, h, some.shape[2], d, e, eps, *q.stride()[:3],
                *out.stride()[:3], **_options(answer_queries, *shape),
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
    heads, chunk, parts = b * h, *_chunks(n)
    if heads:
        sums, shifts = state.new_empty((heads, parts, d, e)), state.new_empty((heads, parts, d))
        dstate, shift = torch.empty_like(state), state.new_empty((heads, d))
        shape = d, e, feature_map, q.dtype
        its = _constants(*shape)
        with device_of(q):
            query_gradients[(heads, parts, triton.cdiv(its["BE"], its["BS"]))](
                grad, q, state, stats, dq, sums, shifts, h, n, d, e, eps, chunk,
                *grad.stride()[:3], *q.stride()[:3], *dq.stride()[:3],
                **_options(query_gradients, *shape),
            )  # fmt: skip
            join_gradients[(heads, triton.cdiv(d, ROWS))](
                sums, shifts, state, dstate, shift, d, e, parts, **_options(join_gradients, *shape)
            )
            for span in _spans(m, its["BT"]):
                inputs, results = ([x[:, :, span] for x in pair] for pair in ((k, v), (dk, dv)))
                size = inputs[0].shape[2]
                own = inputs[0] if mask is None else mask[:, span].contiguous()
                key_gradients[(heads, triton.cdiv(size, its["BT"]))](
                    *inputs, own, stats, dstate, shift, *results, h, size, d, e,
                    *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
                    HAS_MASK=mask is not None, **_options(key_gradients, *shape),
                )  # fmt: skip
    return tuple(_rounded(x, q.dtype) for x in (dq, dk, dv))


def _channels_last(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _chunks(tokens: int) -> tuple[int, int]:
    """A chunk's tokens and the number of chunks; a function of the tokens alone."""
    chunk = max(CHUNK, triton.cdiv(triton.cdiv(tokens, 64), STEP) * STEP)
    return chunk, max(1, triton.cdiv(tokens, chunk))


def _spans(tokens: int, step: int) -> Iterator[slice]:
    """All tokens, as many at a time as a launch has tiles of ``step`` for."""
    for first in range(0, tokens, MAX_TILES * step):
        yield slice(first, min(first + MAX_TILES * step, tokens))


def _result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Stored token-major. The interpreter would cut, not round, to bfloat16."""
    return empty_token_major(like, shape, torch.float32 if interpreting() else like.dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else empty_token_major(x, x.shape, dtype).copy_(x)


@functools.cache
def _constants(d: int, e: int, feature_map: str, dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs of all kernels."""
    block_d, block_e = (max(16, triton.next_power_of_2(x)) for x in (d, e))
    step = WIDE_STEP if max(block_d, block_e) > 16 else STEP
    return {
        "SOFTMAX": feature_map == "softmax",
        "PRECISION": "tf32" if dtype == torch.bfloat16 else "tf32x3",
        "BT": step,
        "BD": block_d,
        "BE": block_e,
        "BC": min(step, block_d, block_e),
        "BR": ROWS,
        "BS": min(block_e, COLUMNS),
    }


@functools.cache
def _options(kernel: Any, d: int, e: int, feature_map: str, dtype: torch.dtype) -> dict[str, Any]:
    """Those of the constants that a kernel has, with its warps and stages."""
    its = _constants(d, e, feature_map, dtype)
    wide = max(its["BD"], its["BE"])
    # One stage spills 8 bytes for float16 at 32 channels, on sm_90.
    stages = 2 if dtype == torch.float16 and wide == 32 else 1
    warps = _warps(kernel, its)
    constants = {name: x for name, x in its.items() if name in kernel.arg_names}
    return constants | {"num_warps": warps, "num_stages": stages}


def _warps(kernel: Any, its: dict[str, Any]) -> int:
    """As many as have room for a [D, E] state in their registers, beside both halves of both
    factors where a product is three. (Triton 3.6 and sm_90 are the narrowest.)"""
    size = its["BD"] * its["BE"]
    if max(its["BD"], its["BE"]) <= 16 and kernel in (sum_keys, key_gradients):
        return 2
    three = kernel is query_gradients and its["PRECISION"] == "tf32x3"
    return 8 if size > 64 * 64 or (three and size == 64 * 64) else 4


def shipped() -> list[Shipped]:
    """Every kernel for heads of 16 to 128 channels, both maps and all dtypes.

    With a mask and any strides; where all of them are multiples of 16, of heads of 64 channels also
    without a mask, as ψ calls them.
    """
    products = (sum_keys, answer_queries, query_gradients, key_gradients)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    found = []
    for width in (16, 32, 64, 128):
        for feature_map in ("elu", "softmax"):
            for kernel in products:
                found += [_ship(kernel, width, feature_map, dtype) for dtype in dtypes]
            for kernel in (join_keys, join_gradients):  # they see float32 only
                found.append(_ship(kernel, width, feature_map, torch.float32))
    for feature_map in ("elu", "softmax"):
        for kernel in products:
            for dtype in dtypes:
                usual = _ship(kernel, 64, feature_map, dtype, masked=False)
                sizes = (n for n, kind in usual.signature.items() if kind == "i64")
                found.append(usual.for_multiples("d", "e", "chunk", *sizes))
    return found


def _ship(
    kernel: Any, width: int, feature_map: str, dtype: torch.dtype, *, masked: bool = True
) -> Shipped:
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    kinds = {"mask": "*i1", "eps": "fp32"}
    kinds |= dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), pointer)
    sums = ("sums", "totals", "shifts", "state", "stats", "dstate", "shift")
    kinds |= dict.fromkeys(sums, "*fp32")
    kinds |= dict.fromkeys(("heads", "count", "d", "e", "chunk", "parts"), "i32")
    names = kernel.arg_names
    constants = {"HAS_MASK": masked, **_options(kernel, width, width, feature_map, dtype)}
    return Shipped(
        f"linear_attention {kernel.__name__} {feature_map} {str(dtype)[6:]} D = {width}",
        kernel,
        {name: kinds.get(name, "i64") for name in names if not name.isupper()},  # strides: i64
        {name: value for name, value in constants.items() if name in names},
        constants["num_warps"],
        constants["num_stages"],
        product="PRECISION" in names,
    )
