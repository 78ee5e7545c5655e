"""What is released: one version, archives of the same bytes, the limited API, pinned workflows."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from nefkern.version import __version__

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def dist():
    """The program that builds."""
    spec = importlib.util.spec_from_file_location("dist", ROOT / ".ci" / "dist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_written_in_one_place():
    wheels = re.compile(re.escape(__version__))
    files = ("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", ".ci/dist.py")
    texts = {name: (ROOT / name).read_text("utf-8") for name in files}
    texts[".ci/dist.py"] = texts[".ci/dist.py"].replace(f"{__version__}+cu130", "")
    assert not [name for name, text in texts.items() if wheels.search(text)]
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def archive(path: Path, names: list[str], moment: int, owner: int) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            member = tarfile.TarInfo(f"a-1/{name}")
            member.size, member.mtime, member.uid, member.mode = 3, moment, owner, 0o664
            file.addfile(member, io.BytesIO(b"abc"))
    return path


def test_source_archives_know_nothing_of_when_where_and_by_whom(dist, tmp_path):
    one = archive(tmp_path / "1.tar.gz", ["x", "b/y"], 1_700_000_000, 0)
    two = archive(tmp_path / "2.tar.gz", ["b/y", "x"], 1_700_009_999, 1000)
    results = [
        dist.dated_archive(path, tmp_path / f"out-{path.name}", 1_600_000_000).read_bytes()
        for path in (one, two)
    ]
    assert results[0] == results[1]
    with tarfile.open(fileobj=io.BytesIO(results[0])) as file:
        assert [(m.name, m.mtime, m.mode) for m in file] == [
            ("a-1/b/y", 1_600_000_000, 0o644),
            ("a-1/x", 1_600_000_000, 0o644),
        ]


def made_wheel(path: Path, files: dict[str, str], year: int) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in files.items():
            file.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), text)
    return path


METADATA = """\
Metadata-Version: 2.4
Name: nefkern
Version: 1.2.3
License-Expression: MIT
Requires-Dist: safetensors
Requires-Dist: no-such-package
Requires-Dist: pytest; extra == "test"
"""


def test_wheels_and_the_list_of_what_they_need(dist, tmp_path):
    files = {"nefkern/a.py": "a", "nefkern-1.2.3.dist-info/METADATA": METADATA}
    one = made_wheel(tmp_path / "1.whl", files, 2001)
    two = made_wheel(tmp_path / "2.whl", dict(reversed(files.items())), 2020)
    made = [dist.dated_wheel(p, tmp_path / f"out-{p.name}", 1_600_000_000) for p in (one, two)]
    assert made[0].read_bytes() == made[1].read_bytes()
    with zipfile.ZipFile(made[0]) as file:
        assert file.namelist() == list(files)  # the metadata last, as the format wishes
    lists = [dist.write_sbom(path, tmp_path, 1_600_000_000).read_text("utf-8") for path in made]
    assert lists[0] == lists[1]
    found = json.loads(lists[0])
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found["metadata"]["component"]["licenses"] == [{"expression": "MIT"}]
    assert found["metadata"]["timestamp"] == "2020-09-13T12:26:40Z"
    names = [one["name"] for one in found["components"]]
    assert "safetensors" in names
    assert not {"pytest", "no-such-package"} & set(names)
    assert all(one["version"] and one["licenses"] for one in found["components"])


@pytest.mark.long
def test_the_source_archive_holds_what_builds_and_tests(dist, tmp_path):
    made = dist.source_archive(tmp_path, "1600000000")
    (tmp_path / "again").mkdir()
    again = dist.source_archive(tmp_path / "again", "1600000000")
    assert made.read_bytes() == again.read_bytes()
    with tarfile.open(made) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    hidden = (".github/", ".clang-format", ".dockerignore", ".gitignore", ".pre-commit")
    assert {n for n in tracked if not n.startswith(hidden)} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


def test_the_extension_keeps_to_the_limited_api():
    module = next((ROOT / "nefkern").glob("_C.abi3.so"), None)
    if module is None:
        pytest.skip("no extension is built here for all versions of Python")
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    )
    wanted = {line.split()[-1] for line in done.stdout.splitlines()}
    used = {name for name in wanted if name.startswith(("Py", "_Py"))}
    assert used <= {"Py_BuildValue", "_Py_BuildValue_SizeT", "PyModuleDef_Init", "_Py_FalseStruct"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_and_call_the_repository_s_own_commands(path):
    found = yaml.safe_load(path.read_text("utf-8"))
    assert found["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    known = {name for line in targets for name in line.split()}
    for job in found["jobs"].values():
        assert job["timeout-minutes"] <= 180
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])
                continue
            program, what, *_ = step["run"].split()
            assert (program, what) in (("bash", ".ci/run"), ("git", "config")) or (
                program == "make" and what in known
            ), step["run"]


def test_there_is_a_workflow_for_tests_wheels_and_documentation():
    assert {path.stem for path in WORKFLOWS} == {"test", "wheels", "docs"}


def test_the_commands_of_a_release_explain_themselves():
    for name in ("dist.py", "try_wheel.py"):
        done = subprocess.run(
            [sys.executable, ROOT / ".ci" / name, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0
        assert "usage" in done.stdout


@pytest.mark.parametrize(("label", "expected"), [("cu130", "+cu130"), ("", "")])
def test_a_variant_made_from_the_source_archive_has_its_label(tmp_path, label, expected):
    """There setuptools has written into setup.cfg that versions have none."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "nefkern/version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "setup.cfg").write_text("[egg_info]\ntag_build = \ntag_date = 0\n")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"], cwd=tmp_path, check=True,
        env={**os.environ, "NEFKERN_NATIVE": "0", "NEFKERN_LABEL": label},
    )  # fmt: skip
    (facts,) = tmp_path.glob("*.egg-info/PKG-INFO")
    assert f"\nVersion: {__version__}{expected}\n" in facts.read_text("utf-8")
