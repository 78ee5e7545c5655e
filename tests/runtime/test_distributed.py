"""Several processes against one: the same training, the same scores, and ends that all agree on.

Run as a program this file is one of the processes: it goes through :data:`CASES`, and the tests
look at what that left. One start for all of them, because a process takes seconds to import torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nefkern.data import TrainTransform, View, Views, open_dataset, train_loader
from nefkern.evaluate import main as evaluate
from nefkern.ops import CSRGraph
from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError
from nefkern.spectral.objective import objective
from nefkern.training.options import TrainOptions
from nefkern.training.runs import METRICS, Run
from nefkern.training.step import TrainingStep
from nefkern.training.trainer import Trainer

RANKS, PATIENCE = 2, 300  # seconds, for a busy machine
# Adam divides a gradient by its own size: where that is all but zero, rounding decides what part of
# a step of 1e-3 is taken. Other noise, images or edges change weights by whole steps.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}


def options(folder: Path, name: str, **changes) -> TrainOptions:
    """A run of two epochs of two steps, four images each."""
    result = TrainOptions(
        data="folder", data_root=str(folder / "photos"), out=str(folder / name),
        backbone="test_vit", weights="random", crop=64, k="8", num_eigenfunctions=8,
        heads=3, mlp_hidden=96, epochs=2, batch_size=4, workers=0, pictures=0,
        checkpoint_seconds=1000.0, device="cpu",
    )  # fmt: skip
    for option, value in changes.items():
        assert hasattr(result, option), option
        setattr(result, option, value)
    result.check()
    return result


def train(chosen: TrainOptions) -> Trainer:
    run = distributed.from_main(lambda: Run.create(chosen))
    trainer = Trainer(chosen, run)
    trainer.train()
    return trainer


# ---- what the processes do; every function is called in each of them


def interrupt_in_step(step: int, who: int) -> contextlib.AbstractContextManager:
    """Process ``who`` gets a signal in the course of a step, twice as from a scheduler."""
    original = TrainingStep.__call__

    def stepping(self, images, progress, number, *graph):
        if number == step and distributed.rank() == who:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, images, progress, number, *graph)

    return replaced(TrainingStep, "__call__", stepping)


def fail_in_features(who: int, when: Callable[[TrainingStep, int], bool], error: Callable):
    """The backbone of process ``who`` raises ``error()`` where ``when(step, images)``."""
    original = TrainingStep.accumulate

    def accumulate(self, images, temperature, *graph):
        if distributed.rank() != who or not when(self, len(images)):
            return original(self, images, temperature, *graph)

        def features(images):
            raise error()

        with replaced(self, "features", features):
            return original(self, images, temperature, *graph)

    return replaced(TrainingStep, "accumulate", accumulate)


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def ending(action: Callable[[], object]) -> str:
    """How ``action`` ends: its error in a line."""
    try:
        action()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


RUNS = {
    "global": {"graph_scope": "global"},
    "global-all": {"graph_scope": "global", "graph_features": "all", "standardize": True},
    "global-continuous": {"graph_scope": "global", "gumbel": False, "min_norm": 3.0, "beta": 50.0},
    "global-accumulate": {"graph_scope": "global", "accumulate": 2, "batch_size": 2},
    "global-amp": {"graph_scope": "global", "amp": True},
    "rank": {},
    "rank-continuous": {"gumbel": False},
    "rank-accumulate": {"accumulate": 2, "batch_size": 2, "views": 1},
}


def trainings(folder: Path) -> None:
    for name, changes in RUNS.items():
        check_alike(train(options(folder, f"{name}-2", **changes)))


def check_alike(trainer: Trainer) -> None:
    """ψ, to the bit, and the generators are the same in all processes."""
    weights = torch.cat([p.detach().flatten() for p in trainer.psi.parameters()])
    for mine in (weights, torch.get_rng_state()):
        for other in distributed.gather_rows(mine[None]):
            assert torch.equal(mine, other)


def resuming(folder: Path) -> None:
    for name, changes in (("resume-global", RUNS["global"]), ("resume-rank", RUNS["rank"])):
        with interrupt_in_step(3, who=1):
            end = ending(lambda n=name, c=changes: train(options(folder, n, **c)))
        note(folder, f"{name}-interrupted", end)
        torch.manual_seed(100 + distributed.rank())
        train(options(folder, name, resume=True, **changes))


def memory(folder: Path) -> None:
    def too_many(step: TrainingStep, images: int) -> bool:
        return images > 1 and len(step.optimizer.state) > 0  # not in the first step

    with fail_in_features(1, too_many, MemoryError):
        check_alike(train(options(folder, "memory-rank")))
        chosen = options(folder, "memory-global", graph_scope="global")
        note(folder, "memory-global", ending(lambda: train(chosen)))


def mistakes(folder: Path) -> None:
    """What ends all processes, whichever it happens in; none may wait for another in vain."""
    for scope in ("rank", "global"):
        chosen = options(folder, f"mistake-{scope}", graph_scope=scope)
        with fail_in_features(1, lambda step, images: True, lambda: UserError("no such light")):
            note(folder, f"mistake-{scope}", ending(lambda c=chosen: train(c)))
    with replaced(Views, "view", unreadable_in_the_second):
        note(folder, "unreadable", ending(lambda: train(options(folder, "unreadable"))))
    odd = options(folder, "odd", batch_size=3)
    note(folder, "odd", ending(lambda: train(odd)))
    note(folder, "taken", ending(lambda: train(options(folder, "rank-2"))))


def unreadable_in_the_second(self, epoch: int, index: int):
    if distributed.rank() == 1:
        raise UserError("photograph.jpg: torn")
    return View(index, torch.zeros(3, 64, 64, dtype=torch.uint8))


def evaluation(folder: Path) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert evaluate(scoring(folder)) == 0
    note(folder, "evaluation", out.getvalue())


def scoring(folder: Path) -> list[str]:
    """K-means on a sample, its online pass, and ψ; of seven images one process gets four."""
    methods = ["--methods", "ours,ours*,kmeans-concat", "--sample-rows", "20"]
    data = ["--data-root", str(folder / "photos"), "--split", "train", "--limit", "7"]
    return [str(folder / "rank-2"), *data, "--size", "48", "--device", "cpu", *methods]


def sums(folder: Path) -> None:
    """The shared objective in float64, value and gradient, against the rows of all."""
    psi, graph = problem()
    rows = distributed.own_rows(len(psi))
    mine = psi[rows].clone().requires_grad_()
    parts = objective(mine, graph, beta=50.0, minimum=1.0, shared=True)
    parts.loss.backward()
    torch.save(
        {
            "loss": parts.loss.detach(),
            "grad": distributed.gather_rows(mine.grad),
            "dead": parts.dead,
        },
        folder / f"sums-{distributed.rank()}.pt",
    )


def problem() -> tuple[torch.Tensor, CSRGraph]:
    """ψ's outputs [12, 5] with a dead and a zero column, and a dense symmetric κ."""
    generator = torch.Generator().manual_seed(0)
    psi = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    psi = psi * torch.tensor([2.0, 1e-3, 0.0, 1.0, 3.0], dtype=torch.float64)
    kernel = torch.rand(12, 12, generator=generator, dtype=torch.float64)
    kernel[4], kernel[:, 4] = 0, 0  # an empty row
    return psi, CSRGraph.from_torch((kernel + kernel.T) / 2, symmetric=True)


