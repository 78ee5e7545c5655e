import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans as ScikitKMeans
from sklearn.cluster import kmeans_plusplus
from torch.testing import assert_close

from nefkern.spectral.kmeans import Blocks, KMeans, plus_plus


def blobs(n, centres=5, channels=8, seed=0, spread=0.3, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(centres, channels, generator=torch.Generator().manual_seed(99))
    which = torch.randint(centres, (n,), generator=generator)
    return means[which] + spread * torch.randn(n, channels, generator=generator) + offset, which


def nearest(rows, centers):
    """The definition, in float64."""
    return torch.cdist(rows.double(), centers.double()).argmin(1)


def test_fit_is_lloyds_algorithm_from_the_seeding():
    rows, _ = blobs(400, centres=30, spread=2.0)
    ours = KMeans(5, seed=3).fit(rows)
    init = rows[plus_plus(rows, 5, seed=3)].numpy()
    theirs = ScikitKMeans(5, init=init, n_init=1, max_iter=100).fit(rows.numpy())
    assert_close(ours.centers, torch.from_numpy(theirs.cluster_centers_))
    assert ours.counts.tolist() == np.bincount(theirs.labels_, minlength=5).tolist()
    assert torch.equal(ours.predict(rows), torch.from_numpy(theirs.labels_).long())


def test_well_separated_blobs_are_found():
    rows, which = blobs(600)
    found = KMeans(5, seed=0).fit(rows).predict(rows)
    pairs = set(zip(found.tolist(), which.tolist(), strict=True))
    assert len(pairs) == 5


def test_online_pass_is_the_running_mean():
    """With blobs this far apart no row changes its cluster: centres are means of all rows seen."""
    rows, _ = blobs(2000)
    kmeans = KMeans(5, seed=0).fit(rows[:300])
    for part in rows[300:].split(190):
        kmeans.partial_fit(part)
    assert kmeans.counts.sum() == 2000
    label_of = kmeans.predict(rows)
    for cluster in range(5):
        members = rows[label_of == cluster]
        assert kmeans.counts[cluster] == len(members)
        assert_close(kmeans.centers[cluster], members.mean(0), atol=1e-5, rtol=1e-5)


def test_a_cluster_without_rows_stays_where_it_is():
    rows, _ = blobs(300)
    kmeans = KMeans(5, seed=0).fit(rows)
    before, counts = kmeans.centers.clone(), kmeans.counts.clone()
    only = rows[kmeans.predict(rows) == 2]
    kmeans.partial_fit(only)
    others = [0, 1, 3, 4]
    assert torch.equal(kmeans.centers[others], before[others])
    assert torch.equal(kmeans.counts[others], counts[others])
    kmeans.partial_fit(only[:0])
    assert kmeans.counts.sum() == 300 + len(only)


def test_prediction_far_from_the_origin():
    """A common offset of 1000 would eat the digits of x·c − ‖c‖²/2 in float32."""
    rows, _ = blobs(500, spread=1.0, offset=1000.0)
    kmeans = KMeans(7, seed=0).fit(rows)
    assert torch.equal(kmeans.predict(rows), nearest(rows, kmeans.centers))


def test_blocks_do_not_matter(monkeypatch):
    rows, _ = blobs(700)
    whole = KMeans(5).fit(rows[:100])
    labels, logits = whole.predict(rows), whole.logits(rows)
    monkeypatch.setattr("nefkern.spectral.kmeans._BLOCK", 33)
    assert torch.equal(whole.predict(rows), labels)
    assert_close(whole.logits(rows), logits)


def test_ties_go_to_the_lower_index():
    kmeans = KMeans(3).fit(torch.tensor([[0.0], [2.0], [10.0]]))
    kmeans.centers = torch.tensor([[2.0], [0.0], [2.0]])
    assert kmeans.predict(torch.tensor([[1.0], [2.0]])).tolist() == [0, 0]


def test_upsampled_logits_assign_upsampled_features():
    features = torch.randn(1, 6, 5, 7, generator=torch.Generator().manual_seed(1))
    kmeans = KMeans(4).fit(features[0].flatten(1).T)
    logits = kmeans.logits(features.movedim(1, -1)).movedim(-1, 1)

    def up(maps):
        return F.interpolate(maps, (40, 56), mode="bilinear", align_corners=False)

    pixels = up(features).movedim(1, -1)[0]
    assert logits.shape == (1, 4, 5, 7)
    agree = up(logits).argmax(1)[0] == nearest(pixels.flatten(0, 1), kmeans.centers).view(40, 56)
    assert agree.float().mean() > 0.999  # all but pixels halfway between two centres


def test_the_seed_decides():
    rows, _ = blobs(300, centres=40, spread=2.0)
    first, again, other = (KMeans(12, seed=s).fit(rows).centers for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_as_many_rows_as_clusters():
    rows, _ = blobs(9)
    assert sorted(KMeans(9).fit(rows).predict(rows).tolist()) == list(range(9))


def test_half_precision_and_strided_rows():
    rows, _ = blobs(200)
    kmeans = KMeans(5).fit(rows)
    strided = rows.T.contiguous().T
    assert torch.equal(kmeans.predict(strided), kmeans.predict(rows))
    assert kmeans.logits(rows.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 2), r"n >= 4 \(one a cluster\), got \(3, 2\)"),
        (torch.zeros(3, 2, 2), r"got \(3, 2, 2\)"),
        (torch.tensor([[0.0], [1.0], [2.0], [torch.nan]]), "not finite"),
        (torch.tensor([[0.0], [1.0], [2.0], [torch.inf]]), "not finite"),
    ],
)
def test_wrong_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        KMeans(4).fit(rows)


