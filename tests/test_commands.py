"""The commands as a user meets them: exit codes, one line for a mistake, signals, help, report."""

from __future__ import annotations

import html.parser
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from nefkern import backends, evaluate, info, segment, train
from nefkern.training.runs import CHECKPOINT, CONFIG, METRICS, Run

PATIENCE = 300  # seconds, for a busy machine

FAST = [
    *("--data", "folder", "--backbone", "test_vit", "--weights", "random", "--crop", "64"),
    *("--k", "8", "-K", "8", "--epochs", "2", "--batch-size", "2", "--workers", "0"),
    *("--pictures", "2", "--heads", "3", "--mlp-hidden", "96"),
]


@pytest.fixture
def arguments(photos, tmp_path):
    """arguments("--lr", ...): a fast run's command line; later flags win."""
    return lambda *more: [*FAST, "--data-root", str(photos), "--out", str(tmp_path / "run"), *more]


@pytest.fixture
def fails(capsys):
    """fails(main, arguments): the one line that the command ends with."""

    def run(main, arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        lines = err.replace("\r", "\n").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        assert len(errors) == 1, err
        assert lines[-1] == errors[0], "it is the last thing said"
        assert "Traceback" not in out + err
        return errors[0]

    return run


def python(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


# ---- train


def test_train_writes_a_run_folder(arguments, tmp_path, capsys, monkeypatch):
    for name in ("COLUMNS", "LINES"):  # a wide terminal: nothing of the bar is cut off
        monkeypatch.setenv(name, "200")
    assert train.main(arguments()) == 0
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", CHECKPOINT, METRICS, "events", "overlays", "report.html",
    }  # fmt: skip
    assert sorted(p.name for p in (run / "overlays").iterdir()) == ["0.png", "1.png"]
    bar = capsys.readouterr().err
    for shown in ("loss=", "trace=", "penalty=", "T=", "live=", "img/s=", "epoch 2/2"):
        assert shown in bar, shown
    assert not list(run.rglob("*.part"))


def test_repeating_a_run_from_its_configuration(arguments, tmp_path):
    assert train.main(arguments()) == 0
    again = ["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert train.main(again) == 0
    first, second = Run(tmp_path / "run").load()[0], Run(tmp_path / "again").load()[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


BAD = {
    "k not below N": (["--k", "32"], "--k 32: expected fewer than the 32 rows"),
    "K above N": (["-K", "33"], "--num-eigenfunctions 33: expected at most 32"),
    "K above the width": (
        ["-K", "193", "--batch-size", "10", "--crop", "80"],
        "--num-eigenfunctions 193: expected at most 192, the width",
    ),
    "crop below a patch": (["--crop", "9"], "--crop 9: expected at least 16"),
    "missing weights": (["--weights", "no.pth"], "--weights no.pth: no such file"),
    "weights of nothing": (["--weights", __file__], f"--weights {__file__}: not a readable"),
    "unknown backbone": (["--backbone", "vit_huge"], "--backbone vit_huge: timm has no such"),
    "missing data": (["--data-root", "/no/such"], "/no/such: expected a folder"),
    "missing split": (["--split", "test"], "no split 'test', there is: train"),
    "unknown device": (["--device", "abacus"], "--device abacus: expected auto, cpu, cuda"),
    "out is a file": (["--out", __file__], f"--out {__file__}: is a file"),
    "out below a file": (["--out", f"{__file__}/run"], f"{__file__}"),
    "a number that is none": (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    "unknown flag": (["--colour"], "unrecognized arguments: --colour"),
    "configuration": (["--config", "no.yaml"], "--config no.yaml: No such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(case, arguments, fails, tmp_path):
    more, message = BAD[case]
    assert message in fails(train.main, arguments(*more))
    assert not (tmp_path / "run" / "config.yaml").exists(), "the folder stays free"


def test_empty_folder(arguments, fails, tmp_path):
    (tmp_path / "empty").mkdir()
    line = fails(train.main, arguments("--data-root", tmp_path / "empty"))
    assert f"{tmp_path / 'empty'}: expected images" in line


def test_no_readable_image(arguments, fails, photos):
    for path in (photos / "images" / "train").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert "none of the 10 images can be read" in fails(train.main, arguments())


def test_one_bad_image_among_many(arguments, fails, photos, tmp_path):
    bad = photos / "images" / "train" / "0.png"
    bad.write_bytes(bad.read_bytes()[:200])
    assert train.main(arguments()) == 0
    assert sorted(p.name for p in (tmp_path / "run/overlays").iterdir()) == ["1.png", "2.png"]
    line = fails(train.main, arguments("--strict", "--out", tmp_path / "strict"))
    assert str(bad) in line


def test_a_tiny_image_trains_and_has_no_overlay(arguments, photos, photograph, tmp_path, caplog):
    small = photos / "images" / "train" / "0.png"
    photograph(9, 9, 0).save(small)
    assert train.main(arguments()) == 0
    assert f"no overlay: {small}: 9 × 9 pixels, expected at least one patch" in caplog.text
    assert sorted(p.name for p in (tmp_path / "run/overlays").iterdir()) == ["1.png", "2.png"]


def test_messages_stand_on_lines_of_their_own_beside_a_progress_bar():
    code = (
        "import logging; from tqdm import tqdm\n"
        "from nefkern.runtime.commandline import log_to_stderr\n"
        "log_to_stderr(); bar = tqdm(total=2); bar.update(); logging.warning('one line')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "one line" in done.stderr.replace("\r", "\n").splitlines()


def test_existing_run(arguments, fails, tmp_path):
    assert train.main(arguments()) == 0
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    assert "holds a run already; --resume goes on with it" in fails(train.main, arguments())
    line = fails(train.main, arguments("--resume", "--lr", "0.5"))
    assert "--resume: this run had --lr 0.001, not 0.5" in line
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    assert train.main(arguments("--resume")) == 0


def test_a_finished_run_is_trained_longer_if_the_flag_says_so(arguments, fails, tmp_path):
    """Not if a file does, or the default of an option left out: a short run would become long."""
    run = tmp_path / "run"
    assert train.main(arguments()) == 0
    (tmp_path / "longer.yaml").write_text(
        (run / CONFIG).read_text("utf-8").replace("epochs: 2", "epochs: 3")
    )
    again = ["--config", str(tmp_path / "longer.yaml"), "--resume"]
    line = fails(train.main, again)
    assert "--resume: this run had --epochs 2, not 3;" in line
    assert "train longer (--resume --epochs 3)" in line
    assert train.main([*again, "--epochs", "3"]) == 0
    assert [row["epoch"] for row in Run(run).metrics()] == [1] * 5 + [2] * 5 + [3] * 5
    page = (run / "report.html").read_text("utf-8")
    assert "15 steps, 3 epochs, trained longer after step 10." in page
    assert "--epochs 3, not 1" in fails(train.main, [*again, "--epochs", "1"])


@pytest.mark.parametrize("line", ["garbage", '{"a": 1}', "3", "\udcff"])
def test_a_damaged_record_ends_where_it_is_damaged(arguments, tmp_path, line):
    assert train.main(arguments()) == 0
    path = tmp_path / "run" / METRICS
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:4], line.encode(errors="surrogateescape"), b"\n", *rows[4:]]))
    assert train.main(arguments("--resume")) == 0
    assert [row["step"] for row in Run(tmp_path / "run").metrics()] == [1, 2, 3, 4]


def test_full_disk(arguments, tmp_path):
    """A file may not grow beyond 5 kB: what a real write says, not a simulated one."""
    assert train.main(arguments("--epochs", "1", "--blocks", "0", "--no-orthogonal-head")) == 0
    run = Run(tmp_path / "run")
    before = run.path(CHECKPOINT).read_bytes()
    command = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
        "from nefkern.training.runs import Run; from nefkern.runtime.errors import command; "
        "import torch; "
        "run = Run(sys.argv[1]); weights, _ = run.load(); "
        "sys.exit(command(lambda: run.save({'w': torch.zeros(9999)}, {'step': 9}, 9))())"
    )
    process = python("-c", command, str(run.folder))
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, err
    line = f"error: cannot read or write {run.path(CHECKPOINT)}: File too large"
    assert err.splitlines()[-1] == line, err
    assert "Traceback" not in err
    assert run.path(CHECKPOINT).read_bytes() == before
    run.load_state(run.load()[1])
    assert not list(run.folder.glob(".*.part"))


def test_a_name_that_no_file_of_this_locale_can_have(tmp_path, photos):
    config = tmp_path / "config.yaml"
    out = tmp_path / "空"
    config.write_text(f"data: folder\ndata_root: {photos}\nout: {out}\n", "utf-8")
    process = python(
        "-m", "nefkern.train", "--config", str(config),
        LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0",
    )  # fmt: skip
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}/?: no file of this locale, "), err


def test_full_disk_while_training(arguments, fails, tmp_path, monkeypatch):
    import errno

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert train.main(arguments("--epochs", "1")) == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("epochs: 1", "epochs: 2"), "utf-8")
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    line = fails(train.main, arguments("--resume"))
    record = tmp_path / "run" / METRICS
    assert line == f"error: cannot read or write {record}: No space left on device"
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    monkeypatch.undo()
    assert train.main(arguments("--resume")) == 0
    assert [row["step"] for row in Run(tmp_path / "run").metrics()] == list(range(1, 11))


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, "0"), (signal.SIGTERM, "2")])
def test_signals_write_a_checkpoint(number, workers, arguments, tmp_path):
    more = ("--epochs", "500", "--workers", workers)
    process = python("-m", "nefkern.train", *arguments(*more))
    metrics = tmp_path / "run" / METRICS
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    last = err.replace("\r", "\n").splitlines()[-1]
    rows = Run(tmp_path / "run").metrics()
    assert last == (
        f"interrupted: the checkpoint after step {len(rows)} is written; --resume goes on"
    )
    assert "Traceback" not in err
    assert Run(tmp_path / "run").load()[1]["step"] == str(len(rows))


