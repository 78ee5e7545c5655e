"""The emulator computes what a GPU would, and reports every defect planted in a kernel."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import emulated

N = 250  # two blocks of 96 threads and a ragged one
X = np.arange(N, dtype=np.float32)
REVERSE = {"inputs": {"x": X}, "outputs": {"y": np.float32, "sum": np.float32}, "n": N}
COPY = {"inputs": {"x": X}, "outputs": {"y": np.float32}, "n": 128}


def test_barriers_shuffles_and_atomics(tmp_path):
    got = emulated.run("self_test", "reverse", tmp_path, **REVERSE, defect=0)
    np.testing.assert_array_equal(got["y"], X)
    assert got["sum"] == X.sum()


def test_asynchronous_copies(tmp_path):
    got = emulated.run("self_test", "copy", tmp_path, **COPY, defect=0)
    np.testing.assert_array_equal(got["y"], X[:128].reshape(4, 32)[:, ::-1].ravel())


def test_collectives(tmp_path):
    got = emulated.run("self_test", "collectives", tmp_path, inputs={}, outputs={"out": np.int32})
    lane = np.arange(32)
    bits = 1 << lane.astype(np.uint32)
    down = np.where((lane + 5) // 16 == lane // 16, lane + 5, lane)
    expected = [
        (lane // 2) ** 2,
        np.where(lane >= 3, lane - 3, lane),
        down,
        lane ^ 9,
        np.full(32, bits[lane % 3 == 0].sum()),
        np.ones(32),
        np.zeros(32),
        [bits[lane % 5 == i % 5].sum() for i in lane],
        np.full(32, lane.sum()),
        np.full(32, 7),
        np.where(lane < 4, 3 - lane, -1),
        np.full(32, 19),
    ]
    expected = np.stack([np.asarray(column).astype(np.int64) for column in expected], 1)
    np.testing.assert_array_equal(got["out"].reshape(32, 12), expected.astype(np.int32))


def test_tensor_cores(tmp_path):
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, shape).astype(np.float16) for shape in ((16, 16), (8, 16)))
    bits = {"a": a.view(np.uint16), "b": b.view(np.uint16)}
    got = emulated.run("self_test", "product_f16", tmp_path, inputs=bits, outputs={"c": np.float32})
    np.testing.assert_array_equal(got["c"].reshape(16, 8), (a @ b.T).astype(np.float32))


DEFECTS = {
    # name: (case, number, which variant must report it, what the report says)
    "missing barrier": (
        "reverse",
        1,
        "races",
        "race: .* in shared memory.*self_test.cpp|race: .* in shared memory.*device_twins.h",
    ),
    "missing second barrier": (
        "reverse",
        2,
        "races",
        "race: .* in shared memory.*self_test.cpp|race: .* in shared memory.*device_twins.h",
    ),
    "missing __syncwarp": (
        "copy",
        3,
        "races",
        "race: .* in shared memory.*self_test.cpp|race: .* in shared memory.*device_twins.h",
    ),
    "divergent barrier": ("reverse", 4, "checked", "divergent __syncthreads|deadlock"),
    "exited lane": ("reverse", 5, "checked", "__syncthreads .*exited|exits while others wait"),
    "global off by one": ("reverse", 6, "checked", "heap-buffer-overflow"),
    "shared off by one": ("reverse", 7, "checked", "out of bounds|heap-buffer-overflow"),
    "race that changes nothing": (
        "reverse",
        9,
        "races",
        "race: a write beside the write in shared",
    ),
    "race between blocks": ("reverse", 10, "races", "race: a write beside the write in global"),
    "missing wait": ("copy", 11, "races", "race: .* in shared"),
    "misaligned copy": ("copy", 12, "checked", "not aligned to 16"),
    "too much shared memory": ("copy", 13, "checked", "more dynamic shared memory than every GPU"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_reported(tmp_path, name):
    case, number, variant, report = DEFECTS[name]
    arguments = REVERSE if case == "reverse" else COPY
    with pytest.raises(emulated.Failed, match=report):
        emulated.run("self_test", case, tmp_path, **arguments, defect=number, variants=(variant,))


@pytest.mark.parametrize("number", [1, 8, 11])
def test_what_was_not_written_yet_is_seen_in_the_result(tmp_path, number):
    """Poisoned memory and the order of threads show it even without the race check."""
    case, arguments = ("copy", COPY) if number == 11 else ("reverse", REVERSE)

    def result(order, defect):
        return emulated.run(
            "self_test", case, tmp_path, **arguments, defect=defect, order=order,
            variants=("checked",),
        )["y"]  # fmt: skip

    expected = result("forward", 0)
    seen = [not np.array_equal(result(order, number), expected) for order in ("forward", "reverse")]
    assert any(seen)
