"""The reproduce command: the paper's numbers, the commands it makes of them, and what it runs."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern import eigenmaps, evaluate, train
from nefkern.evaluation.evaluator import Evaluator
from nefkern.evaluation.honesty import Honesty
from nefkern.reproduce import main, parser
from nefkern.reproduction.paper import TABLES
from nefkern.reproduction.planning import Planner
from nefkern.reproduction.rendering import as_dict, markdown
from nefkern.reproduction.running import Measured
from nefkern.runtime.errors import UserError
from nefkern.segmentation.evaluation import match, matchings
from nefkern.segmentation.image_counts import ImageCounts
from nefkern.segmentation.methods import METHODS
from nefkern.summarize import Resampled
from nefkern.training.option_parsing import resolve
from nefkern.training.presets import CLASSES
from nefkern.training.runs import CHECKPOINT, Run
from nefkern.training.step import TrainingStep
from tests.training.outcomes import stop_after

TINY = (
    '--train="--backbone test_vit --weights random --crop 64 --k 8 --epochs 1 --batch-size 2 '
    '--workers 0 --pictures 0 --heads 3 --mlp-hidden 96" '
    '--evaluate="--size 48 --pictures 0" --scale-K 0.125'
)


@pytest.fixture(scope="module")
def scenes(photograph, tmp_path_factory):
    """An annotated data set of three classes, 4 training and 2 validation images."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for n in range(count):
            photograph(70, 80, n).save(root / "images" / split / f"{n}.png")
            mask = np.arange(80)[:, None] // 30 * np.ones((1, 70), int)
            Image.fromarray(mask.astype(np.uint8)).save(root / "annotations" / split / f"{n}.png")
    (root / "classes.txt").write_text("top\nmiddle\nbottom\n")
    return root


@pytest.fixture
def reproduce(scenes, tmp_path):
    """reproduce("5 K64", ...): the exit code of a tiny run on the scenes."""

    def run(*texts: str) -> int:
        arguments = shlex.split(" ".join([TINY, *texts]))
        where = ["--data", "folder", "--data-root", str(scenes), "--out", str(tmp_path / "out")]
        return main([*arguments, *where])

    return run


@pytest.fixture
def counted(monkeypatch):
    """What was really done: "step" and "evaluation" in order."""
    done = []
    step, run = TrainingStep.__call__, Evaluator.run
    monkeypatch.setattr(TrainingStep, "__call__", lambda *a: done.append("step") or step(*a))
    monkeypatch.setattr(Evaluator, "run", lambda *a: done.append("evaluation") or run(*a))
    return done


def planned(line: str):
    return Planner(parser().parse_args(shlex.split(line)))


def commands(output: str) -> list[tuple[str, list[str]]]:
    """(command, its arguments) of every line of a dry run."""
    parts = [shlex.split(line) for line in output.splitlines()]
    assert all(part[:2] == ["python", "-m"] for part in parts)
    return [(part[2], part[3:]) for part in parts]


# ---- the paper ----


@pytest.mark.parametrize(
    ("table", "row", "method", "accuracy", "mean_iou"),
    [
        ("1", "vit-s", "ours", 70.4, 38.8),
        ("1", "vit-l", "kmeans", 45.3, 19.3),
        ("2", "vit-b", "ours*", 84.2, 30.7),
        ("3", "cityscapes", "ours*", 88.3, 52.8),
        ("4", "ade20k", "kmeans", 50.7, 19.2),
        ("5", "K128", "ours", 71.6, 33.2),
        ("6", "cityscapes-alpha0.7", "ours", None, 27.9),
        ("7", "beta0.16", "ours*", None, 39.3),
        ("8", "cityscapes", "ours", 81.2, 18.5),
        ("9", "clip-l-336", "ours", None, 44.0),
    ],
)
def test_numbers_of_the_paper(table, row, method, accuracy, mean_iou):
    assert dict(TABLES[table].rows[row].numbers)[method][:2] == (accuracy, mean_iou)


def test_hungarian_beside_the_majority():
    numbers = TABLES["4.4"].rows["classes"].numbers
    found = [(n.matching, n.mean_iou) for _, n in numbers]
    assert found == [("hungarian", 23.5), ("iou", 27.7)], "by count, as the authors match"


