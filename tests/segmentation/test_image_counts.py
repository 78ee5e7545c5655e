import torch

from nefkern.segmentation.image_counts import ImageCounts

TABLES = torch.tensor([[[3, 0], [0, 2]], [[0, 0], [0, 0]], [[1, 4], [0, 0]]])


def counted() -> ImageCounts:
    counts = ImageCounts(2, 2)
    for table in TABLES:
        counts.add(table)
    return counts


def test_totals_are_those_of_the_tables():
    counts = counted()
    assert len(counts) == 3
    assert torch.equal(counts.total(), TABLES.sum(0))
    chosen = torch.tensor([False, True, True])
    assert torch.equal(counts.total(chosen), TABLES[chosen].sum(0))
    assert counts.annotated().tolist() == [5, 0, 5]


def test_an_image_more_counts_in_what_was_asked_for_before():
    counts = counted()
    before = counts.cells()
    assert counts.cells() is before, "joined once"
    counts.add(TABLES[2])
    assert torch.equal(counts.total(), TABLES.sum(0) + TABLES[2])
    assert counts.annotated().tolist() == [5, 0, 5, 5]


def test_only_cells_that_are_not_0_are_kept():
    assert [len(cells) for cells, _ in counted().images] == [2, 0, 2]
    image, cluster, label, pixels = counted().cells()
    table = torch.zeros_like(TABLES)
    table[image, cluster, label] = pixels
    assert torch.equal(table, TABLES)


def test_none_at_all():
    none = ImageCounts(3, 2)
    assert torch.equal(none.total(), torch.zeros(3, 2, dtype=torch.int64))
    assert none.annotated().tolist() == []


def test_merged_clusters_are_counted_together():
    merged = counted().merged(torch.tensor([0, 0]), 1)
    assert torch.equal(merged.total(), TABLES.sum((0, 1))[None])
    assert merged.annotated().tolist() == [5, 0, 5]
    swapped = counted().merged(torch.tensor([2, 0]), 3)
    assert torch.equal(swapped.total()[[2, 0]], TABLES.sum(0))
    assert not swapped.total()[1].any()