def test_rows_of_other_columns_are_named():
    kmeans = KMeans(2).fit(torch.randn(9, 3))
    for call in (kmeans.partial_fit, kmeans.predict, kmeans.logits):
        with pytest.raises(ValueError, match=r"rows: expected shape \[\.\.\., 3\], got \[5, 2\]"):
            call(torch.zeros(5, 2))


def test_before_a_fit_there_is_nothing_to_predict_with():
    kmeans, rows = KMeans(2), torch.zeros(5, 2)
    calls = (
        lambda: kmeans.partial_fit(rows), lambda: kmeans.predict(rows),
        lambda: kmeans.logits(rows), lambda: kmeans.to("cpu"), kmeans.state,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match="KMeans: has no centres yet; expected fit"):
            call()


def test_one_row_and_none():
    kmeans = KMeans(2).fit(torch.tensor([[0.0, 0.0], [4.0, 4.0]]))
    one = kmeans.predict(torch.tensor([4.0, 3.0]))
    assert one.shape == ()
    assert torch.equal(kmeans.centers[one], torch.tensor([4.0, 4.0]))
    assert kmeans.logits(torch.zeros(2)).shape == (2,)
    assert kmeans.predict(torch.zeros(3, 0, 2)).shape == (3, 0)
    assert kmeans.logits(torch.zeros(3, 0, 2)).shape == (3, 0, 2)


def test_no_clusters_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        KMeans(0)
    with pytest.raises(TypeError, match="num_clusters: expected an int, got float"):
        KMeans(2.5)


def inertia(rows, centers):
    """The definition, in float64."""
    return torch.cdist(rows.double(), centers.double()).amin(1).square().sum().item()


def test_inertia_is_that_of_the_centres():
    rows, _ = blobs(5000, centres=20, spread=1.0, offset=10.0)
    kmeans = KMeans(8).fit(rows)
    assert kmeans.inertia == pytest.approx(inertia(rows, kmeans.centers), rel=1e-5)


def test_clusters_are_as_good_as_scikit_learns():
    """On more rows than the seeding looks at."""
    rows, _ = blobs(6000, centres=60, spread=1.5)
    ours = [KMeans(20, seed=s).fit(rows).inertia for s in range(8)]
    theirs = [
        ScikitKMeans(20, n_init=1, random_state=s).fit(rows.numpy()).inertia_ for s in range(8)
    ]
    assert np.mean(ours) < 1.02 * np.mean(theirs)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr("nefkern.spectral.kmeans._BLOCK", 64)
    rows, _ = blobs(3000, centres=40, channels=48, spread=2.0)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        kmeans = KMeans(12, seed=1).fit(rows[:2000])
        fitted = kmeans.centers.clone()
        found.append((fitted, kmeans.partial_fit(rows[2000:]).centers, kmeans.counts))
        assert torch.get_num_threads() == threads
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
    assert found[0][2].sum() == 3000


def test_threads_are_given_back_after_an_error():
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), Blocks(torch.device("cpu")) as blocks:
        list(blocks.map(lambda block: 1 / 0, torch.zeros(3)))
    assert torch.get_num_threads() == threads