def test_a_mistake_in_a_process_of_its_own(arguments):
    process = python("-m", "nefkern.train", *arguments("--k", "many"))
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    assert err == "error: --k many: expected a number of neighbours, or a share of N such as 2%\n"


# ---- evaluate and segment


@pytest.fixture
def trained(arguments, tmp_path):
    assert train.main(arguments("--epochs", "1", "--pictures", "0")) == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mask: mask.resize((5, 5)), "expected the size of its image"),
        (lambda mask: mask.point(lambda value: 3), "holds index 3, classes.txt names 3 classes"),
        (lambda mask: mask.convert("RGB"), "expected an index image"),
    ],
)
def test_a_bad_annotation_is_named(trained, photos, fails, spoil, message):
    from PIL import Image

    (photos / "classes.txt").write_text("sky\ngrass\ntree\n")
    masks = photos / "annotations" / "train"
    masks.mkdir(parents=True)
    for path in (photos / "images" / "train").iterdir():
        Image.new("L", Image.open(path).size, 1).save(masks / path.name)
    asked = [trained, "--data", "folder", "--data-root", photos, "--split", "train"]
    assert evaluate.main([str(part) for part in asked]) == 0
    bad = masks / "7.png"
    spoil(Image.open(bad)).save(bad)
    line = fails(evaluate.main, asked)
    assert line.startswith(f"error: {bad}: ")
    assert message in line


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_eigenfunctions", "four", "num_eigenfunctions: expected int, got 'four'"),
        ("temperature", "x", "--temperature x: expected start:end"),
        ("feature_map", "relu", "feature_map: expected one of softmax, elu, got 'relu'"),
    ],
)
def test_an_edited_configuration_is_named(trained, photos, fails, tmp_path, name, value, message):
    config = trained / "config.yaml"
    lines = config.read_text("utf-8").splitlines()
    edited = [f"  {name}: {value}" if line.startswith(f"  {name}:") else line for line in lines]
    assert edited != lines
    config.write_text("\n".join(edited), "utf-8")
    images = photos / "images" / "train"
    line = fails(segment.main, [trained, images, "--out", tmp_path / "segments"])
    assert line.startswith(f"error: {config}: {message}")


