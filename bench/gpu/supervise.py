"""A stage's cases through workers: what dies or hangs costs its own case, and no other."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu import process, tools
from bench.gpu.document import Document
from bench.gpu.plan import Settings, Stage

POLL = 0.02  # seconds
#: What a worker may take to import torch and to make itself at home on the device, once.
START = 60.0
#: Of the time that a stage had left after its cases, for those that are repeated.
REPEAT_SHARE, REPEAT_LIMIT = 0.5, 60.0
FAILED = ("failed", "crashed")  # what is repeated: a case that hung would hang again


class Worker:
    """One process that runs cases, as :mod:`bench.gpu.worker` describes.

    Attributes:
        case: that it is at; None: it waits for one, or is gone.
        begun: whether it has said so of its case.
        fresh: it has finished none yet.
    """

    def __init__(
        self,
        stage: Stage,
        settings: Settings,
        folder: Path,
        prefix: Sequence[str] = (),
        only: Sequence[str] = (),
    ) -> None:
        self.records = folder / "records"
        self.log = open(folder / "log", "w+b")  # noqa: SIM115  closed with the worker
        self.records.touch()
        self.reader = open(self.records, encoding="utf-8")  # noqa: SIM115
        self.rest = ""
        self.case: str | None = None
        self.patience, self.fresh = stage.patience, True
        self.process = process.start(
            [*prefix, sys.executable, "-m", "bench.gpu.worker", stage.module, self.records,
             json.dumps(asdict(settings)), *only],
            environment={
                **(tools.UNCACHED if prefix else {}),
                **({"CUDA_VISIBLE_DEVICES": ""} if settings.rehearsal else {}),
            },
            stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def give(self, case: str) -> None:
        self.case, self.begun, self.since = case, False, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it is gone, which the next look finds
            self.process.stdin.write(f"{case}\n".encode())
            self.process.stdin.flush()

    def news(self) -> list[dict[str, Any]]:
        """The records written since the last look."""
        self.rest += self.reader.read()
        *lines, self.rest = self.rest.split("\n")
        return [json.loads(line) for line in lines]

    @property
    def gone(self) -> bool:
        return self.process.poll() is not None

    @property
    def overdue(self) -> bool:
        limit = self.patience + (START if self.fresh else 0)
        return self.case is not None and time.monotonic() - self.since > limit

    def output(self) -> str:
        self.log.seek(0)
        return process.tail(self.log.read().decode(errors="replace"))

    def close(self) -> None:
        process.end(self.process)
        for file in (self.process.stdin, self.log, self.reader):
            with contextlib.suppress(OSError):
                file.close()


class Supervisor:
    """Runs one stage until its cases or its time are used up.

    Args:
        deadline: of the stage, on the monotonic clock.
    """

    def __init__(self, stage: Stage, settings: Settings, document: Document, deadline: float):
        self.stage, self.settings = stage, settings
        self.document, self.deadline = document, deadline
        self.waiting = deque(stage.cases)
        self.workers: list[Worker] = []

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            self.folder = Path(folder)
            try:
                self._serve()
            finally:
                for worker in self.workers:
                    worker.close()
            self._repeat()

    def _serve(self) -> None:
        while self.waiting or any(worker.case is not None for worker in self.workers):
            self._hire()
            time.sleep(POLL)
            for worker in list(self.workers):
                self._look_after(worker)
            if time.monotonic() > self.deadline:
                self._stop()

    def _hire(self) -> None:
        """A case to every worker without one, and as many workers as there may be."""
        for worker in self.workers:
            if worker.case is None and self.waiting and not worker.gone:
                worker.give(self.waiting.popleft())
        while self.waiting and len(self.workers) < self.stage.jobs:
            self.workers.append(self._worker())
            self.workers[-1].give(self.waiting.popleft())

    def _worker(self, prefix: Sequence[str] = (), only: Sequence[str] = ()) -> Worker:
        folder = tempfile.mkdtemp(dir=self.folder)
        return Worker(self.stage, self.settings, Path(folder), prefix, only)

    def _look_after(self, worker: Worker) -> None:
        gone = worker.gone  # before its news, which then are all
        self._take(worker)
        if worker.case is not None and gone and not worker.begun and not worker.fresh:
            self.waiting.appendleft(worker.case)  # it left as it was given the case
        elif worker.case is not None and gone:
            self._lost(worker, status="crashed", why=_how_it_ended(worker.process.returncode))
        elif worker.overdue:
            self._lost(worker, status="hung", why=f"ended after {worker.patience:.0f} s")
        elif not gone:
            return
        worker.close()
        self.workers.remove(worker)

    def _take(self, worker: Worker) -> None:
        for record in worker.news():
            case, status = record.pop("case"), record.get("status")
            worker.begun = worker.begun or status == "running"
            if status not in (None, "running"):
                worker.case, worker.fresh = None, False
            self.document.case(self.stage.name, case, **record)

    def _lost(self, worker: Worker, **facts: Any) -> None:
        self.document.case(self.stage.name, worker.case, **facts, output=worker.output())
        worker.case = None

    def _stop(self) -> None:
        """The stage's time is up."""
        for worker in self.workers:
            self._take(worker)
            if worker.case is not None:
                self._lost(worker, status="stopped", why="the stage's time was up")
        for case in self.waiting:
            self.document.case(
                self.stage.name, case, status="not reached", why="the stage's time was up"
            )
        self.waiting.clear()

    # ---- failed cases, once more ----

    def _repeat(self) -> None:
        """Each failed case alone; under compute-sanitizer's memcheck where it can be."""
        cases = self.document.stage(self.stage.name)["cases"]
        failed = [name for name, case in cases.items() if case.get("status") in FAILED]
        prefix, how = tools.memcheck(self.settings)
        until = time.monotonic() + REPEAT_SHARE * (self.deadline - time.monotonic())
        for name in failed[: self.stage.repeats]:
            left = min(REPEAT_LIMIT, until - time.monotonic())
            if left < 1:
                return
            self.document.case(self.stage.name, name, repeated=self._alone(name, prefix, how, left))

    def _alone(self, case: str, prefix: Sequence[str], how: str, limit: float) -> dict[str, Any]:
        worker, found = self._worker(prefix, [case]), {"how": how, "status": "running"}
        end = time.monotonic() + limit
        while not (gone := worker.gone) and time.monotonic() < end:
            time.sleep(POLL)
        for record in worker.news():
            found |= {key: record[key] for key in ("status", "why") if key in record}
        if gone and found["status"] == "running":
            found |= {"status": "crashed", "why": _how_it_ended(worker.process.returncode)}
        elif not gone:
            found |= {"status": "hung", "why": f"ended after {limit:.0f} s"}
        found["output"] = worker.output()
        worker.close()
        return found


def _how_it_ended(code: int | None) -> str:
    return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
