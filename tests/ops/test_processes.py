"""The same results at any number of threads, in threads, in forked and spawned processes; and no
growth over thousands of calls."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nefkern import ops
from tests.ops.graph_common import on_threads, random_graph, random_lists

PATIENCE = 300  # seconds, for a busy machine


def calls(n: int, channels: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Every public operator on ``n`` rows, by name."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, channels, generator=generator) for _ in range(2))
    indices, weights = random_lists(n, 6)
    near, _ = random_lists(n, 3)
    graph, other = random_graph(n, 5), random_graph(n, 3)
    q = torch.randn(2, 2, n, 16, generator=generator)
    return {
        "knn": lambda: ops.knn(x, 7),
        "knn euclidean": lambda: ops.knn(x, 7, metric="euclidean", database=y),
        "neighbour_similarities": lambda: (ops.neighbour_similarities(x, indices),),
        "normalized_adjacency": lambda: ops.normalized_adjacency(
            indices, weights, num_nodes=n
        ).tensors(),
        "kappa": lambda: ops.kappa(indices, weights, near, num_nodes=n).tensors(),
        "feature_kappa": lambda: ops.feature_kappa(x, 7, pixel_indices=near).tensors(),
        "add": lambda: ops.add(graph, other, 0.3).tensors(),
        "spmm": lambda: (ops.spmm(graph, x),),
        "sddmm": lambda: (ops.sddmm(graph, x, y),),
        "quadratic_form": lambda: (ops.quadratic_form(x, graph),),
        "neuralef_loss": lambda: ops.neuralef_loss(x, graph, 0.08),
        "linear_attention elu": lambda: (ops.linear_attention(q, q, q),),
        "linear_attention softmax": lambda: (ops.linear_attention(q, q, q, feature_map="softmax"),),
    }


NAMES = tuple(calls(2, 2))
#: Dense products of PyTorch's, whose sums are cut by threads.
BY_PYTORCH = ("quadratic_form", "neuralef_loss")


def test_every_operator_is_here():
    assert {name.split()[0] for name in NAMES} == set(ops.__all__) - {"CSRGraph"}


def assert_equal(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        if name in BY_PYTORCH:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_does_not_matter(name):
    first, *others = on_threads(calls(700, 48)[name], (1, 2, 4, 8))
    for other in others:
        assert_equal(name, other, first)


def test_in_threads_of_one_process():
    """All operators at once, each thread in another order."""
    made = calls(300, 32)
    expected = {name: made[name]() for name in NAMES}

    def work(first: int) -> None:
        for name in (*NAMES[first:], *NAMES[:first]) * 3:
            assert_equal(name, made[name](), expected[name])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


FORKED = """
import os, sys, torch
import tests.ops.test_processes as here

torch.set_num_threads(4)
made = here.calls(700, 48)
expected = {name: made[name]() for name in here.NAMES}
(torch.randn(900, 900) @ torch.randn(900, 900)).sum()
child = os.fork()
if child == 0:
    for name in here.NAMES:
        here.assert_equal(name, made[name](), expected[name])
    psi = torch.randn(700, 8, requires_grad=True)
    here.ops.neuralef_loss(psi, here.random_graph(700, 5), 0.1)[0].backward()
    (torch.randn(900, 900) @ torch.randn(900, 900)).sum()
    assert torch.get_num_threads() == 1
    os._exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert torch.get_num_threads() == 4
for name in here.NAMES:
    here.assert_equal(name, made[name](), expected[name])
sys.exit(code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_child_forked_after_its_parent_computed():
    """OpenMP's threads do not come along, and waiting for them has no end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKED], timeout=PATIENCE, env=environment)
    assert done.returncode == 7


def _spawned(queue) -> None:
    torch.set_num_threads(2)
    made = calls(200, 16)
    queue.put({name: [t.numpy() for t in made[name]()] for name in NAMES})


def test_in_a_spawned_process():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_spawned, args=(queue,))
    child.start()
    found = queue.get(timeout=PATIENCE)
    child.join()
    made = calls(200, 16)
    for name in NAMES:
        assert_equal(name, tuple(map(torch.from_numpy, found[name])), made[name]())


def resident() -> int:
    """Bytes of this process's memory that are in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_calls_without_growth(name):
    call = calls(20, 8)[name]
    for _ in range(1000):
        call()
    gc.collect()
    before, handles = resident(), len(os.listdir("/proc/self/fd"))
    for _ in range(10_000):
        call()
    gc.collect()
    assert resident() - before < 4 << 20, "a leak of 400 bytes a call would be seen"
    assert len(os.listdir("/proc/self/fd")) <= handles


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_errors_and_gradients_without_growth():
    graph, lists = random_graph(20, 4), random_lists(20, 3)
    psi = torch.randn(20, 4, requires_grad=True)

    def call() -> None:
        ops.neuralef_loss(psi, graph, 0.1)[0].backward()
        psi.grad = None
        with pytest.raises(ValueError, match="k:"):
            ops.knn(psi.detach(), -1)
        with pytest.raises(ValueError, match="indices"):
            ops.normalized_adjacency(lists[0] + 1000, num_nodes=20)

    for _ in range(300):
        call()
    gc.collect()
    before = resident()
    for _ in range(3000):
        call()
    gc.collect()
    assert resident() - before < 4 << 20