def test_settings_that_tables_share_have_the_same_numbers():
    ours = dict(TABLES["1"].rows["vit-s"].numbers)["ours"]
    for number, row, name in (
        ("1", "vit-s", "figure-2"),
        ("4", "ade20k", "figure-3"),
        ("2", "vit-s", "figure-cityscapes"),
    ):
        table, figure = TABLES[number], TABLES[name]
        shown = dict(figure.rows[row].numbers)
        assert dict(table.rows[row].numbers).items() >= shown.items()
        assert (figure.protocol, figure.rows[row].data) == (table.protocol, table.rows[row].data)
        assert "ours" in shown
    assert dict(TABLES["5"].rows["K256"].numbers)["ours"] == ours
    for table, row in (("6", "pascal_context-alpha0.3"), ("7", "beta0.08")):
        assert dict(TABLES[table].rows[row].numbers)["ours"].mean_iou == ours.mean_iou


@pytest.mark.parametrize(
    ("table", "cited"),
    [
        ("1", {"MaskCLIP": 25.5, "MaskCLIP+": 31.1, "ReCo": 27.2}),
        ("2", {"MaskCLIP": 10.0, "ReCo": 19.3, "ReCo+": 24.2}),
        ("4", {}),
    ],
)
def test_methods_that_the_paper_cites(table, cited):
    assert {other.method: other.mean_iou for other in TABLES[table].cited} == cited
    assert {c.data for c in TABLES[table].cited} <= {r.data for r in TABLES[table].rows.values()}


def test_the_supervised_bound_of_both_data_sets():
    found = {other.data: other.mean_iou for other in TABLES["3"].cited}
    assert found == {"pascal_context": 48.5, "cityscapes": 77.3}


def test_every_method_is_one_of_evaluate():
    assert {m for t in TABLES.values() for r in t.rows.values() for m in r.methods} <= set(METHODS)


# ---- the commands ----


def test_dry_run_lines_are_commands(capsys):
    assert main(["all", "--data-root", "DIR", "--dry-run", "--seeds", "2"]) == 0
    lines = commands(capsys.readouterr().out)
    trained, scored, drawn = [], [], []
    for command, arguments in lines:
        if command == "nefkern.train":
            flags = vars(train.parser().parse_args(arguments))
            trained.append(resolve(flags, flags.pop("config")))
            assert trained[-1].resume
        elif command == "nefkern.eigenmaps":
            drawn.append(eigenmaps.parser().parse_args(arguments))
            eigenmaps.check(drawn[-1])
        else:
            scored.append(evaluate.parser().parse_args(arguments))
            evaluate.check(scored[-1])
            assert evaluate.chosen_methods(scored[-1])
    assert len({options.out for options in trained}) == len(trained)
    assert {str(options.run) for options in scored} == {options.out for options in trained}
    # Of 36 rows 9 repeat the training of table 1 or 2's ViT-S (3, 5, 6, 7, the figures), one that
    # of table 4, one that of table 8.
    assert len(trained) == 2 * (sum(len(t.rows) for t in TABLES.values()) - 11)
    assert {str(options.run) for options in drawn} == {trained[0].out, trained[1].out}
    # Only table 3's two rows and table 8's second score a run anew.
    assert len(scored) == len(trained) + 2 * 3


def test_rows_become_the_papers_settings():
    planner = planned("all --data-root DIR")

    def options(table, row):
        job = planner.job(TABLES[table], TABLES[table].rows[row], [], 1)
        return job.train_options(), job.evaluate_options()

    trained, scored = options("4", "ade20k")
    assert (trained.num_eigenfunctions, trained.epochs, trained.crop) == (512, 20, 512)
    assert (trained.data_root, scored.protocol, scored.seed) == ("DIR/ade20k", "sliding", 1)
    trained, scored = options("8", "cityscapes")
    assert (trained.data, trained.epochs, scored.data) == ("imagenet", 5, "cityscapes")
    assert str(scored.data_root) == "DIR/cityscapes"
    trained, _ = options("6", "cityscapes-alpha0")
    assert (trained.alpha, trained.beta, trained.crop, trained.seed) == (0, 0.08, 768, 1)
    trained, _ = options("4.4", "classes")
    assert trained.num_eigenfunctions == CLASSES["pascal_context"]["crop320"]


def test_given_options_win_and_what_rows_compare_takes_one_row(capsys):
    line = "--data-root DIR --dry-run --train"
    assert main(["1", "vit-b", *line.split(), "--backbone test_vit --amp"]) == 0
    (_, arguments), (_, _) = commands(capsys.readouterr().out)
    assert arguments.count("--backbone") == 1
    assert train.parser().parse_args(arguments).backbone == "test_vit"
    assert main(["1", *line.split(), "--backbone test_vit --amp"]) == 2
    message = "--train: --backbone is what these rows compare; name a single row, such as 1 vit-s"
    assert message in capsys.readouterr().err
    assert main(["5", *line.split(), "--backbone test_vit --amp"]) == 0


