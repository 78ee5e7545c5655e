"""The temperature of clusters' scores, fitted to votes."""

from __future__ import annotations

import pytest
import torch

from nefkern.spectral.temperature import fitted_temperature


def drawn(n: int = 4000, k: int = 6) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("true", [0.05, 1.0, 7.0])
def test_the_temperature_that_votes_were_drawn_at(true):
    scores = drawn()
    shares = (scores / true).softmax(1)
    assert fitted_temperature(scores, shares) == pytest.approx(true, rel=1e-3)
    generator = torch.Generator().manual_seed(1)
    votes = torch.zeros_like(scores)
    votes.scatter_(1, torch.multinomial(shares, 1, generator=generator), 1)
    if true > 0.5:  # below, nearly all votes are for the first
        assert fitted_temperature(scores, votes) == pytest.approx(true, rel=0.1)


def test_it_is_the_likeliest():
    scores, noise = drawn(500), torch.rand(500, 6, generator=torch.Generator().manual_seed(2))
    votes = (scores / 2).softmax(1) + 0.2 * noise
    votes /= votes.sum(1, keepdim=True)

    def likelihood(temperature):
        return float((votes * (scores / temperature).log_softmax(1)).sum())

    found = fitted_temperature(scores, 3 * votes)
    assert found > 2
    assert likelihood(found) > max(likelihood(0.9 * found), likelihood(1.1 * found))


def test_rows_without_votes_do_not_count():
    scores = drawn(100)
    votes = (scores / 0.5).softmax(1)
    more = torch.cat([votes, torch.zeros(50, 6)])
    found = fitted_temperature(torch.cat([scores, drawn(50) * 9]), more)
    assert found == pytest.approx(fitted_temperature(scores, votes))


def test_where_nothing_tells():
    scores = drawn(10)
    assert fitted_temperature(scores, torch.zeros(10, 6)) == 1.0
    assert fitted_temperature(scores[:, :1], torch.ones(10, 1)) == 1.0
    assert fitted_temperature(torch.ones(10, 6), torch.ones(10, 6)) == 1.0
    agreeing = torch.nn.functional.one_hot(scores.argmax(1), 6)
    assert 0 < fitted_temperature(scores, agreeing) < 0.3
