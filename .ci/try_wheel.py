"""Install a wheel as a stranger would, and see that it needs no build and that its kernels run.

    python .ci/try_wheel.py dist/nefkern-*.whl
    python .ci/try_wheel.py WHEEL --beside SITE_PACKAGES     torch and the rest are taken from there

In a fresh environment, with no program on PATH but its own: no compiler, no CMake. Then
`python -m nefkern.info` must tell of the extension, and some of the operators' tests pass on it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/ops/test_kappa.py", "tests/ops/test_knn.py", "tests/ops/test_spmm.py")
NEEDED = ("pytest", "hypothesis", "scipy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--beside", type=Path, help="packages of another environment")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "env", asked.beside)
        path = {**os.environ, "PATH": str(python.parent), "PYTHONPATH": ""}
        started = time.monotonic()
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        pip += ["--no-deps"] if asked.beside else ["--only-binary", ":all:", *NEEDED]
        run([*pip, asked.wheel.resolve()], path, folder)
        print(f"installed in {time.monotonic() - started:.0f} s", flush=True)
        told = run([python, "-m", "nefkern.info"], path, folder)
        print(told)
        if "extension\n" not in told:
            sys.exit("the wheel holds no extension that can be loaded here")
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pyc*"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "-k", "cpu", *TESTS]
        print(run(tests, path, folder))


def environment(folder: Path, beside: Path | None) -> Path:
    """The Python of a new environment, which finds another's packages after its own."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if beside:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "beside.pth").write_text(f"{beside.resolve()}\n")
    return python


def run(command: list, path: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, env=path, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return done.stdout.rstrip()


if __name__ == "__main__":
    main()
