"""Numbers as users have them: any integer where an int is taken, any real number for a float."""

from __future__ import annotations

import dataclasses
import fractions

import numpy as np
import pytest
import torch

from nefkern import ops
from tests.ops.graph_common import random_graph, random_lists

GRAPH = random_graph(6, 3)
INDICES, WEIGHTS = random_lists(6, 2)
PSI = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(1, 1, 6, 2)

#: "operator argument": a call with that argument alone
INTEGERS = {
    "knn k": lambda n: ops.knn(PSI, n),
    "normalized_adjacency num_nodes": lambda n: ops.normalized_adjacency(
        INDICES, num_nodes=n
    ).tensors(),
    "feature_kappa k": lambda n: ops.feature_kappa(PSI, n).tensors(),
    "kappa num_nodes": lambda n: ops.kappa(INDICES, None, INDICES, num_nodes=n).tensors(),
}
FLOATS = {
    "feature_kappa alpha": lambda x: ops.feature_kappa(
        PSI, 2, pixel_indices=INDICES, alpha=x
    ).tensors(),
    "feature_kappa clamp_min": lambda x: ops.feature_kappa(PSI, 2, clamp_min=x).tensors(),
    "add alpha": lambda x: ops.add(GRAPH, GRAPH, x).tensors(),
    "kappa alpha": lambda x: ops.kappa(INDICES, WEIGHTS, INDICES, num_nodes=6, alpha=x).tensors(),
    "kappa clamp_min": lambda x: ops.kappa(
        INDICES, WEIGHTS, INDICES, num_nodes=6, clamp_min=x
    ).tensors(),
    "normalized_adjacency clamp_min": lambda x: ops.normalized_adjacency(
        INDICES, WEIGHTS, num_nodes=6, clamp_min=x
    ).tensors(),
    "neuralef_loss beta": lambda x: ops.neuralef_loss(PSI, GRAPH, beta=x),
    "neuralef_loss t": lambda x: ops.neuralef_loss(PSI, GRAPH, beta=0.3, t=x),
    "linear_attention eps": lambda x: (ops.linear_attention(ONES, ONES, ONES, eps=x),),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_any_integer_is_an_int(name):
    call = INTEGERS[name]
    for n in (np.int64(6), np.uint8(6), torch.tensor(6)):
        for a, b in zip(call(n), call(6), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "bad",
    [6.0, np.float32(6), True, np.True_, "6", None, torch.tensor(6.0), torch.tensor(True)],
)
def test_what_is_no_integer(name, bad):
    kind, argument = type(bad).__name__, name.split()[1]
    with pytest.raises(TypeError, match=f"^{argument}: expected an int, got {kind}"):
        INTEGERS[name](bad)


@pytest.mark.parametrize("name", FLOATS)
def test_any_real_number_is_a_float(name):
    call = FLOATS[name]
    for x in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), fractions.Fraction(1, 2)):
        for a, b in zip(call(x), call(0.5), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(call(np.int32(1)), call(1.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_no_float(name):
    call, argument = FLOATS[name], name.split()[1]
    bools = (True, np.True_, torch.tensor(True))
    for bad in ("0.5", None, *bools, 0.5j, np.complex64(0.5), np.ones(2), torch.ones(2)):
        with pytest.raises(TypeError, match=f"^{argument}: expected a number, got "):
            call(bad)
    for bad in (np.float32("nan"), float("inf"), -np.float64("inf")):
        with pytest.raises(ValueError, match=f"^{argument}: expected a finite number"):
            call(bad)
    for bad in (10**400, fractions.Fraction(-(10**400), 3)):
        with pytest.raises(ValueError, match=f"^{argument}: expected a finite number.*got -?inf"):
            call(bad)


@pytest.mark.parametrize("name", ["add alpha", "kappa alpha", "feature_kappa alpha"])
def test_a_weight_that_float32_cannot_hold_is_named(name):
    with pytest.raises(
        ValueError, match=r"^alpha: expected a number that float32 can hold, got 1e"
    ):
        FLOATS[name](1e39)


def test_graphs_of_float64_take_any_finite_weight():
    wide = dataclasses.replace(GRAPH, values=GRAPH.values.double() * 1e-39)
    found = ops.add(wide, wide, 1e39).values
    torch.testing.assert_close(found, GRAPH.values.double())
    found = ops.kappa(INDICES, WEIGHTS.double(), INDICES, num_nodes=6, alpha=1e39).values
    assert found.isfinite().all()
    assert found.max() > 1e38


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_too_long_to_be_written_are_named(name):
    argument = name.split()[1]
    with pytest.raises(
        ValueError, match=f"^{argument}: expected less than 2.63, got an integer of"
    ):
        INTEGERS[name](10**5000)
    with pytest.raises(ValueError, match=f"^{argument}: expected at least ., got an integer of"):
        INTEGERS[name](-(10**5000))