def test_methods_beside_those_of_the_paper(capsys):
    line = ["7", "beta0.08", "--data-root", "DIR", "--dry-run", "--also", "hidden, deep-spectral"]
    assert main(line) == 0
    _, (_, scored) = commands(capsys.readouterr().out)
    assert evaluate.parser().parse_args(scored).methods == "ours,ours*,deep-spectral"


def test_transfer_between_two_folders(capsys):
    line = ["8", "pascal_context", "--data", "folder", "--data-root", "photos", "--dry-run"]
    assert main(line) == 2
    assert "--transfer-root: table 8 trains on --data-root" in capsys.readouterr().err
    assert main([*line, "--transfer-root", "voc"]) == 0
    trained, scored = commands(capsys.readouterr().out)
    assert train.parser().parse_args(trained[1]).data_root == "photos"
    assert str(evaluate.parser().parse_args(scored[1]).data_root) == "voc"


def test_as_many_clusters_as_the_folder_has_classes(scenes):
    line = f"4.4 --data folder --data-root {shlex.quote(str(scenes))} --scale-K 0.5"
    row = TABLES["4.4"].rows["classes"]
    job = planned(line).job(TABLES["4.4"], row, [row], 0)
    assert job.train_options().num_eigenfunctions == 3
    job = planned(f"{line} --evaluate='--ignore-class top'").job(TABLES["4.4"], row, [row], 0)
    assert job.train_options().num_eigenfunctions == 2


# ---- running ----


def test_two_rows_and_again_nothing(reproduce, counted, tmp_path, capsys):
    assert reproduce("5 K64 K128 --seeds 2") == 0
    assert counted == ["step", "step", "evaluation"] * 4
    text = (tmp_path / "out" / "table-5.md").read_text("utf-8")
    assert text in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "table-5.json").read_text("utf-8"))["rows"]
    assert [row["paper"]["mean_iou"] for row in rows] == [27.8, 33.2]
    for row, k in zip(rows, (8, 16), strict=True):
        assert [Run(run).options().num_eigenfunctions for run in row["runs"]] == [k, k]
        assert [Run(run).options().seed for run in row["runs"]] == [0, 1]
        found = [
            json.loads(next(Run(r).folder.glob("eval*.json")).read_text("utf-8"))
            for r in row["runs"]
        ]
        scores = [f["methods"]["ours"]["stages"]["none"]["matchings"]["iou"] for f in found]
        assert row["measured"]["mean_iou"] == [100 * s["mean_iou"] for s in scores]
        assert row["measured"]["accuracy"] == [100 * s["accuracy"] for s in scores]
    a, b = rows[0]["measured"]["mean_iou"]
    between = rows[0]["intervals"]["same"]["interval"]["mean_iou"]
    interval = ", ".join(f"{100 * bound:.1f}" for bound in between)
    cell = f"{(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f} [{interval}]"
    assert f"| 27.8 | {cell} | 2 |" in text
    assert "in place of the paper's data sets" in text
    assert "K: the paper's times 0.125." in text
    assert "--backbone test_vit in place of the rows' own." in text

    counted.clear()
    assert reproduce("5 K64 K128 --seeds 2") == 0
    assert counted == []
    assert (tmp_path / "out" / "table-5.md").read_text("utf-8") == text

    checkpoint = Run(rows[0]["runs"][0]).path(CHECKPOINT)  # a score of an older one doesn't count
    checkpoint.write_bytes(checkpoint.read_bytes())
    assert reproduce("5 K64 K128 --seeds 2") == 0
    assert counted == ["evaluation"]


def test_a_method_without_a_number_of_the_paper(reproduce, tmp_path):
    assert reproduce("5 K64 --also kmeans") == 0
    ours, kmeans = json.loads((tmp_path / "out" / "table-5.json").read_text("utf-8"))["rows"]
    assert (ours["method"], kmeans["method"]) == ("ours", "kmeans")
    assert kmeans["paper"] == {"accuracy": None, "mean_iou": None}
    (measured,) = kmeans["measured"]["mean_iou"]
    text = (tmp_path / "out" / "table-5.md").read_text("utf-8")
    bounds = r" \[[\d.]+, [\d.]+\]"
    assert re.search(
        rf"\| kmeans \| IoU vote \|  \| [\d.]+{bounds} \|  \| {measured:.1f}{bounds} \| 1 \|", text
    )


