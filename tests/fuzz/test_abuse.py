"""What a single hostile file does: bombs, pipes, links, escapes for terminals, scripts in pages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import socket
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nefkern import segment, train
from nefkern.data.folder import open_folder
from nefkern.data.images import read_annotation, read_image
from nefkern.evaluation.report import write_report
from nefkern.naming.names import read_names
from nefkern.runtime import structured
from nefkern.runtime.errors import UserError, command
from nefkern.runtime.files import make_folder, replace_file
from nefkern.training.option_parsing import resolve
from nefkern.training.runs import CONFIG, METRICS, Run

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)

# ---- YAML and JSON

HOSTILE_YAML = {
    "billion laughs": f"{BOMB}names: *a29\nclusters: *a29\n",
    "within itself": "&a [*a]",
    "deep": "[" * 5000,
    "a date that is none": "clusters: 2020-13-45",
    "digits": f"clusters: {'9' * 6000}",
    "a list as key": "? [a, b]\n: 1\n",
    "a mapping as key": "? {a: b}\n: 1\n",
    "merged": "<<: 3\nclusters: 2\n",
    "a key twice": "clusters: 2\nclusters: 3\n",
    "python": "!!python/object/apply:os.system ['true']",
    "binary": "clusters: !!binary '%'",
    "control": "clusters: \x01",
    "colon": "a: b: c",
    "base 60": "clusters: 1:99999999999999999999999999999:2",
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_hostile_yaml_is_refused(kind, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(HOSTILE_YAML[kind])
    with pytest.raises(UserError, match=r"x\.yaml") as told:
        read_names(path)
    assert len(str(told.value)) < 1000
    with pytest.raises(UserError, match=r"x\.yaml") as told:
        resolve({}, path)
    assert len(str(told.value)) < 1000
    (tmp_path / CONFIG).write_text(HOSTILE_YAML[kind])
    with pytest.raises(UserError, match="not a run's configuration"):
        Run(tmp_path).options()


def test_a_text_without_end_is_not_read_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(structured, "_MOST_TEXT", 100)
    (tmp_path / "x").write_text("a" * 100)
    assert len(structured.read_text(tmp_path / "x")) == 100
    (tmp_path / "x").write_text("a" * 101)
    with pytest.raises(ValueError, match="at most 100 characters"):
        structured.read_text(tmp_path / "x")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "\udcff", ""])
def test_hostile_json_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011
        structured.parse_json(text)


@pytest.mark.parametrize("line", ["9" * 5000, "[" * 100_000, '{"step": "1"}', '{"step": true}'])
def test_a_hostile_record_ends_there(tmp_path, line):
    (tmp_path / METRICS).write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert Run(tmp_path).metrics() == [{"step": 1}]
    Run(tmp_path).truncate_metrics(0)


# ---- images


def _png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)])
def test_an_image_of_a_few_bytes_that_claims_gigabytes(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png(*size, b"\0" * 10_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_image, lambda p: read_annotation(p, num_classes=2, size=(1, 1))):
        with pytest.raises(UserError, match=r"bomb\.png"):
            read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "in KiB"


def test_a_profile_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    path, content = tmp_path / "bomb.png", io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, format="PNG")
    zeros = zlib.compress(b"\0" * 300_000_000, 9)
    body = b"x\0\0" + zeros
    chunk = len(body).to_bytes(4, "big") + b"iCCP" + body
    chunk += zlib.crc32(b"iCCP" + body).to_bytes(4, "big")
    whole = content.getvalue()
    path.write_bytes(whole[:33] + chunk + whole[33:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(UserError):
        assert read_image(path).shape == (3, 4, 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "in KiB"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (read_image, lambda p: read_annotation(p, num_classes=2, size=(1, 1))):
        with pytest.raises(UserError, match=r"x\.png: expected a file, it is a pipe"):
            read(tmp_path / "x.png")
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(UserError, match="expected a file"):
            read_image(path)


# ---- terminals and pages


def test_errors_hold_no_escapes_for_a_terminal(capsys):
    @command
    def main() -> None:
        raise UserError("\x1b]0;owned\x07 and\nanother line \x9b2J ψ é")

    assert main() == 2
    assert capsys.readouterr().err == (
        "error: \\x1b]0;owned\\x07 and\\x0aanother line \\x9b2J ψ é\n"
    )


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\x07", "\x9b2J"])
def test_classes_hold_no_escapes_for_a_terminal(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "classes.txt").write_text(f"sky\n{name}\n", "utf-8")
    with pytest.raises(UserError, match="line 2: expected text, it holds control characters"):
        open_folder(tmp_path, split="train")
    (tmp_path / "classes.txt").write_text("ciel\u00a0bleu\n草\u3000地\n", "utf-8")
    assert len(open_folder(tmp_path, split="train").classes) == 2


SCRIPT = "</pre></td></script><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.mark.parametrize("method", ["neural", "spectral"])
def test_no_script_gets_into_the_report(tiny, tmp_path, method):
    """From the record, the scores, the options, the names of pictures."""
    options = tiny(epochs=1, method=method, k="8")
    run = Run.create(options)
    facts = {"dataset": {"images": SCRIPT, "classes": [SCRIPT]}, "backbone": {"patch": SCRIPT}}
    run.write_config(options, **facts, lengthened=[{"after_step": SCRIPT}])
    row = {"step": 1, "epoch": SCRIPT, "stage": SCRIPT, SCRIPT: SCRIPT}
    run.path(METRICS).write_text(json.dumps(row) + "\n")
    run.path("overlays").mkdir()
    Image.new("RGB", (4, 4)).save(run.path("overlays") / f"{SCRIPT.replace('/', '')}.png")
    run.path("evaluation-x.json").write_text(json.dumps({"settings": SCRIPT}))
    run.path("spectrum.json").write_text(json.dumps({"settings": SCRIPT}))
    page = write_report(run).read_text("utf-8")
    assert "<script>" not in page
    assert "<img src=x" not in page


# ---- files


def test_names_that_are_not_utf_8_are_written(tmp_path):
    path = tmp_path / "x.json"
    name = os.fsdecode(b"caf\xe9.png")
    replace_file(path, json.dumps({"name": name}, ensure_ascii=False))
    assert json.loads(path.read_text("utf-8"))["name"] == name


def test_segments_of_an_image_with_such_a_name(tiny, tmp_path, capsys):
    """In every format, and beside one with control characters, which XML has no place for."""
    from xml.etree import ElementTree

    photo, run = tmp_path / "photos" / "images" / "train" / "0.png", tmp_path / "run"
    flags = ["--method", "spectral", "--data", "folder", "--crop", "64", "--k", "8", "-K", "5"]
    flags += ["--backbone", "test_vit", "--weights", "random", "--pictures", "0"]
    tiny()
    assert train.main([*flags, "--data-root", str(photo.parents[2]), "--out", str(run)]) == 0
    pytest.importorskip("pycocotools")
    given = tmp_path / "given"
    given.mkdir()
    for name in (b"caf\xe9.png", b"bell\x07\x1b[2J.png"):
        Path(os.fsdecode(os.path.join(os.fsencode(given), name))).write_bytes(photo.read_bytes())
    names = tmp_path / "names.yaml"
    names.write_text("clusters: 5\nnames: {0: sky, 1: road, 2: tree, 3: car, 4: sea}\n")
    out, formats = tmp_path / "out", "coco,coco-rle,labelme,cvat,voc"
    capsys.readouterr()
    code = segment.main(
        [str(run), str(given), "--out", str(out), "--names", str(names), "--formats", formats]
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "Traceback" not in said.err
    assert len(json.loads((out / "coco.json").read_text("utf-8"))["images"]) == 2
    ElementTree.parse(out / "cvat.xml")
    for path in (out / "voc" / "Annotations").iterdir():
        ElementTree.parse(path)


def test_links_do_not_lead_out_of_a_folder(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    for folder in (root / "link", root / "link" / "deeper", root / ".." / "outside"):
        with pytest.raises(UserError, match="a link leads out of"):
            make_folder(root, folder)
    assert not list(outside.iterdir())
    make_folder(root, root / "a" / "b")
    assert (root / "a" / "b").is_dir()
    (root / "file").symlink_to(outside / "file")
    replace_file(root / "file", "x")
    assert not (outside / "file").exists()


# ---- the atlas's server


@pytest.fixture
def server(tmp_path):
    from threading import Thread

    from nefkern.naming.names import Names
    from nefkern.naming.server import AtlasServer

    with AtlasServer(0, lambda names: "page", Names(3, {}, {}, "x"), tmp_path / "n.yaml") as made:
        thread = Thread(target=made.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def _raw(server, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


@pytest.mark.parametrize(
    "length", ["9" * 5000, "-1", "1e3", "٣", "", "0x10", " 5 5", str(2**64)]
)  # fmt: skip
def test_a_length_that_is_none_is_refused(server, length, capfd, caplog):
    head = f"POST /names HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    answer = _raw(server, head.encode() + b"{}")
    assert b" 413 " in answer.splitlines()[0]
    assert "Traceback" not in capfd.readouterr().err
    assert not caplog.records


def test_hostile_requests_leave_the_server_at_work(server, capfd):
    dice = np.random.default_rng(0)
    host = f"Host: 127.0.0.1:{server.server_port}\r\n".encode()
    for content in (
        b"", b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"a" * 70_000,
        b"GET /../../etc/passwd HTTP/1.0\r\n" + host + b"\r\n",
        b"GET /<script> HTTP/1.0\r\n" + host + b"\r\n",
        b"POST /names HTTP/1.0\r\n" + host + b"Content-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{", b"GET / HTTP/1.0\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        *(dice.bytes(300) + b"\r\n\r\n" for _ in range(20)),
    ):  # fmt: skip
        answer = _raw(server, content)
        assert b"<script>" not in answer
        assert b"root:" not in answer
    assert _raw(server, b"GET / HTTP/1.0\r\n" + host + b"\r\n").endswith(b"page")
    assert "Traceback" not in capfd.readouterr().err


def test_the_server_listens_on_the_loopback_interface_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    others = {i[4][0] for i in socket.getaddrinfo(socket.gethostname(), 0, socket.AF_INET)}
    for address in others - {"127.0.0.1"}:
        with pytest.raises(OSError):  # noqa: PT011
            socket.create_connection((address, server.server_port), timeout=1).close()
