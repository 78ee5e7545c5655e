"""Compile all that sees PyTorch's headers against other versions of it; run nothing.

    python .ci/other_torches.py BUILD_FOLDER 2.10.0 2.11.0

Of each version's wheel only the headers are used: no second PyTorch is installed, and no kernel is
compiled, since kernels see nothing of PyTorch. What the extension that is installed here wants of
PyTorch's libraries is looked up in those of each version as well. A version that cannot be had here
is skipped, and told.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOWNLOAD_SECONDS = 300
TARGETS = ("nefkern_ops", "CMakeFiles/_C.dir/csrc/bindings.cpp.o")


class Skipped(Exception):
    """Why a version cannot be tried."""


def wheel(version: str, folder: Path) -> Path:
    """The wheel of a version for this Python, downloaded."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--progress-bar", "off", "--no-deps",
               "--only-binary", ":all:", "-d", str(folder), f"torch=={version}"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise Skipped(f"no download within {DOWNLOAD_SECONDS} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Skipped(errors[-1] if errors else "pip finds none")
    return next(folder.glob("torch-*.whl"))


def unpack(source: Path, folder: Path) -> Path:
    """The headers and libraries of a wheel, as a torch for this machine's CUDA.

    Only what kernels are linked to depends on the CUDA that a torch was built for.
    """
    with zipfile.ZipFile(source) as archive:
        wanted = ("torch/include/", "torch/lib/libtorch_cpu.so", "torch/lib/libtorch_cuda.so")
        archive.extractall(folder, [n for n in archive.namelist() if n.startswith(wanted)])
        text = archive.read("torch/version.py").decode()
    installed = (Path(sysconfig.get_path("platlib")) / "torch" / "version.py").read_text()
    cuda = re.search(r"^cuda.*$", installed, re.MULTILINE)
    text = re.sub(r"^cuda.*$", lambda _: cuda[0], text, flags=re.MULTILINE)
    (folder / "torch" / "version.py").write_text(text)
    return folder / "torch"


def compile_against(torch: Path, build: Path) -> None:
    """Configure and compile; the build's output where it fails."""
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    environment["TORCH_CUDA_ARCH_LIST"] = "8.0"
    for command in (
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DNEFKERN_TORCH_DIR={torch}", "-DNEFKERN_WERROR=ON"],
        ["cmake", "--build", build, "--target", *TARGETS],
    ):  # fmt: skip
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            sys.exit(f"{done.stdout}\nfailed against {torch}")


def symbols(library: Path, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True)
    names = (line.split()[-1].partition("@")[0] for line in done.stdout.splitlines())
    return {name for name in names if name.startswith(("aoti_torch_", "torch_"))}


def check_symbols(torch: Path) -> int:
    """How many functions of PyTorch the installed extension calls; exits if a version lacks one."""
    module = next((ROOT / "nefkern").glob("_C*.so"), None)
    if module is None:
        return 0
    wanted = symbols(module, "--undefined-only")
    offered = set().union(*(symbols(one, "--defined-only") for one in (torch / "lib").glob("*.so")))
    if missing := sorted(wanted - offered):
        sys.exit(f"the libraries of {torch} lack {', '.join(missing)}")
    return len(wanted)


def main(build: Path, versions: list[str]) -> None:
    for version in versions:
        started = time.monotonic()
        folder = build / version
        folder.mkdir(parents=True, exist_ok=True)
        try:
            downloaded = wheel(version, folder)
        except Skipped as reason:
            print(f"torch {version}: skipped: {reason}", flush=True)
            continue
        torch = unpack(downloaded, folder)
        downloaded.unlink()
        compile_against(torch, build / "objects")
        count = check_symbols(torch)
        for library in (torch / "lib").glob("*.so"):
            library.unlink()  # a gigabyte
        seconds = time.monotonic() - started
        print(f"torch {version}: compiled; has the {count} functions called ({seconds:.0f} s)",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
