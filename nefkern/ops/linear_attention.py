"""Linear attention with the feature maps "elu" and "softmax" (section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern.ops import checks, registry
from nefkern.reference import linear_attention as reference

FEATURE_MAPS = reference.FEATURE_MAPS


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Attention whose cost grows linearly with the number of tokens: out = φ(q) (φ(k)ᵀ v).

    - "elu" (Katharopoulos et al. 2020, the paper's citation): φ(x) = elu(x) + 1, and each row of
      out is divided by φ(q)·Σ_n φ(k_n) + eps;
    - "softmax" (Efficient Attention, Shen et al. 2021; the authors' code): softmax of q over
      channels times D^(-1/2), softmax of k over tokens; no divisor, eps is not used.

    Differentiable in q, k and v, as often as wanted. The backward pass computes the feature maps
    anew, so that only the inputs and a `[D, E]` state a head are kept; second derivatives are by
    autograd of the reference's formulas, on every backend. Any strides are accepted; those with
    adjacent channels, such as q, k and v permuted out of one `[B, N, 3, H, D]` projection, are
    read in place.

    Half precisions are read as they are, summed in float32, and rounded once, in the result, with
    two exceptions. On the "triton" backend, and for bfloat16 on the "cpu" backend where the
    processor multiplies it (AVX-512-BF16), products have factors of the inputs' own precision: φ,
    the state and its gradient are rounded as PyTorch does. Divisors and sums stay float32, and the
    mean error is half (elu) to about that (softmax) of PyTorch's in the same precision. The
    processor's products take subnormal bfloat16 as 0; of float16 the "triton" backend takes φ(q)
    over its divisor and φ(k) below 2⁻²⁵ as 0, and any size of state. Its kernels take heads of at
    most 128 channels, and leave wider ones to the next backend.

    A NaN or an infinity in q, k or v stays within its head, and is not hidden: where the reference
    has a result that is not finite, every backend has a NaN or an infinity, not always the same
    one. (A value whose key's φ is 0 in all channels may count as masked.) Of a head whose v holds
    an infinity, or whose state overflows, "triton" promises no more: its other channels share a
    power of two with the largest number, lose their digits to it, and are wrong where the
    reference's are finite.

    Args:
        q: `[B, H, N, D]` queries.
        k: `[B, H, M, D]` keys.
        v: `[B, H, M, E]` values.
        feature_map: "elu" or "softmax".
        mask: `[B, M]` bool, True where a key counts (None: all do). What masked keys and values
            hold does not matter, be it NaN. With no valid key out is 0.
        eps: ≥ 0, added to the divisor of "elu".

    Returns:
        `[B, H, N, E]` in the inputs' dtype: float32, float16, bfloat16 or float64
        (reference backend). Stored as `[B, N, H, E]`, so that
        `out.transpose(1, 2).reshape(B, N, H * E)` costs nothing; the gradients are stored likewise.

    Raises:
        ValueError: shapes that do not fit together, different devices, an unknown feature map, or a
            negative eps.
        TypeError: an argument that is not a tensor, or has another dtype than said.
        RuntimeError: a backend was forced that cannot take this call.
    """
    _check(q, k, v, mask, feature_map)
    eps = checks.finite_number("eps", eps, 0)
    return registry.call("linear_attention", q, k, v, mask, feature_map, eps)[0]


def _check(q, k, v, mask, feature_map) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.dtype(name, checks.tensor(name, x), checks.FLOATING)
    checks.shape("q", q, "B", "H", "N", "D")
    b, h, _, d = q.shape
    checks.shape("k", k, b, h, "M", d)
    m = k.shape[2]
    checks.shape("v", v, b, h, m, "E")
    for name, size in (("q", d), ("v", v.shape[3])):
        checks.integer(f"the last dimension of {name}", size, 1)
    for name, x in (("k", k), ("v", v)):
        checks.device(name, x, q, "q")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
    if mask is not None:
        checks.dtype("mask", checks.tensor("mask", mask), (torch.bool,))
        checks.shape("mask", mask, b, m)
        checks.device("mask", mask, q, "q")
    checks.choice("feature_map", feature_map, FEATURE_MAPS)


def _fake(q, k, v, mask, feature_map, eps):
    dtype = reference.compute_dtype(q)
    b, h, n, d = q.shape
    e = v.shape[-1]
    out = reference.empty_token_major(q, (b, h, n, e), q.dtype)
    return out, q.new_empty((b, h, d, e), dtype=dtype), q.new_empty((b, h, 2, d), dtype=dtype)


def _fake_backward(grad, q, k, v, mask, state, stats, feature_map, eps):
    return tuple(reference.empty_token_major(x, x.shape, x.dtype) for x in (q, k, v))


registry.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, str feature_map, float eps)"
    " -> (Tensor out, Tensor state, Tensor stats)",
    fake=_fake,
)
registry.define(
    "linear_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask,"
    " Tensor state, Tensor stats, str feature_map, float eps) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=_fake_backward,
)

registry.kernel("linear_attention", "reference")(reference.linear_attention)
registry.kernel("linear_attention_backward", "reference")(reference.linear_attention_backward)


def _native(*args) -> bool:
    return args[0].device.type == "cpu" and args[0].dtype != torch.float64


@registry.kernel("linear_attention", "cpu", accepts=_native)
def _cpu(*args):
    return torch.ops.nefkern_native.linear_attention(*args)


@registry.kernel("linear_attention_backward", "cpu", accepts=_native)
def _cpu_backward(*args):
    return torch.ops.nefkern_native.linear_attention_backward(*args)


def _triton_accepts(q, k, v, *_) -> bool:
    from nefkern.triton.linear_attention import accepts

    return accepts(q, v)


@registry.kernel("linear_attention", "triton", accepts=_triton_accepts)
def _triton(*args):
    from nefkern.triton.linear_attention import linear_attention

    return linear_attention(*args)


@registry.kernel(
    "linear_attention_backward",
    "triton",
    accepts=lambda grad, *args: _triton_accepts(*args),
)
def _triton_backward(*args):
    from nefkern.triton.linear_attention import linear_attention_backward

    return linear_attention_backward(*args)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, mask, ctx.feature_map, ctx.eps = inputs
    _, state, stats = output
    ctx.mark_non_differentiable(state, stats)
    ctx.save_for_backward(q, k, v, mask, state, stats)


def _backward(ctx, grad, _state, _stats):
    if grad is None:
        return (None,) * 6
    gradients = registry.call(
        "linear_attention_backward", grad, *ctx.saved_tensors, ctx.feature_map, ctx.eps
    )
    return (*gradients, None, None, None)


def _setup_second(ctx, inputs, output) -> None:
    grad, q, k, v, mask, _, _, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(grad, q, k, v, mask)


def _second(ctx, *cotangents):
    """Second derivatives, by differentiating the reference's formulas for the first.

    State and stats are no variables of their own here: they are functions of k and v.
    """
    *variables, mask = ctx.saved_tensors

    def first(grad, q, k, v):
        return reference.linear_attention_gradients(grad, q, k, v, mask, ctx.feature_map, ctx.eps)

    gradients, pull_back = torch.func.vjp(first, *variables)
    given = tuple(
        torch.zeros_like(x) if c is None else c for x, c in zip(gradients, cotangents, strict=True)
    )
    return (*pull_back(given), None, None, None, None, None)


registry.autograd("linear_attention", _backward, _setup_context)
registry.autograd("linear_attention_backward", _second, _setup_second)