# ---- how sure ----


def scored(row: str, wrong: dict[str, list[int]], seeds: int = 1, images: str = "same") -> Measured:
    """A row of table 5 whose methods have so many wrong pixels of 200 in each image."""
    result, stage = Measured(TABLES["5"].rows[row].beside(list(wrong))), {}
    for seed in range(seeds):
        honesty = Honesty(torch.full((len(next(iter(wrong.values()))),), 200), 300, 2)
        for name, pixels in wrong.items():
            counts = ImageCounts(2, 2)
            for w in pixels:
                counts.add(torch.tensor([[100 - w - seed, 0], [w + seed, 100]]))
            matched = match(counts.total())
            told = honesty.add(name, "none", counts, matched, lambda table: matchings(table)[0])
            stage[name] = {"stages": {"none": matched.as_dict(["a", "b"]) | told}}
        result.evaluations.append({"settings": {"crf": None}, "methods": dict(stage)})
        result.resampled.append(Resampled(images, honesty.estimates))
    return result


def told(*measured: Measured) -> tuple[str, list[dict]]:
    """Text and differences of table 5 with these rows."""
    arguments = TABLES["5"], list(measured), planned("5 --data-root DIR")
    return markdown(*arguments, "command"), as_dict(*arguments)["differences"]


FEW, MANY, MIXED = [10, 11, 9, 10, 12, 10], [30, 31, 29, 30, 32, 30], [11, 9, 10, 12, 8, 11]


def test_rows_and_methods_that_the_images_tell_apart():
    text, found = told(
        scored("K64", {"ours": MANY, "kmeans": MANY}, seeds=2), scored("K128", {"ours": FEW}, 2)
    )
    methods, rows = found
    assert (methods["first"], methods["second"]) == (
        {"row": "K64", "method": "ours"},
        {"row": "K64", "method": "kmeans"},
    )
    assert (rows["first"]["row"], rows["second"]["row"], rows["images"]) == ("K64", "K128", "cross")
    assert rows["mean_iou"]["differs"]
    assert not methods["mean_iou"]["differs"]
    low, high = rows["mean_iou"]["interval"]
    assert 0 < low <= rows["mean_iou"]["difference"] <= high
    assert re.search(r"\| K = 128 - K = 64 \| IoU vote \| \+10.0 \[.*\] \| higher \|", text)
    assert re.search(r"\| kmeans - ours \| IoU vote \| .*0.0 \[.*\] \| not told apart \|", text)
    assert "only if their interval excludes 0" in text


def test_rows_that_the_images_do_not_tell_apart():
    text, (difference,) = told(scored("K64", {"ours": FEW}), scored("K128", {"ours": MIXED}))
    assert not difference["mean_iou"]["differs"]
    assert "not told apart | " in text


def test_rows_of_other_images_or_without_resamples_are_not_compared():
    one = scored("K64", {"ours": MANY})
    bare = scored("K128", {"ours": FEW})
    bare.resampled = [None]
    for other in (scored("K128", {"ours": FEW}, images="other"), bare):
        text, found = told(one, other)
        assert not found
        assert "| difference |" not in text
    text, _ = told(bare)
    assert re.search(r"\| ours \| IoU vote \| 71.6 \| [\d.]+ \| 33.2 \| [\d.]+ \| 1 \|", text)


def test_seeds_scored_on_different_images_have_no_common_interval():
    result = scored("K64", {"ours": MANY}, seeds=2)
    result.resampled[1] = result.resampled[1]._replace(images="other")
    text, _ = told(result)
    assert re.search(r"\| 27.8 \| [\d.]+ ± [\d.]+ \| 2 \|", text)


def test_a_damaged_score_fails_its_row_in_a_line(reproduce, tmp_path, capsys):
    assert reproduce("5 K64") == 0
    (file,) = (tmp_path / "out").glob("scenes-*/evaluation-*.json")
    file.write_text(file.read_text("utf-8")[:100], "utf-8")
    capsys.readouterr()
    assert reproduce("5 K64") == 2
    assert f"error: table 5, K64, seed 0: {file}: expected scores" in capsys.readouterr().err


