"""Hours of the same work: memory and open files must stay where they were.

``python -m tests.faults.soak train --seconds 3600`` trains ψ at the paper's size (batches of 16
images of 480², K = 256) for an hour; ``python -m tests.faults.soak segment --images 10000``
segments so many pictures in one command. Both watch the command and its children from outside and
end with status 1 where something grew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

#: What may change between the second quarter of the time and the last, and is not growth: the
#: allocator's moods, a page cache of a mapped file.
TOLERANCE_MIB = 64.0
TOLERANCE_SHARE = 0.05


@dataclass(frozen=True)
class Sample:
    """What a command and its children hold at one moment; ``mebibytes`` are their own alone."""

    seconds: float
    mebibytes: float
    files: int
    threads: int
    processes: int

    def __str__(self) -> str:
        return (
            f"{self.seconds:7.0f} s {self.mebibytes:7.0f} MiB {self.files:4} files"
            f" {self.threads:3} threads {self.processes} processes"
        )


@dataclass(frozen=True)
class Growth:
    """:func:`high` of the second quarter of the samples, and of the last."""

    quantity: str
    early: float
    late: float
    allowed: float

    @property
    def found(self) -> bool:
        """Whether there was more of it at the end than chance explains."""
        return self.late - self.early > self.allowed


def tree(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    found = [pid]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text("utf-8").split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def sample(pid: int, began: float) -> Sample | None:
    """What is held now; None: the process is gone."""
    pages = files = threads = processes = 0
    for one in tree(pid):
        folder = Path(f"/proc/{one}")
        try:
            _, resident, shared, *_ = (folder / "statm").read_text("utf-8").split()
            files += len(os.listdir(folder / "fd"))
            threads += len(os.listdir(folder / "task"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        pages += int(resident) - int(shared)
        processes += 1
    if not processes or not pages:
        return None
    mebibytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Sample(time.monotonic() - began, mebibytes, files, threads, processes)


def high(values: list[float]) -> float:
    """What a tenth of the values are above. A step's memory rises and falls by a gigabyte: the
    median tells in which of its parts samples were taken, not what is held."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1]


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Memory, files and threads, the last quarter against the second: the first is the warm-up.

    Raises:
        ValueError: of fewer than eight samples nothing can be said.
    """
    if len(samples) < 8:
        raise ValueError(f"samples: expected at least 8, got {len(samples)}")
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    result = []
    for quantity, slack in (("mebibytes", None), ("files", 2.0), ("threads", 2.0)):
        first, last = (high([getattr(s, quantity) for s in q]) for q in (early, late))
        allowed = max(TOLERANCE_MIB, TOLERANCE_SHARE * first) if slack is None else slack
        result.append(Growth(quantity, first, last, allowed))
    return result


def watched(command: list[str], seconds: float | None, every: float) -> Iterator[Sample]:
    """Samples of a command that runs to its end, or is asked to end after so many seconds.

    Raises:
        RuntimeError: the command failed.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        asked = False
        while process.poll() is None:
            one = sample(process.pid, began)
            if one is not None and not asked:
                yield one
            if seconds is not None and not asked and time.monotonic() - began > seconds:
                process.send_signal(signal.SIGTERM)
                asked = True
            time.sleep(every)
        ended_well = process.returncode == 0 or (asked and process.returncode in (130, 143))
        if not ended_well:
            said.seek(0)
            text = said.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"status {process.returncode}: {text[-1] if text else 'no output'}")


def train_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """ψ at the paper's size; more epochs than the time can hold."""
    data = ["--data", "samples"]
    if arguments.root is not None:
        data = ["--data", "folder", "--data-root", str(arguments.root)]
    return [
        *(sys.executable, "-m", "nefkern.train", "--method", "neural", *data, "--views", "0"),
        *("--crop", "480", "--batch-size", "16", "--k", "256", "-K", "256", "--epochs", "100000"),
        *("--backbone", arguments.backbone, "--workers", "1", "--checkpoint-seconds", "60"),
        *("--out", str(folder / "run")),
    ]


def segment_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """A run of a minute, then so many pictures: links to the few that there are."""
    run, many = folder / "run", folder / "many"
    root = arguments.root
    subprocess.run(
        [
            *(sys.executable, "-m", "nefkern.train", "--method", "spectral", "--data", "folder"),
            *("--data-root", str(root), "--backbone", arguments.backbone, "--crop", "224"),
            *("-K", "16", "--graph-images", "40", "--out", str(run), "--pictures", "1"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pictures = sorted(path for path in (root / "images").rglob("*") if path.is_file())
    many.mkdir()
    for number in range(arguments.images):
        source = pictures[number % len(pictures)]
        (many / f"{number:05}{source.suffix}").symlink_to(source.resolve())
    out = str(folder / "out")
    return [sys.executable, "-m", "nefkern.segment", str(run), str(many), "--out", out]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("train", "segment"))
    parser.add_argument("--root", type=Path, help="folder with images/train; train: else samples")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of train [%(default)s]")
    parser.add_argument("--images", type=int, default=10_000, help="of segment [%(default)s]")
    parser.add_argument("--every", type=float, default=5.0, help="seconds to a sample [5]")
    parser.add_argument("--work", type=Path, help="an empty folder [a temporary one]")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="JSON of all samples")
    arguments = parser.parse_args(argv)
    if arguments.what == "segment" and arguments.root is None:
        parser.error("segment: expected --root DIR, a folder with images/train")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        command = {"train": train_command, "segment": segment_command}[arguments.what](
            arguments, folder
        )
        seconds = arguments.seconds if arguments.what == "train" else None
        samples = []
        for one in watched(command, seconds, arguments.every):
            samples.append(one)
            print(f"\r{one}", end=" ", flush=True)
    print()
    if arguments.samples:
        arguments.samples.write_text(json.dumps([asdict(one) for one in samples]))
    found = growths(samples)
    for growth in found:
        verdict = "grew" if growth.found else "flat"
        print(f"{growth.quantity:10} {growth.early:8.0f} -> {growth.late:8.0f}  {verdict}")
    return int(any(growth.found for growth in found))


if __name__ == "__main__":
    sys.exit(main())