def test_a_centre_that_loses_its_rows_takes_the_farthest(monkeypatch):
    rows = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [30.0]])
    start = torch.tensor([[0.0], [9.0], [500.0]])
    monkeypatch.setattr(KMeans, "_seeds", lambda self, rows, blocks: start - self._origin)
    kmeans = KMeans(3).fit(rows)
    assert kmeans.predict(rows).tolist() == [0, 0, 0, 1, 1, 2]
    assert kmeans.counts.tolist() == [3, 2, 1]
    assert_close(kmeans.centers, torch.tensor([[0.1], [9.05], [30.0]]))


def test_fewer_different_rows_than_centres():
    kmeans = KMeans(4).fit(torch.tensor([[1.0], [2.0]]).repeat(5, 1))
    assert kmeans.inertia == pytest.approx(0, abs=1e-6)
    assert kmeans.counts.sum() == 10
    assert kmeans.centers.isfinite().all()


def test_a_sample_in_half_precision_is_computed_in_float32():
    rows, _ = blobs(900, centres=30, spread=2.0)
    half = rows.half()
    assert torch.equal(KMeans(6).fit(half).centers, KMeans(6).fit(half.float()).centers)


def test_state_is_all_that_prediction_needs():
    rows, _ = blobs(300, spread=1.0)
    kmeans = KMeans(5).fit(rows)
    again = KMeans(2).load(kmeans.state())
    assert torch.equal(again.logits(rows), kmeans.logits(rows))
    assert (again.num_clusters, again.variance) == (5, kmeans.variance)


# ---- seeding ----


def potential(rows, chosen):
    """The sum of squared distances to the nearest chosen row, in float64."""
    return torch.cdist(rows.double(), rows[chosen].double()).amin(1).square().sum().item()


def test_seeding_takes_a_row_from_every_blob():
    for seed in range(20):
        rows, which = blobs(300, seed=seed)
        assert len(set(which[plus_plus(rows, 5, seed)].tolist())) == 5


def test_seeding_is_as_good_as_scikit_learns():
    rows, _ = blobs(800, centres=60, spread=1.5)
    ours, theirs = [], []
    for seed in range(10):
        ours.append(potential(rows, plus_plus(rows, 20, seed)))
        theirs.append(potential(rows, kmeans_plusplus(rows.numpy(), 20, random_state=seed)[1]))
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.05)


def test_seeding_draws_by_squared_distance(monkeypatch):
    """One trial, three points at 0, 1 and 3: from 0 the second seed is 1 or 3 with odds 1 to 9."""
    monkeypatch.setattr("nefkern.spectral.kmeans.math.log", lambda _: -1)
    rows = torch.tensor([[0.0], [1.0], [3.0]])
    second = [c[1] for c in (plus_plus(rows, 2, s).tolist() for s in range(3000)) if c[0] == 0]
    assert np.mean(np.array(second) == 2) == pytest.approx(0.9, abs=0.03)


def test_seeds_differ_even_among_near_duplicates():
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).repeat(2, 1) + 100
    rows[40:] += 1e-3
    assert len(set(plus_plus(rows, 80, 0).tolist())) == 80


def test_seeding_survives_too_few_different_rows():
    assert len(plus_plus(torch.ones(6, 2), 4, 0)) == 4


# ---- variance ----


def test_variance_of_independent_channels_is_theirs():
    rows = 0.5 * torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    assert KMeans(1).fit(rows).variance == pytest.approx(0.25, rel=0.05)


def test_copied_channels_are_no_new_evidence():
    """Posteriors of features and of their fourfold copies are the same."""
    rows, _ = blobs(500, spread=1.0)
    copies = rows.repeat(1, 4)
    once, fourfold = KMeans(5).fit(rows), KMeans(5).fit(copies)
    fourfold.centers = once.centers.repeat(1, 4)
    expected = (once.logits(rows) / once.variance).softmax(1)
    assert_close((fourfold.logits(copies) / fourfold.variance).softmax(1), expected)


def test_identical_rows_have_no_variance():
    assert KMeans(1).fit(torch.ones(5, 3)).variance == 0.0


def test_every_iteration_is_told_and_can_end_the_fit():
    rows, told = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)), []
    kmeans = KMeans(5).fit(rows, on_iteration=lambda: told.append(None))
    assert len(told) == kmeans.iterations > 1

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        KMeans(5).fit(rows, on_iteration=stop)
