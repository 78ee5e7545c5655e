"""The Dockerfile, read: it is built elsewhere."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def instructions(text: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions: name and the rest, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(a, b.strip()) for a, _, b in (x.partition(" ") for x in joined.splitlines() if x)]


@pytest.fixture(scope="module")
def docker() -> list[tuple[str, str]]:
    return instructions((ROOT / "Dockerfile").read_text("utf-8"))


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        places = [path, *map(str, Path(path).parents)]
        names = places if "**/" not in line else Path(path).parts
        if any(fnmatch.fnmatchcase(place, pattern) for place in names):
            sent = line.startswith("!")
    return sent


def test_what_the_image_copies_is_there_and_sent(docker):
    copied = [shlex.split(rest) for name, rest in docker if name == "COPY"]
    sources = [s for parts in copied if not parts[0].startswith("--") for s in parts[:-1]]
    assert {"nefkern", "csrc", "setup.py", "CMakeLists.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source
    for built in ("nefkern/_C.cpython-311-x86_64-linux-gnu.so", "nefkern/ops/__pycache__/a.pyc",
                  "nefkern/_build.json", "runs/demo", "build", ".venv", ".git"):  # fmt: skip
        assert not is_sent(built), built


def test_what_the_build_reads_is_copied(docker):
    """Files that pyproject.toml and setup.py name."""
    copied = " ".join(rest for name, rest in docker if name == "COPY").split()
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for name in ("README.md", "LICENSE"):
        assert name in project
        assert name in copied


def test_stages_and_arguments_of_the_image(docker):
    stages = [rest.split(" AS ")[1] for name, rest in docker if name == "FROM" and " AS " in rest]
    assert {"build-cpu", "build-cuda", "build"} <= set(stages)
    declared = {rest.partition("=")[0] for name, rest in docker if name == "ARG"}
    text = (ROOT / "Dockerfile").read_text("utf-8")
    assert set(re.findall(r"\$\{(\w+)\}", text)) <= declared
    for _, rest in (i for i in docker if i[0] == "COPY" and "--from" in i[1]):
        assert re.search(r"--from=(\w+)", rest)[1] in stages
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for extra in re.search(r"whl\)\[([\w,]+)\]", text)[1].split(","):
        assert re.search(rf"^{extra} = \[", project, re.M), extra
    entry = next(rest for name, rest in docker if name == "ENTRYPOINT")
    assert yaml.safe_load(entry) == ["nefkern"]
