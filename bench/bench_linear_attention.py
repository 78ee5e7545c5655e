"""Linear attention, forward + backward, against einsum and against torch.compile of it.

q, k and v are views of one fused projection, as in ψ; their gradients are asked for one by one.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bench.harness import DEVICE, Work, on_reference
from nefkern.ops import linear_attention

SIZES = {  # B, H, N, D
    "small": (2, 2, 256, 64),
    "paper": (8, 18, 1024, 64),
    "large": (16, 18, 4096, 64),
}


def einsum_attention(q, k, v, feature_map):
    """What one writes without a library: the feature maps, two products, and the divisor."""
    if feature_map == "softmax":
        q, k = q.softmax(-1) / math.sqrt(q.shape[-1]), k.softmax(-2)
        return torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))
    return out / (torch.einsum("bhnd,bhd->bhn", q, k.sum(2))[..., None] + 1e-6)


def step(attention, feature_map, leaves, grad):
    """Forward and backward: out and the gradients of q, k and v."""
    out = attention(*leaves, feature_map=feature_map)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def make_inputs(shape, dtype):
    b, h, n, d = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(b, n, 3, h, d, generator=generator).to(DEVICE, dtype).permute(2, 0, 3, 1, 4)
    grad = torch.randn(b, n, h, d, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    return [x.requires_grad_() for x in qkv.unbind(0)], grad


def assert_no_worse(ours, theirs, exact):
    """Errors of ours against those of PyTorch in the same dtype, and against 6 roundings.

    Both round φ, the state and the result, so that the mean error of a result can be the same. The
    largest of so many is chance: between equals it was seen to differ by 1.4.
    """
    for name, a, b, truth in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - truth).abs() for x in (a, b))
        assert error.mean() <= 1.01 * allowed.mean(), name
        assert error.max() <= 1.5 * allowed.max(), name
        assert error.max() <= 3 * torch.finfo(a.dtype).eps * truth.abs().max(), name


def assert_right(feature_map, leaves, grad):
    """All of one image against float64: float32 to 1e-5, bfloat16 as near as einsum in it."""
    part = [x.detach()[:1].requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in part]
    expected = step(einsum_attention, feature_map, exact, grad[:1].double())
    ours = step(linear_attention, feature_map, part, grad[:1])
    if grad.dtype != torch.float32:
        return assert_no_worse(ours, step(einsum_attention, feature_map, part, grad[:1]), expected)
    for got, want in zip(ours, expected, strict=True):
        assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_forward_and_backward(race, size, feature_map, dtype):
    shape = SIZES[size]
    leaves, grad = make_inputs(shape, dtype)
    assert_right(feature_map, leaves, grad)
    compiled = torch.compile(einsum_attention)
    step(compiled, feature_map, leaves, grad)  # compiles
    contestants = {
        "nefkern": lambda: step(linear_attention, feature_map, leaves, grad),
        "einsum": lambda: step(einsum_attention, feature_map, leaves, grad),
        "torch.compile(einsum)": lambda: step(compiled, feature_map, leaves, grad),
        "reference": on_reference(lambda: step(linear_attention, feature_map, leaves, grad)),
    }
    name = str(dtype).removeprefix("torch.")
    race(
        f"linear_attention {feature_map} {name}",
        contestants,
        sizes=dict(zip("BHND", shape, strict=True)),
        # Two products forward, four backward; 3 inputs, out, grad twice over, 3 gradients.
        work=Work(11.0 * grad.nbytes, {name: 12.0 * grad.numel() * shape[-1]}),
    )
