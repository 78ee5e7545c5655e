"""Linear attention in pure PyTorch: the twin that the fast kernels are judged against.

With feature maps φ the attention matrix φ(q)φ(k)ᵀ is never formed: its product with v is regrouped
to φ(q)(φ(k)ᵀv), which costs O(N·D·E) instead of O(N²·(D + E)):

- "elu": φ(x) = elu(x) + 1; φ(q) stands over the divisor φ(q)·Σ_n φ(k_n) + eps (Katharopoulos et al.
  2020, eq. 5, with eps as in the authors' code);
- "softmax": φ(q) = softmax over channels / √D, φ(k) = softmax over tokens (Shen et al. 2021).

What the backward pass needs of all keys and values is small: the *state* S = φ(k)ᵀv, `[D, E]` a
head, and the *stats*, two numbers a channel: a shift c and a sum z. For "elu" c = 0 and
z = Σ_n φ(k_n); for "softmax" c is the largest valid k and z = Σ_n exp(k_n − c), so that
φ(k) = exp(k − c) / z.

Both maps work in the inputs' own precision, but half precisions in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEATURE_MAPS = ("elu", "softmax")


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass.

    Args:
        q: `[B, H, N, D]` queries.
        k: `[B, H, M, D]` keys.
        v: `[B, H, M, E]` values.
        mask: `[B, M]` bool, True where a key counts; None counts all.
        feature_map: "elu" or "softmax".
        eps: added to the divisor of "elu".

    Returns:
        out `[B, H, N, E]` in q's dtype, stored token-major (:func:`token_major`), and what the
        backward pass needs: state `[B, H, D, E]` and stats `[B, H, 2, D]` (see the head of this
        file) in :func:`compute_dtype`.
    """
    dtype = compute_dtype(q)
    k, v = _without_masked(k.to(dtype), v.to(dtype), mask, feature_map)
    stats = _key_stats(k, mask, feature_map)
    state = _key_features(k, stats, mask, feature_map).mT @ v
    out = _query_features(q.to(dtype), stats, feature_map, eps)[0] @ state
    return token_major(out, q.dtype), state, stats


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
    """Backward pass in closed form: the feature maps are computed anew, not kept.

    With G = grad·Sᵀ, φ = φ(q) over its divisor, r the divisor's reciprocal (1 for "softmax") and
    rowsum over channels, dS = φᵀ·grad and

    - elu: dq = φ'(q) r (G − rowsum(φG) z), dz = −Σ_n φ rowsum(φG), dk = φ'(k) (v dSᵀ + dz);
    - softmax: dq = φ (G − √D rowsum(φG)), dk = φ(k) (v dSᵀ − rowsum(S dS));
    - both: dv = φ(k) dS,

    where φ' = min(φ, 1) for elu + 1. The softmax over tokens needs no second pass over them:
    Σ_n φ(k) (v dSᵀ) = rowsum(S dS).

    Args:
        grad: `[B, H, N, E]` gradient of out; the others as in and from :func:`linear_attention`.

    Returns:
        Gradients of q, k and v in their dtype, stored token-major.
    """
    gradients = _gradients(grad, q, k, v, mask, state, stats, feature_map, eps)
    return tuple(token_major(x, q.dtype) for x in gradients)


def linear_attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradients as a function of grad, q, k and v alone, by differentiable operations.

    State and stats are computed anew from k and v, so that its derivatives are the second ones of
    :func:`linear_attention`.
    """
    dtype = compute_dtype(q)
    k32, v32 = _without_masked(k.to(dtype), v.to(dtype), mask, feature_map)
    stats = _key_stats(k32, mask, feature_map)
    state = _key_features(k32, stats, mask, feature_map).mT @ v32
    gradients = _gradients(grad, q, k, v, mask, state, stats, feature_map, eps)
    return tuple(x.to(q.dtype) for x in gradients)


def _gradients(
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
    """The formulas of :func:`linear_attention_backward`, in :func:`compute_dtype`."""
    dtype = compute_dtype(q)
    grad, q32 = grad.to(dtype), q.to(dtype)
    k32, v32 = _without_masked(k.to(dtype), v.to(dtype), mask, feature_map)

    phi, reciprocal = _query_features(q32, stats, feature_map, eps)
    g = grad @ state.mT
    dstate = phi.mT @ grad
    inner = (phi * g).sum(-1, keepdim=True)
    if feature_map == "elu":
        dq = _elu1(q32).clamp(max=1) * reciprocal * (g - inner * stats[:, :, 1:])
        shift = -(inner * phi).sum(-2)
    else:
        dq = phi * (g - math.sqrt(q.shape[-1]) * inner)
        shift = -(state * dstate).sum(-1)

    phi = _key_features(k32, stats, mask, feature_map)
    slope = phi.clamp(max=1) if feature_map == "elu" else phi
    dk = slope * (v32 @ dstate.mT + shift[:, :, None])
    return dq, dk, phi @ dstate


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of sums, state and stats: float32 for half precisions, else the input's own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, H, N, D]` stored as `[B, N, H, D]`: joining the heads behind it is then a free view."""
    return empty_token_major(x, x.shape, dtype).copy_(x)


def empty_token_major(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of shape `[B, H, N, D]`, stored as `[B, N, H, D]`."""
    b, h, n, d = shape
    return like.new_empty((b, n, h, d), dtype=dtype).transpose(1, 2)


def _elu1(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def _query_features(
    q: Tensor, stats: Tensor, feature_map: str, eps: float
) -> tuple[Tensor, Tensor | float]:
    """φ(q) over its divisor, and the divisor's reciprocal (0 where the divisor is 0)."""
    if feature_map == "softmax":
        return q.softmax(-1) / math.sqrt(q.shape[-1]), 1.0
    phi = _elu1(q)
    divisor = phi @ stats[:, :, 1:].mT + eps
    zero = divisor == 0
    # Replaced before the division: its slope at 0 would be 0 times infinity.
    reciprocal = (1 / divisor.masked_fill(zero, 1)).masked_fill(zero, 0)
    return phi * reciprocal, reciprocal


def _key_stats(k: Tensor, mask: Tensor | None, feature_map: str) -> Tensor:
    """Shift and sum of φ(k), `[B, H, 2, D]`."""
    b, h, m, d = k.shape
    shift = k.new_zeros(b, h, 1, d)
    if feature_map == "elu":
        phi = _elu1_keys(k, mask)
    else:
        if m:
            shift = k.detach().amax(-2, keepdim=True)  # φ(k) is the same for any shift
            shift = shift.masked_fill(shift == -torch.inf, 0)  # no valid key: exp(−inf − 0) = 0
        phi = (k - shift).exp()
    return torch.cat((shift, phi.sum(-2, keepdim=True)), -2)


def _key_features(k: Tensor, stats: Tensor, mask: Tensor | None, feature_map: str) -> Tensor:
    """φ(k), zero where masked."""
    if feature_map == "elu":
        return _elu1_keys(k, mask)
    shift, total = stats.split(1, dim=-2)
    return (k - shift).exp() / total.masked_fill(total == 0, 1)


def _elu1_keys(k: Tensor, mask: Tensor | None) -> Tensor:
    phi = _elu1(k)
    return phi if mask is None else phi * mask[:, None, :, None]


def _without_masked(
    k: Tensor, v: Tensor, mask: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor]:
    """Masked keys and values replaced, so that not even a NaN in them can reach a result."""
    if mask is None:
        return k, v
    masked = ~mask[:, None, :, None]
    k = k.masked_fill(masked, -torch.inf if feature_map == "softmax" else 0)
    return k, v.masked_fill(masked, 0)
