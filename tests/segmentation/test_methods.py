import pytest

from nefkern.runtime.errors import UserError
from nefkern.segmentation.methods import METHODS, of_run, parse_methods


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
        "probe-ours": ("hidden", False, False),
        "probe": ("graph", False, False),
    }


def test_a_name_for_both_probes():
    assert names(["linear-probe", "probe"]) == ["probe-ours", "probe"]


def test_continuous_outputs_are_clustered_and_the_rest_is_as_it_was():
    methods = parse_methods(["ours", "ours-untrained", "ours*", "probe"])
    assert of_run(methods, "quantised") == methods
    ours, untrained, hidden, probe = of_run(methods, "continuous")
    assert (hidden, probe) == (methods[2], methods[3])
    for method in (ours, untrained):
        assert method.kmeans
        assert method.spectral
        assert "K-means" in method.title
    assert (ours.name, ours.map_name) == ("ours", "logits")
    assert (untrained.name, untrained.map_name) == ("ours-untrained", "logits-untrained")


def test_a_spectral_run_has_its_eigenvectors_where_psi_was():
    methods = parse_methods(["ours", "ours*", "kmeans", "linear-probe"])
    ours, hidden, kmeans, probe, plain = of_run(methods, "spectral")
    for method in (ours, hidden):
        assert (method.map_name, method.kmeans, method.spectral) == ("hidden", True, False)
        assert "eigenvectors, extended" in method.title
    assert (kmeans, plain) == (methods[2], methods[4])
    assert probe.supervised
    assert "eigenvectors" in probe.title
    for name in ("ours-untrained", "ours*-untrained"):
        with pytest.raises(UserError, match=r"has no ψ that could be untrained"):
            of_run(parse_methods([name]), "spectral")