@pytest.mark.long
def test_only_what_is_missing_is_done(reproduce, counted, tmp_path, monkeypatch):
    """Another table scores the run anew, with a method more; a half-trained run goes on."""
    assert reproduce("5 K256") == 0
    counted.clear()
    assert reproduce("7 beta0.08") == 0
    assert counted == ["evaluation"]
    assert len(list((tmp_path / "out").glob("scenes-*"))) == 1
    counted.clear()
    assert reproduce("5 K256") == 0
    assert counted == []

    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert reproduce("6 pascal_context-alpha0.5") == 130
    assert counted == ["step"]
    assert reproduce("6 pascal_context-alpha0.5") == 0
    assert counted == ["step", "step", "evaluation"]


@pytest.mark.long
def test_a_figure_is_a_picture_of_table_1(reproduce, counted, tmp_path, capsys):
    assert reproduce("1 vit-s --evaluate='--size 48 --pictures 1'") == 0
    counted.clear()
    asked = "figure-2 --evaluate='--size 48 --pictures 2'"
    assert reproduce(asked) == 0
    assert counted == ["evaluation"], "the run is table 1's; a picture more is to be drawn"
    sheet = Image.open(tmp_path / "out" / "figure-2.png")
    panels, rows = 2 + 2, 2
    assert sheet.width == 48 * panels + 8 * (panels - 1)
    assert 0 < sheet.height - (48 * rows + 8 * (rows - 1)) < 40, "and heads above them"
    text = (tmp_path / "out" / "figure-2.md").read_text("utf-8")
    assert "**Figure 2: segments on Pascal Context" in text
    assert "![figure 2](figure-2.png)" in text
    counted.clear()
    assert reproduce(asked) == 0
    assert counted == []


@pytest.mark.long
def test_figure_3_has_the_result_beside_the_image(reproduce, counted, tmp_path):
    """Table 4's run and scores, at the images' own resolution; no annotation between."""
    sliding = "--scale-K 0.03 --evaluate='--window 64 --stride 64 --pictures 2'"
    assert reproduce(f"4 {sliding}") == 0
    counted.clear()
    assert reproduce(f"figure-3 {sliding}") == 0
    assert counted == []
    sheet = np.array(Image.open(tmp_path / "out" / "figure-3.png"))
    assert sheet.shape[1] == 70 * 2 + 8
    photo = np.array(Image.open(next((tmp_path / "out").glob("*/*/000-image-*.png"))))
    first = sheet[-(80 * 2 + 8) :][:80]
    assert (first[:, :70] == photo[:, :70]).all(), "the image"
    ours = photo[:, 3 * 78 :][:, :70]  # after image, annotation and K-means
    assert (first[:, -70:] == ours).all()


@pytest.mark.long
def test_the_appendix_s_eigenfunctions(reproduce, counted, tmp_path, capsys):
    """Of the run of table 1: trained, not scored."""
    asked = "figure-eigenfunctions --evaluate='--size 48 --pictures 2'"
    assert reproduce(asked) == 0
    assert counted == ["step", "step"]
    (folder,) = (tmp_path / "out").glob("scenes-*/eigenmaps")
    assert sorted(path.name for path in folder.iterdir()) == [f"{i}.eigenmaps.png" for i in (0, 1)]
    single = [Image.open(path) for path in sorted(folder.iterdir())]
    sheet = Image.open(tmp_path / "out" / "figure-eigenfunctions.png")
    assert sheet.size == (single[0].width, 8 + sum(picture.height for picture in single))
    text = (tmp_path / "out" / "figure-eigenfunctions.md").read_text("utf-8")
    assert "![figure eigenfunctions](figure-eigenfunctions.png)" in text
    assert "CRF" not in text
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("crf", "heading", "note"),
    [
        ("", "measured: without a CRF)", "Measured without a CRF. The paper's numbers are after"),
        ("--crf clusters", "measured: after a CRF on clusters)", "as the paper's numbers are."),
        ("--crf classes", "measured: after a CRF on classes)", '`--evaluate="--crf clusters"`'),
    ],
)
def test_a_table_says_with_or_without_a_crf_and_what_is_cited(crf, heading, note):
    planner = planned(f"1 --data-root DIR --evaluate='{crf}'")
    measured = [Measured(TABLES["1"].rows["vit-b"])]
    text = markdown(TABLES["1"], measured, planner, "command")
    assert f"(protocol crop320, %; paper: after a CRF on clusters, {heading}" in text
    assert note in text
    assert "the authors' CRF saw black images" in text
    assert "| Pascal Context | MaskCLIP+ | cited | | | 31.1 | | |" in text
    assert "Cited: numbers of others" in text
    content = as_dict(TABLES["1"], measured, planner)
    assert content["crf"] == {"paper": "clusters", "measured": crf.removeprefix("--crf ") or None}
    assert content["cited"][0] == {"method": "MaskCLIP", "data": "pascal_context", "mean_iou": 25.5}