def test_evaluation_of_nothing(trained, photos, fails, tmp_path):
    asked = ["--data", "folder", "--data-root", photos, "--split", "train"]
    assert "not a run folder" in fails(evaluate.main, [tmp_path / "none", *asked])
    assert "annot" in fails(evaluate.main, [trained, *asked]), "these have no annotations"


def test_images_that_cannot_be_segmented(trained, photos, photograph, fails, capsys, tmp_path):
    good = photos / "images" / "train" / "1.png"
    small, broken = tmp_path / "small.png", tmp_path / "broken.png"
    photograph(9, 40, 0).save(small)
    broken.write_bytes(good.read_bytes()[:100])
    out = ["--out", tmp_path / "segments"]
    reasons = {
        small: "9 × 40 pixels, expected at least one patch, 16 × 16",
        broken: "cannot read this image",
        tmp_path / "none.jpg": "cannot read this image: No such file or directory",
    }
    assert segment.main([str(part) for part in (trained, *reasons, good, *out)]) == 2
    err = capsys.readouterr().err
    for path, reason in reasons.items():
        assert f"{path}: {reason}" in err
    assert "Traceback" not in err
    assert (tmp_path / "segments" / "1.clusters.png").is_file(), "the good one is done"
    assert "not a run folder" in fails(segment.main, [tmp_path, good, *out])


# ---- the report


