import pytest

from nefkern.baselines.methods import METHODS, parse_methods
from nefkern.errors import UserError


def names(given):
    return [method.name for method in parse_methods(given)]


def test_names_keep_their_order_and_come_once():
    assert names(["kmeans", "ours", "kmeans"]) == ["kmeans", "ours"]


def test_names_a_shell_leaves_alone():
    assert names(["hidden", "untrained", "ours*"]) == ["ours*", "ours*-untrained"]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match=r"kmeans-concat.*got 'kmean'"):
        parse_methods(["kmean"])


def test_methods_are_those_of_the_paper_and_their_controls():
    table = {m.name: (m.map_name, m.kmeans, m.normalize) for m in METHODS.values()}
    assert table == {
        "ours": ("logits", False, False),
        "ours*": ("hidden", True, False),
        "kmeans": ("graph", True, False),
        "kmeans-concat": ("concat", True, True),
        "deep-spectral": ("segments", True, False),
        "ours-untrained": ("logits-untrained", False, False),
        "ours*-untrained": ("hidden-untrained", True, False),
    }
