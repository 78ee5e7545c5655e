"""kill -9 at random moments of training: every checkpoint loads, and ``--resume`` comes to the
result of a run that nobody killed, to the bit.

``python -m tests.faults.kills --kills 200`` does it by hand.
"""

from __future__ import annotations

import argparse
import importlib
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nefkern import train
from nefkern.runtime.locks import NAME as LOCK
from nefkern.training.runs import CHECKPOINT, CLUSTERS, CONFIG, Run
from tests.faults.processes import Ended, Forked
from tests.training.outcomes import assert_same

for _late in (  # what training imports late: once, before processes are forked
    "nefkern.evaluation.report", "nefkern.segmentation.segmenter", "nefkern.training.spectral",
    "nefkern.training.trainer", "torch.utils.tensorboard",
):  # fmt: skip
    importlib.import_module(_late)

#: Seconds for a run of one or two.
PATIENCE = 300.0

_COMMON = (
    *("--data", "folder", "--backbone", "test_vit", "--weights", "random", "--crop", "64"),
    *("--pictures", "1", "--device", "cpu"),
)
_NEURAL = (
    *("--method", "neural", "--k", "8", "-K", "8", "--epochs", "3", "--batch-size", "2"),
    *("--workers", "0", "--heads", "3", "--mlp-hidden", "96", "--checkpoint-seconds", "0"),
)
METHODS = {
    "neural": _NEURAL,
    "spectral": ("--method", "spectral", "--k", "8", "-K", "5"),
    "teacher": (*_NEURAL, "--teacher", "spectral", "--no-gumbel", "--alpha", "0.1"),
    "edges": (*_NEURAL, "--edges", "dataset"),
    "loading": (*_NEURAL, "--workers", "1"),
}


def photographs(folder: Path, count: int = 6) -> Path:
    """So many small pictures."""
    folder.mkdir(parents=True)
    dice = np.random.default_rng(0)
    for number in range(count):
        coarse = dice.integers(0, 256, (6, 7, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((70 + number, 80), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.png")
    return folder


class Killing:
    """Runs of one method that are killed, again and again.

    Args:
        method: of :data:`METHODS`.
        folder: an empty one to work in.
        seed: of the moments.
    """

    def __init__(self, method: str, folder: Path, seed: int = 0) -> None:
        self.folder, self._dice = folder, random.Random(f"{seed} {method}")
        root = photographs(folder / "photos")
        self._arguments = [*_COMMON, *METHODS[method], "--data-root", str(root)]
        started = time.perf_counter()
        ended = self._start(folder / "whole").wait(PATIENCE)
        assert ended is not None, "the run that nobody kills has not ended"
        assert ended.code == 0, ended.text
        self._seconds = time.perf_counter() - started
        self.kills = self.finished = 0
        self.steps: Counter[str] = Counter()

    def _start(self, out: Path, *more: str) -> Forked:
        arguments = [*self._arguments, "--out", str(out), *more]
        return Forked(lambda: train.main(arguments))

    def survive(self, kills: int) -> None:
        """Kill so many times; every run that is then let be must end as the whole one did."""
        while self.kills < kills:
            out = self.folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            for attempt in range(100):
                last = self.kills >= kills
                ended = self._killed(out, attempt, spare=last)
                if ended is not None:
                    assert ended.code == 0, ended.text
                    break
                self._check(out)
            self._compare(out)

    def _killed(self, out: Path, attempt: int, *, spare: bool) -> Ended | None:
        """How a run ended by itself, or None if it was killed."""
        process = self._start(out, "--resume")
        patience = self._dice.uniform(0, 1.1 * self._seconds) * (1 + attempt / 10)
        ended = process.wait(PATIENCE if spare else patience)
        if ended is None:
            process.kill(signal.SIGKILL)
            ended = process.wait(PATIENCE)
            assert ended is not None
            if ended.code == -signal.SIGKILL:
                self.kills += 1
                return None
        return ended

    def _check(self, out: Path) -> None:
        """Whatever is there is whole."""
        run = Run(out)
        if run.path(CONFIG).exists():
            run.options()
        found = run.load() if run.path(CHECKPOINT).exists() else None
        self.steps["none" if found is None else found[1]["step"]] += 1
        if found and "state" in found[1]:
            run.load_state(found[1])
        for row in run.metrics():
            assert "step" in row

    def _compare(self, out: Path) -> None:
        whole = self.folder / "whole"
        assert_same(whole, out)
        names = [
            {path.name for path in folder.iterdir() if not path.name.startswith((".", "state-"))}
            for folder in (whole, out)
        ]
        assert names[0] <= names[1], names
        parts = [p for p in out.rglob(".*") if p.is_file() and p.name != LOCK]  # goes at exit
        assert not parts, parts
        if Run(whole).path(CLUSTERS).exists():
            first, second = (Run(folder).load_clusters() for folder in (whole, out))
            assert all(torch.equal(first[name], second[name]) for name in first)
        self.finished += 1


def main() -> None:
    """As many kills as are asked for, dealt out to the methods."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="in all [200]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments [0]")
    asked = parser.parse_args()
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            killing = Killing(method, Path(folder), asked.seed)
            killing.survive(-(-asked.kills // len(METHODS)))
            steps = ", ".join(f"{n} at {step}" for step, n in sorted(killing.steps.items()))
            found = f"{killing.kills} kills, {killing.finished} runs whole; {steps}"
            print(f"{method}: {found}", flush=True)


if __name__ == "__main__":
    main()