class Page(html.parser.HTMLParser):
    """Checks nesting, and collects what the page refers to."""

    VOID = frozenset(("meta", "img", "link", "br", "input", "hr"))
    OPTIONAL = frozenset(("tr", "td", "th", "p"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "data", "action", "poster", "srcset")
        self.references += [value for name, value in attributes if name in names]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        while self.open and self.open[-1] != tag and self.open[-1] in self.OPTIONAL:
            self.open.pop()
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.mark.drawn
def test_report_is_a_page_of_its_own(arguments, photos, tmp_path):
    awkward = photos / "images" / "train" / "0 a&b#c'<d>%20.png"
    (photos / "images" / "train" / "0.png").rename(awkward)
    assert train.main(arguments()) == 0
    run = tmp_path / "run"
    text = (run / "report.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert set(page.open) <= page.OPTIONAL
    from urllib.parse import unquote

    pictures = [reference for reference in page.references if not reference.startswith("#")]
    assert len(pictures) == 3  # two overlays and the eigenfunctions
    for picture in pictures:
        assert (run / unquote(picture)).is_file(), picture
    assert "http" not in text.replace("http://www.w3.org/", ""), "names of XML languages only"
    assert "url(" not in text.replace("url(#", "")
    assert "<script" not in text
    assert "svg" in page.tags
    for shown in ("10 images in patches of 16 × 16 pixels", "10 steps, 2 epochs", "Objective",
                  "Confidence", "test_vit", torch.__version__.partition("+")[0]):  # fmt: skip
        assert shown in text, shown


@pytest.mark.drawn
def test_long_runs_do_not_make_a_heavy_page():
    from nefkern.evaluation.report import curves

    keys = ("loss", "trace", "penalty", "off_diagonal", "live", "dead", "confidence", "temperature")
    rows = [{"step": i, **dict.fromkeys(keys, i * 7919 % 101 / 101)} for i in range(20_000)]
    assert len(curves(rows)) < 400_000


# ---- info, help, imports


def test_info_gives_every_backend_with_a_reason(capsys):
    assert info.main([]) == 0
    out = capsys.readouterr().out
    for name, reason in backends.available().items():
        line = next(
            line for line in out.splitlines() if line.split()[:1] == [name] and "vail" in line
        )
        assert line.split(maxsplit=1)[1] == (
            "available" if reason is None else f"not available: {reason}"
        )
    for shown in ("nefkern", "torch", "timm", "knn", "spmm", "linear_attention", "threads",
                  "tf_efficientnet_lite0", "vit_small_patch14_dinov2"):  # fmt: skip
        assert shown in out, shown


def test_info_in_a_process_of_its_own():
    process = python("-m", "nefkern.info")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert "reference    available" in out


def test_an_extension_of_another_version_is_not_used(monkeypatch):
    other = types.SimpleNamespace(build_info=lambda: {"version": "0.0.1"})
    monkeypatch.setitem(sys.modules, "nefkern._C", other)
    reason = backends.native_module.__wrapped__()
    assert "another version (0.0.1" in reason
    assert "install nefkern again" in reason


def test_unknown_and_unavailable_backends(monkeypatch, fails, arguments, capsys):
    monkeypatch.setenv("NEFKERN_BACKEND", "abacus")
    for command, its in ((info.main, []), (train.main, arguments())):
        line = fails(command, its)
        assert line == (
            "error: NEFKERN_BACKEND=abacus: expected one of cuda, triton, cpu, reference, auto"
        )
    if backends.why_not("cuda"):
        monkeypatch.setenv("NEFKERN_BACKEND", "cuda")
        assert "NEFKERN_BACKEND=cuda: not available: " in fails(train.main, arguments())
        assert info.main([]) == 0
        assert "backends (now: cuda)" in capsys.readouterr().out


def test_help_waits_for_no_torch():
    code = (
        "import sys, nefkern.train as t\n"
        "try: t.main(['--help'])\n"
        "except SystemExit as e: assert e.code in (0, None)\n"
        "heavy = {'torch', 'timm', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    process = python("-c", code)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "--num-eigenfunctions" in out


def test_operators_do_not_import_the_pipeline():
    code = (
        "import sys, nefkern.ops, nefkern\n"
        "heavy = {'timm', 'torchvision', 'matplotlib', 'tensorboard', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from nefkern import Segmenter, backend"
    )
    process = python("-c", code)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err


def test_a_folder_that_is_gone_is_one_line(fails, tmp_path, capsys):
    """As when somebody removes a run while it is written."""
    from nefkern.runtime.errors import command

    gone = tmp_path / "gone" / "report.html"
    line = fails(command(lambda arguments: gone.write_text("")), [])
    assert line == f"error: cannot read or write {gone}: No such file or directory"


@pytest.mark.long
def test_a_terminal_without_greek(arguments, photos):
    """Names, κ and ψ are shown as far as it can, and files are UTF-8 nevertheless."""
    pictures = photos / "images" / "train"
    (pictures / "0.png").rename(pictures / "äγ.png")
    (photos / "classes.txt").write_text("grüß\n", "utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for its in (["evaluate", "--help"], ["train", *arguments()], ["train", *arguments("--resume")]):
        process = python("-m", f"nefkern.{its[0]}", *its[1:], **locale)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        assert "Traceback" not in out + err


def test_a_reader_that_leaves_early_sees_no_traceback():
    shell = f"{sys.executable} -m nefkern.info | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stdout == "versions\n"
    assert done.stderr == ""
