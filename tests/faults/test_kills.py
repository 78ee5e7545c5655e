"""kill -9 at any moment of training, by every method."""

from __future__ import annotations

import pytest

from tests.faults.kills import METHODS, Killing

pytestmark = pytest.mark.skipif("not hasattr(__import__('os'), 'fork')", reason="forks")


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_comes_to_the_same_result(method, tmp_path):
    killing = Killing(method, tmp_path)
    killing.survive(8)
    assert killing.kills >= 8
    assert killing.finished >= 1


@pytest.mark.long
def test_a_few_kills(tmp_path):
    killing = Killing("neural", tmp_path, seed=1)
    killing.survive(2)
    assert killing.finished >= 1