def note(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.{distributed.rank()}.txt").write_text(text)


CASES = (sums, trainings, evaluation, resuming, memory, mistakes)


def program(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with distributed.process_group("cpu"):
        if Path("/proc/self/task").exists() and torch.__version__ >= (2, 11):  # they have a name
            assert any("gloo" in name for name in threads())
        for case in CASES:
            started = time.monotonic()
            case(folder)
            print(f"{case.__name__}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    # What is left of them when the interpreter ends can abort the process.
    assert not [name for name in threads() if "gloo" in name]


def threads() -> list[str]:
    """Names of this process's threads, where the system tells."""
    return [path.read_text("utf-8") for path in Path("/proc/self/task").glob("*/comm")]


def start(folder: Path) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]


# ---- what one process does, and the comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photograph) -> Path:
    """What two processes left of all cases; their error output is in the ``log`` files."""
    folder = tmp_path_factory.mktemp("ranks")
    images, masks = (folder / "photos" / kind / "train" for kind in ("images", "annotations"))
    images.mkdir(parents=True), masks.mkdir(parents=True)
    (folder / "photos" / "classes.txt").write_text("dark\nmiddle\nbright")
    for number in range(10):
        picture = photograph(70 + 3 * number, 90 - 2 * number, number)
        picture.save(images / f"{number}.png")
        picture.convert("L").point(lambda value: value // 86).save(masks / f"{number}.png")
    processes = start(folder)
    for rank, process in enumerate(processes):
        _, err = process.communicate(timeout=PATIENCE)
        (folder / f"log.{rank}").write_text(err)
    assert [process.returncode for process in processes] == [0] * RANKS, err
    return folder


def said(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}.{rank}.txt").read_text("utf-8") for rank in range(RANKS)]


def outcome(path: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    rows = Run(path).metrics()
    for row in rows:
        del row["images_per_second"], row["input_wait"]
    return Run(path).load()[0], rows


def assert_close(first: Path, second: Path, rel: float = 1e-5, **tolerance: float) -> None:
    """The same record and weights, to rounding."""
    (weights, rows), (others, other_rows) = outcome(first), outcome(second)
    assert len(rows) == len(other_rows) == 4
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name] == pytest.approx(other[name], rel=rel, abs=1e-9), (row["step"], name)
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, others[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def test_the_shared_objective_is_that_of_all_rows(folder):
    psi, graph = problem()
    psi.requires_grad_()
    parts = objective(psi, graph, beta=50.0, minimum=1.0)
    parts.loss.backward()
    for rank in range(RANKS):
        shared = torch.load(folder / f"sums-{rank}.pt")
        torch.testing.assert_close(shared["loss"], parts.loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(shared["grad"], psi.grad, rtol=1e-10, atol=1e-16)
        assert shared["dead"] == parts.dead == 2


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("global")])
def test_global_scope_equals_one_process(folder, name):
    train(options(folder, f"{name}-1", **{**RUNS[name], "graph_scope": "rank"}))
    one, two = folder / f"{name}-1", folder / f"{name}-2"
    if name != "global-amp":
        assert_close(one, two, **ROUNDING)
        return
    # Adam moves a weight whose gradient is all rounding by lr a step, whichever way: four steps.
    assert_close(one, two, rel=1e-2, rtol=0, atol=4e-3)
    (weights, _), (others, _) = outcome(one), outcome(two)
    for key, tensor in weights.items():
        share = 0.1 if key.endswith("bias") else 1e-2  # from zero, a bias is all movement
        assert (tensor - others[key]).norm() <= share * tensor.norm(), key


def test_rank_scope_is_accumulation_over_the_processes_graphs(folder):
    train(options(folder, "one", accumulate=2, batch_size=2, **RUNS["rank-continuous"]))
    assert_close(folder / "one", folder / "rank-continuous-2", **ROUNDING)


def test_two_processes_share_a_batch(folder):
    dataset = open_dataset("folder", root=folder / "photos", split="train")

    def batches(shard: tuple[int, int]) -> list[torch.Tensor]:
        loader = train_loader(dataset, TrainTransform(64, 64), batch_size=4, shard=shard)
        loader.set_epoch(1)
        return list(loader)

    both = [torch.cat(pair) for pair in zip(batches((0, 2)), batches((1, 2)), strict=True)]
    assert len(both) == 2
    assert all(map(torch.equal, both, batches((0, 1))))
    for batch_size, shard in ((3, (0, 2)), (4, (2, 2)), (12, (0, 2))):
        with pytest.raises(ValueError, match="shard: expected"):
            train_loader(dataset, TrainTransform(64, 64), batch_size=batch_size, shard=shard)


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_resuming_equals_never_having_stopped(folder, scope):
    main, other = said(folder, f"resume-{scope}-interrupted")
    assert main.startswith("KeyboardInterrupt: the checkpoint after step 3 is written")
    assert other == "SystemExit: 130"
    (weights, rows), (others, other_rows) = (
        outcome(folder / name) for name in (f"{scope}-2", f"resume-{scope}")
    )
    assert rows == other_rows
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_memory_that_runs_out_in_one_process_halves_the_batch_of_all(folder):
    rows = outcome(folder / "memory-rank")[1]
    assert [row["step"] for row in rows] == list(range(1, 10))  # one of 4 images, then 3 + 5 of 2
    for end in said(folder, "memory-global"):
        assert end.startswith("UserError: out of memory: with several processes the batch")


def test_a_mistake_in_one_process_ends_all_and_is_told_once(folder):
    for scope in ("rank", "global"):
        assert said(folder, f"mistake-{scope}") == ["SystemExit: 2", "UserError: no such light"]
    assert said(folder, "unreadable") == ["SystemExit: 2", "UserError: photograph.jpg: torn"]
    odd, quiet = said(folder, "odd")
    assert odd.startswith("UserError: --batch-size 3: expected a multiple of 2, the number of")
    taken, silent = said(folder, "taken")
    assert "holds a run already" in taken
    assert quiet == silent == "SystemExit: 2"


def test_the_main_process_alone_writes_and_shows(folder):
    first, second = ((folder / f"log.{rank}").read_text("utf-8") for rank in range(RANKS))
    assert "epoch 2/2" in first
    assert "resumed" in first
    assert "epoch" not in second
    assert "resumed" not in second
    assert len(list((folder / "rank-2" / "events").iterdir())) == 1


@pytest.mark.drawn
def test_evaluation_counts_exactly_what_one_process_counts(folder, capsys):
    (path,) = (folder / "rank-2").glob("evaluation-*.json")
    found = json.loads(path.read_text("utf-8"))
    drawn = {file.name: file.read_bytes() for file in path.with_suffix("").iterdir()}
    assert evaluate(scoring(folder)) == 0
    assert drawn == {file.name: file.read_bytes() for file in path.with_suffix("").iterdir()}
    assert len([name for name in drawn if name.endswith(".png")]) == 7
    assert said(folder, "evaluation") == [capsys.readouterr().out, ""]
    again = json.loads(path.read_text("utf-8"))
    del found["seconds"], again["seconds"]
    assert found == again
    assert found["images"] == 7


# ---- one process, without torch.distributed


def test_alone_everything_is_agreed():
    assert (distributed.rank(), distributed.ranks(), distributed.local_rank()) == (0, 1, 0)
    x = torch.arange(3)
    for function in (distributed.gather_rows, distributed.total, distributed.largest):
        assert function(x) is x
    with pytest.raises(UserError, match="as it is"), distributed.together():
        raise UserError("as it is")
    assert not distributed.any_rank(False)
    assert distributed.from_main(lambda: 7) == 7


def test_accumulated_graphs_have_objectives_of_their_own(folder):
    """Two batches a step: the record is their mean, and the gradient that of the mean loss."""
    chosen = options(folder, "accumulated", accumulate=2, batch_size=2, gumbel=False)
    trainer = Trainer(chosen, Run.create(chosen))
    images = next(iter(trainer._images(trainer._batches())))
    assert len(images) == 4
    losses, gradients = [], []
    for batch in images.chunk(2):
        trainer.psi.zero_grad()
        losses.append(trainer.step.accumulate(batch, 1.0).figures[0].item())
        gradients.append([p.grad.clone() for p in trainer.psi.parameters()])
    row = trainer.step(images, 0.0, 1).row()
    assert losses[0] != losses[1]
    assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    for parameter, first, second in zip(trainer.psi.parameters(), *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, first + second, rtol=1e-4, atol=1e-10)
    too_many = options(folder, "too-many", accumulate=3)
    with pytest.raises(UserError, match="--accumulate 3: expected at most 2, the batches of an"):
        Trainer(too_many, Run.create(too_many))


def test_accumulation_resumes(folder):
    changes = {"accumulate": 2, "batch_size": 2}
    train(options(folder, "whole", **changes))
    with interrupt_in_step(3, who=0), pytest.raises(KeyboardInterrupt):
        train(options(folder, "broken", **changes))
    train(options(folder, "broken", resume=True, **changes))
    (weights, rows), (others, other_rows) = outcome(folder / "whole"), outcome(folder / "broken")
    assert rows == other_rows
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.long
def test_compiled_psi_trains_as_it_is(folder):
    changes = {"blocks": 1, "epochs": 1}
    train(options(folder, "plain", **changes))
    trainer = train(options(folder, "compiled", compile=True, **changes))
    assert trainer.step.logits is not trainer.psi
    (weights, rows), (others, other_rows) = outcome(folder / "plain"), outcome(folder / "compiled")
    assert weights.keys() == others.keys(), "the checkpoint does not tell"
    for row, other in zip(rows, other_rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-4)


# ---- torchrun


def test_torchrun_trains_and_stops_when_told(folder):
    out = folder / "torchrun"
    command = (
        "-m torch.distributed.run --standalone --nproc_per_node=2 -m nefkern.train --data folder "
        "--backbone test_vit --weights random --crop 64 --k 8 -K 8 --epochs 5000 --batch-size 4 "
        "--workers 0 --graph-scope global --device cpu"
    )
    where = ["--data-root", str(folder / "photos"), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, *command.split(), *where],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    deadline = time.monotonic() + PATIENCE
    while len(Run(out).metrics()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    rows = Run(out).metrics()
    assert len(rows) >= 3, err
    assert err.count(f"interrupted: the checkpoint after step {len(rows)} is written") == 1, err
    assert Run(out).load()[1]["step"] == str(len(rows))
    # The launcher's own end, after which it dumps its threads, is PyTorch's matter.
    assert not re.search(r"terminate called.*\n(?!Fatal Python error)", err), err
    assert "--resume goes on" in err
    assert (out / METRICS).read_text("utf-8").endswith("}\n")
    assert Run(out).config()["processes"] == 2


if __name__ == "__main__":
    program(Path(sys.argv[1]))
