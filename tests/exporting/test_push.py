"""Repositories of the model hub: what is written, uploaded and taken, without a network."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
import yaml

from nefkern import push, segment
from nefkern.exporting.card import model_card
from nefkern.naming.names import Names, fingerprint, write_names
from nefkern.runtime import hub
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.runs import BACKBONE, CONFIG, Run

huggingface_hub = pytest.importorskip("huggingface_hub")


class Server:
    """A hub of folders: what is uploaded can be downloaded."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def HfApi(self, **_):
        return self

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        self.calls.append(("upload", repo_id, commit_message))
        target = self.root / repo_id
        target.mkdir(parents=True)
        for path in folder_path.iterdir():
            assert any(path.match(pattern) for pattern in allow_patterns), path
            shutil.copy(path, target)

    def snapshot_download(self, name, *, revision, allow_patterns):
        self.calls.append(("download", name, revision))
        if not (self.root / name).is_dir():
            raise LookupError("404")
        cache = self.root / "cache" / name
        cache.mkdir(parents=True, exist_ok=True)
        for path in (self.root / name).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)


@pytest.fixture
def server(tmp_path, monkeypatch):
    made = Server(tmp_path / "hub")
    for name in ("HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(made, name))
    monkeypatch.setattr(hub, "go_offline_without_network", lambda: None)
    return made


@pytest.fixture
def fails(capsys):
    """fails(arguments): the one line that the command ends with."""

    def run(*arguments) -> str:
        assert push.main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize("kind", ["spectral", "continuous"])
def test_what_is_pushed_loads_as_it_was(kind, run_of, pictures, server, tmp_path, capsys):
    run = run_of(kind)
    assert push.main([str(run), "me/clusters", "--private", "--message", "first"]) == 0
    assert capsys.readouterr().out.strip().endswith("/me/clusters")
    assert [call[0] for call in server.calls] == ["create", "upload"]
    assert server.calls[0][2] == {"private": True, "exist_ok": True}
    expected = Segmenter.load(run, "cpu")(pictures / "wide.png")
    for name in ("me/clusters", "hf://me/clusters", "hf://me/clusters@v1"):
        assert torch.equal(Segmenter.load(name, "cpu")(pictures / "wide.png"), expected)
    assert [call[2] for call in server.calls[2:]] == [None, None, "v1"]
    arguments = ["hf://me/clusters", str(pictures / "wide.png"), "--out", str(tmp_path / "out")]
    assert segment.main(arguments) == 0
    assert (tmp_path / "out" / "wide.clusters.png").exists()


def test_no_pickle_and_no_place_of_this_machine(run_of, tmp_path):
    run, folder = run_of("quantised"), tmp_path / "preview"
    assert list(run.glob("state-*.pt")), "there is one to leave out"
    assert push.main([str(run), "me/clusters", "--to", str(folder), "--license", "mit"]) == 0
    written = {path.name for path in folder.iterdir()}
    assert written == {"README.md", CONFIG, "checkpoint.safetensors"}
    root = str(tmp_path.parent.parent)
    for name in ("README.md", CONFIG):
        assert root not in (folder / name).read_text("utf-8")
    header = yaml.safe_load((folder / "README.md").read_text("utf-8").split("---")[1])
    assert header["license"] == "mit"
    assert (header["library_name"], header["pipeline_tag"]) == ("nefkern", "image-segmentation")
    assert Run(folder).options().num_eigenfunctions == 6


def test_weights_from_a_file_come_along(run_of, pictures, server, tmp_path, fails):
    """They are in nobody else's hands; others are found by name, or added by a flag."""
    from safetensors.torch import save_file

    run = tmp_path / "run"
    shutil.copytree(run_of("spectral"), run)
    segmenter = Segmenter.load(run, "cpu")
    weights = tmp_path / "mine.safetensors"
    save_file(segmenter.backbone.model.state_dict(), weights)
    text = (run / CONFIG).read_text("utf-8")
    (run / CONFIG).write_text(text.replace("weights: random", f"weights: {weights}"), "utf-8")
    assert push.main([str(run), "me/own"]) == 0
    weights.unlink()
    assert (server.root / "me/own" / BACKBONE).exists()
    loaded = Segmenter.load("me/own", "cpu")
    assert torch.equal(loaded(pictures / "wide.png"), segmenter(pictures / "wide.png"))
    folder = tmp_path / "with"
    arguments = ["--to", str(folder), "--with-backbone"]
    assert push.main([str(run_of("spectral")), "me/own", *arguments]) == 0
    assert (folder / BACKBONE).exists()
    # What came from the hub with its weights is passed on with them.
    again = tmp_path / "again"
    assert push.main([str(folder), "me/own", "--to", str(again)]) == 0
    assert (again / BACKBONE).read_bytes() == (folder / BACKBONE).read_bytes()


def test_only_safetensors_and_yaml_are_taken(run_of, server):
    folder = server.root / "you" / "run"
    shutil.copytree(run_of("quantised"), folder)
    (folder / "evil.py").write_text("raise SystemExit")
    Segmenter.load("you/run", "cpu")
    taken = {path.suffix for path in (server.root / "cache" / "you" / "run").iterdir()}
    assert taken == {".safetensors", ".yaml"}


def test_names_and_scores_stand_on_the_card(run_of, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("spectral"), run)
    names = Names(6, {0: "sky", 1: "road | <b>", 2: "sky"}, {}, fingerprint(run))
    write_names(run / "names.yaml", names)
    folder = tmp_path / "preview"
    assert push.main([str(run), "me/clusters", "--to", str(folder)]) == 0
    card = (folder / "README.md").read_text("utf-8")
    assert "| sky |" in card
    assert "| 0, 2 |" in card
    assert "<b>" not in card
    assert "3 of which have names" in card
    assert (folder / "names.yaml").exists()


def test_scores_stand_on_the_card(run_of, annotated, tmp_path):
    from nefkern import evaluate

    run = tmp_path / "run"
    shutil.copytree(run_of("spectral"), run)
    arguments = ["--data-root", str(annotated), "--split", "val", "--bootstrap", "0"]
    assert evaluate.main([str(run), "--data", "folder", *arguments]) == 0
    folder = tmp_path / "preview"
    assert push.main([str(run), "me/clusters", "--to", str(folder)]) == 0
    card = (folder / "README.md").read_text("utf-8")
    assert "## Scores" in card
    assert "10 images, protocol" in card
    assert str(tmp_path) not in card


def test_a_card_without_facts():
    config = {"options": {"method": "neural", "backbone": "b", "crop": 64, "data": "samples",
                          "data_root": None, "num_eigenfunctions": 5, "epochs": 3}}  # fmt: skip
    card = model_card("me/x", config, None, [], None)
    assert card.startswith("---\nlibrary_name: nefkern\n")
    assert "| `epochs` | 3 |" in card
    assert "## Scores" not in card


def test_names_of_folders_stay_folders(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "client", None)  # whoever asks for it fails
    shutil.copytree(run_of("spectral"), tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    Segmenter.load("runs/mine", "cpu")
    for text in ("runs", "a/b/c", "/a/b", "./a/b", "../b", "a/", "-a/b"):
        assert hub.repository_of(text) is None
    with pytest.raises(UserError, match="not a run folder"):
        Segmenter.load(tmp_path / "runs" / "yours", "cpu")


def test_no_such_repository(server):
    with pytest.raises(UserError, match=r"me/none: no such folder, and no such repository"):
        Segmenter.load("me/none", "cpu")
    with pytest.raises(UserError, match="expected hf://owner/name"):
        Segmenter.load("hf://none", "cpu")


def test_without_the_client(run_of, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in fails(run_of("spectral"), "me/clusters")
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        Segmenter.load("me/none", "cpu")


def test_what_cannot_be_pushed_is_told_in_one_line(run_of, server, tmp_path, fails, monkeypatch):
    run = run_of("spectral")
    assert "error: clusters: expected OWNER/NAME" in fails(run, "clusters")
    assert "not a run folder" in fails(tmp_path, "me/clusters")
    (tmp_path / "full" / "of").mkdir(parents=True)
    assert "full: expected an empty folder" in fails(run, "me/c", "--to", tmp_path / "full")

    def refuse(*_, **__):
        raise PermissionError("401: log in\nand more")

    monkeypatch.setattr(server, "create_repo", refuse)
    line = fails(run, "me/clusters")
    assert "me/clusters: could not be uploaded (PermissionError: 401: log in)" in line
