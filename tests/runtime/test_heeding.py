"""A pass through modules is left where it is told to, and unchanged where it is not."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from nefkern.runtime.heeding import heeding


class LeftError(Exception):
    pass


class Until:
    """Ends the pass at the ``last``-th call."""

    def __init__(self, last: int) -> None:
        self.calls, self.last = 0, last

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.last:
            raise LeftError


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))


def gradients(model: nn.Sequential) -> list[torch.Tensor]:
    model(torch.ones(3, 4)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_gradients_are_the_same_and_no_hook_stays():
    expected, calls, model = gradients(layers()), [], layers()
    with heeding(lambda: calls.append(None)):
        found = gradients(model)
    assert all(map(torch.equal, found, expected))
    # Forward: the whole and its three parts; backward: what the four gave.
    assert len(calls) == 8
    gradients(model)
    assert len(calls) == 8


@pytest.mark.parametrize(("last", "reached"), [(1, 0), (3, 0), (5, 0), (7, 1)])
def test_it_is_left_at_once(last, reached):
    """In the forward pass (4 calls) and in the backward one; ``reached``: layers with gradients."""
    model, until = layers(), Until(last)
    with pytest.raises(LeftError), heeding(until):
        gradients(model)
    assert until.calls == last
    assert sum(layer.weight.grad is not None for layer in (model[0], model[2])) == reached
    assert len(gradients(model)) == 4, "a hook stayed"


def test_other_threads_are_left_alone():
    calls: list[None] = []
    with heeding(lambda: calls.append(None)), ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(gradients, layers()).result()) == 4
    assert not calls


def test_no_hook_stays_on_a_parameter():
    calls: list[None] = []
    parameter = nn.Parameter(torch.ones(2))
    with heeding(lambda: calls.append(None)):
        nn.Identity()(parameter).sum().backward()
    parameter.sum().backward()
    assert len(calls) == 1, "forward"