def test_cited_numbers_are_those_of_the_rows_shown():
    planner = planned("3 --data-root DIR")
    text = markdown(TABLES["3"], [Measured(TABLES["3"].rows["cityscapes"])], planner, "command")
    assert "| Cityscapes | DeepLabv3+, supervised | cited | | | 77.3 | | |" in text
    assert "48.5" not in text
    assert "black" not in text, "it saw colours in protocol B"
    text = markdown(TABLES["4"], [Measured(TABLES["4"].rows["ade20k"])], planner, "command")
    assert "cited" not in text.lower()


def test_a_failing_row_does_not_stop_the_others(reproduce, tmp_path, capsys):
    assert reproduce("5 K512 K64") == 2  # K = 64 of 32 patches, then K = 8
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: table 5, K512, seed 0: --num-eigenfunctions 64: expected")
    first, second = json.loads((tmp_path / "out" / "table-5.json").read_text("utf-8"))["rows"]
    assert first["measured"]["mean_iou"] == []
    assert first["error"] in out
    assert len(second["measured"]["mean_iou"]) == 1


def test_missing_data_is_told_once_a_row(tmp_path, capsys):
    line = ["3", "--data-root", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert main([*line, "--seeds", "2"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert [error.split(": ")[1].split(", ")[1] for error in errors] == [
        "pascal_context", "cityscapes",
    ]  # fmt: skip


# ---- mistakes ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "TABLE: expected one of 1, 2,"),
        ("10 --data-root D", "got 10"),
        ("5 K65 --data-root D", "ROW: table 5 has K64, K128, K256, K512; got K65"),
        ("all K64 --data-root D", "expected a single TABLE"),
        ("5", "--data-root: expected the folder"),
        ("5 --data-root D --seeds 0", "--seeds 0: expected at least 1"),
        ("5 --data-root D --scale-K 0", "--scale-K 0.0: expected more than 0"),
        ("5 --data-root D --also kmean", "--also: expected names among ours,"),
        ("5 --data-root D --train='--lr fast'", "--lr: invalid float value: 'fast'"),
        ("5 --data-root D --train='--seed 3'", "--train: --seed is for this command to set"),
        ("5 --data-root D --evaluate='--limt 3'", "unrecognized arguments: --limt"),
        ("5 --data-root D --evaluate=--untrained", "--evaluate: --untrained is for this command"),
        ("""5 --data-root D --train="--out 'x" """, "No closing quotation"),
    ],
)
def test_mistakes_are_told_in_one_line(line, message, capsys):
    assert main([*shlex.split(line), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_under_torchrun(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["5", "--data-root", "D", "--out", str(tmp_path / "out")]) == 2
    assert "torchrun: expected for the lines of --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list_and_help(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for table in TABLES.values() for name in table.rows)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--scale-K" in capsys.readouterr().out


SPECTRAL = (
    '--train="--method spectral --backbone test_vit --weights random --crop 64 --k 8 --pictures 0" '
    '--evaluate="--size 48 --pictures 0" --scale-K 0.125'
)


def test_rows_of_spectral_runs(scenes, tmp_path):
    where = ["--data", "folder", "--data-root", str(scenes), "--out", str(tmp_path / "out")]
    assert main([*shlex.split(f"1 vit-s {SPECTRAL}"), *where]) == 0
    row = json.loads((tmp_path / "out" / "table-1.json").read_text("utf-8"))["rows"][0]
    run = Run(row["runs"][0])
    assert run.folder.name == "scenes-test_vit-spectral-K32-seed0"
    assert run.options().method == "spectral"
    assert run.is_trained(run.options())


def test_what_a_spectral_run_has_not_cannot_be_compared(scenes):
    line = f"7 --data folder --data-root {shlex.quote(str(scenes))} {SPECTRAL}"
    row = next(iter(TABLES["7"].rows.values()))
    with pytest.raises(UserError, match=r"--method spectral has no --beta, which table 7 compares"):
        planned(line).job(TABLES["7"], row, [row], 0)
