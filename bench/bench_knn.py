"""knn against the bare matrix product, PyTorch, faiss and scikit-learn, on clustered features."""

from __future__ import annotations

import math

import torch

from bench.harness import DEVICE, Work, on_reference, opponent, tf32
from nefkern.ops import knn

# rows, channels, neighbours
COSINE = {"small": (256, 64, 16), "paper": (14400, 384, 256), "large": (57600, 384, 256)}
# images, rows an image, neighbours: positions and colours, 5 channels
PIXELS = {"small": (2, 256, 5), "paper": (16, 900, 10), "large": (64, 900, 10)}
# queries, rows of the database, channels, neighbours
DATABASE = {
    "small": (256, 1000, 64, 16),
    "paper": (14400, 64000, 384, 64),
    "large": (57600, 256000, 384, 64),
}
DENSE_BYTES = 4 << 30  # opponents that hold N x N stay out above this
PRODUCT_BYTES = 256 << 20  # of a part of the queries' products with a database


def clustered(n: int, channels: int, clusters: int = 60) -> torch.Tensor:
    """[n, channels] rows around a few centres, as the features of image patches are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, channels, generator=generator)
    which = torch.randint(clusters, (n,), generator=generator)
    return (centres[which] + torch.randn(n, channels, generator=generator)).to(DEVICE)


def assert_right(x, k, metric, segments=None, database=None):
    """The k-th value of some rows, and the neighbours' own values, against float64."""
    values, indices = knn(x, k, metric=metric, segments=segments, database=database)
    n, rows = len(x), x if database is None else database
    bounds = torch.tensor([0, n]) if segments is None else segments.cpu()
    points, others = x.double(), rows.double()
    if metric == "cosine":
        points, others = (torch.nn.functional.normalize(each) for each in (points, others))
    for i in range(0, n, max(1, n // 16)):
        s = int((bounds[1:] <= i).sum())
        begin, end = (0, len(rows)) if segments is None else (int(bounds[s]), int(bounds[s + 1]))
        if metric == "cosine":
            scores = others[begin:end] @ points[i]
        else:
            scores = -(others[begin:end] - points[i]).norm(dim=1)
        if database is None:
            scores[i - begin] = -math.inf
        best = scores.sort(descending=True).values[:k]
        sign = 1 if metric == "cosine" else -1
        torch.testing.assert_close(sign * values[i].double(), best, atol=2e-6, rtol=2e-6)
        own = scores[indices[i].long() - begin]
        torch.testing.assert_close(own, best, atol=2e-6, rtol=2e-6)


def work_of(n: int, channels: int, k: int, images: int = 1, selection: str = "bfloat16") -> Work:
    """Every pair of an image once, to choose; the chosen once more in float32, for their values."""
    rank = {"float32": 2.0 * n * k * channels} if selection != "float32" else {}
    pairs = n * (n / images) / 2
    return Work(4.0 * n * channels + 8.0 * n * k, {selection: 2 * pairs * channels} | rank)


def test_cosine(race, size):
    n, channels, k = COSINE[size]
    x = clustered(n, channels)
    assert_right(x, k, "cosine")
    contestants = {"nefkern": lambda: knn(x, k)}
    if 4 * n * n <= DENSE_BYTES:
        unit = torch.nn.functional.normalize(x)
        product = torch.empty(n, n, device=DEVICE)
        contestants["torch.mm alone"] = lambda: torch.mm(unit, unit.T, out=product)
        contestants["torch.mm + topk"] = lambda: torch.mm(unit, unit.T).topk(k)
        contestants |= tensor_core_products(unit, k)
        contestants |= sklearn_brute(x, k)
    contestants |= faiss_flat(x, k)
    contestants["reference"] = on_reference(lambda: knn(x, k))
    sizes = {"N": n, "C": channels, "k": k}
    race("knn, cosine", contestants, sizes=sizes, work=work_of(n, channels, k))


def test_euclidean(race, size):
    n, channels, k = COSINE[size]
    x = clustered(n, channels)
    assert_right(x, k, "euclidean")
    contestants = {"nefkern": lambda: knn(x, k, metric="euclidean")}
    contestants |= faiss_flat(x, k, metric="euclidean")
    if size == "small":
        contestants["reference"] = on_reference(lambda: knn(x, k, metric="euclidean"))
    sizes = {"N": n, "C": channels, "k": k}
    race("knn, euclidean", contestants, sizes=sizes, work=work_of(n, channels, k))


def test_database(race, size):
    """Queries in a database: nothing is symmetric, so the bare product is the floor."""
    n, m, channels, k = DATABASE[size]
    rows = clustered(n + m, channels)
    x, y = rows[:n].clone(), rows[n:].clone()
    assert_right(x, k, "cosine", database=y)
    unit, others = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    step = max(1, min(n, PRODUCT_BYTES // (4 * m)))
    product = torch.empty(step, m, device=DEVICE)

    def products(then=lambda scores: None):
        for part in unit.split(step):
            then(torch.mm(part, others.T, out=product[: len(part)]))

    contestants = {
        "nefkern": lambda: knn(x, k, database=y),
        "torch.mm alone": products,
        "torch.mm + topk": lambda: products(lambda scores: scores.topk(k)),
        **faiss_flat(x, k, database=y),
    }
    if size == "small":
        contestants["reference"] = on_reference(lambda: knn(x, k, database=y))
    selected = {"bfloat16": 2.0 * n * m * channels, "float32": 2.0 * n * k * channels}
    race(
        "knn in a database",
        contestants,
        sizes={"N": n, "M": m, "C": channels, "k": k},
        work=Work(4.0 * (n + m) * channels + 8.0 * n * k, selected),
    )


def test_pixels(race, size):
    images, patches, k = PIXELS[size]
    x = torch.rand(images * patches, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    segments = torch.arange(images + 1, device=DEVICE) * patches
    options = {"metric": "euclidean", "segments": segments}
    assert_right(x, k, **options)
    ours = lambda: knn(x, k, **options)  # noqa: E731
    race(
        "knn, 5 channels in segments",
        {"nefkern": ours, "reference": on_reference(ours)},
        sizes={"N": len(x), "C": 5, "k": k, "segments": images},
        work=work_of(len(x), 5, k, images, selection="float32"),
    )


def tensor_core_products(unit, k):
    """What one writes for a GPU where the neighbours need not be exact."""
    if DEVICE.type != "cuda":
        return {}
    half = unit.bfloat16()

    def rounded():
        with tf32(True):
            return torch.mm(unit, unit.T).topk(k)

    return {
        "torch.mm bfloat16 + topk": lambda: torch.mm(half, half.T).topk(k),
        "torch.mm TF32 + topk": rounded,
    }


def faiss_flat(x, k, metric="cosine", database=None):
    """Search of an exact index that is built beforehand; of the rows themselves, self included, so
    k + 1 are searched. None on a GPU: faiss-cpu has nothing for it."""
    if DEVICE.type != "cpu" or not (faiss := opponent("faiss", "faiss-cpu")):
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    cosine = metric == "cosine"
    found = k if database is not None else k + 1
    x, rows = (
        (torch.nn.functional.normalize(each) if cosine else each).numpy()
        for each in (x, x if database is None else database)
    )
    index = (faiss.IndexFlatIP if cosine else faiss.IndexFlatL2)(x.shape[1])
    index.add(rows)
    return {f"faiss {type(index).__name__}": lambda: index.search(x, found)}


def sklearn_brute(x, k):
    if DEVICE.type != "cpu" or not (neighbors := opponent("sklearn.neighbors", "scikit-learn")):
        return {}
    search = neighbors.NearestNeighbors(
        n_neighbors=k, algorithm="brute", metric="cosine", n_jobs=torch.get_num_threads()
    ).fit(x.numpy())
    return {"scikit-learn brute": lambda: search.kneighbors()}
