"""A temperature for clusters' scores, without a label: it foretells the clusters of neighbours.

K-means' scores have a scale of their own, and in hundreds of correlated channels the posterior of
the mixture of Gaussians that it is the limit of is sure of everything. What clusters are for is
that a row and its neighbours in the graph are of one. So the temperature is fitted as it is to
labels (Guo et al., *On calibration of modern neural networks*, ICML 2017), with the clusters of a
row's neighbours in a label's place. The argmax is the same at any.
"""

from __future__ import annotations

import math

from torch import Tensor

#: Between these, times the scores' mean lead of the first over the second, a temperature is sought.
_LEAST, _MOST = 1e-3, 1e3
_HALVINGS = 50


def fitted_temperature(scores: Tensor, votes: Tensor) -> float:
    """T at which softmax(scores / T) makes the votes likeliest.

    Their log-likelihood is concave in 1/T, so that bisection of its derivative, the votes' mean
    score less the expected one, finds the maximum.

    Args:
        scores: floating point ``[n, K]``.
        votes: ``[n, K]``, not negative; a row's weights of the clusters that its neighbours have,
            all 0 where it has none.

    Returns:
        At least a thousandth of the scores' mean lead, which is where votes that all agree with the
        scores lead to, and at most a thousand times that. 1 where nothing tells: no vote, a single
        cluster, or scores all alike.
    """
    voted = votes.sum(1) > 0
    scores, votes = scores[voted].double(), votes[voted].double()
    if len(scores) == 0 or scores.shape[1] < 2:
        return 1.0
    first, second = scores.topk(2).values.unbind(1)
    lead = float((first - second).mean())
    if lead <= 0:
        return 1.0
    votes = votes / votes.sum(1, keepdim=True)
    target = float((votes * scores).sum(1).mean())
    low, high = math.log(_LEAST * lead), math.log(_MOST * lead)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        shares = (scores / math.exp(middle)).softmax(1)
        surer = float((shares * scores).sum(1).mean()) > target
        low, high = (middle, high) if surer else (low, middle)
    return math.exp((low + high) / 2)
