import json

import pytest
import torch

from nefkern import summarize
from nefkern.evaluation.honesty import Honesty
from nefkern.segmentation.evaluation import match, matchings
from nefkern.segmentation.image_counts import ImageCounts


def scored(folder, accuracy, mean_iou, name="evaluation-set-val-crop320.json", **changed):
    folder.mkdir(exist_ok=True)
    trained = {"backbone": changed.pop("backbone", "vit"), "seed": 0, "out": str(folder)}
    trained |= changed.pop("options", {})
    (folder / "config.yaml").write_text(json.dumps({"options": trained}))  # JSON is YAML
    matchings = {"iou": {"accuracy": accuracy, "mean_iou": mean_iou}}
    settings = {"data_root": "data/set", "split": "val", "protocol": "crop320", "crf": None}
    settings |= {"ignored": [], "limit": None, "seed": 0, "methods": ["ours"]} | changed
    stages = {"none": {"matchings": matchings}}
    result = {"settings": settings, "methods": {"ours": {"stages": stages}}}
    (folder / name).write_text(json.dumps(result))
    return folder


def test_mean_and_sample_deviation_of_three_runs(tmp_path, capsys):
    runs = [scored(tmp_path / str(i), a, 0.5) for i, a in enumerate((0.2, 0.3, 0.4))]
    assert summarize.main([str(run) for run in runs]) == 0
    out = capsys.readouterr().out
    assert "**set-val-crop320**, 3 runs" in out
    assert "| ours | 30.0 ± 10.0 | 50.0 ± 0.0 |" in out


def test_one_run_has_no_spread(tmp_path):
    found = summarize.collect([scored(tmp_path / "a", 0.25, 0.125)])
    assert "| ours | 25.0 | 12.5 |" in summarize.table(found)


def test_different_evaluations_are_not_averaged(tmp_path):
    run = scored(tmp_path / "a", 0.1, 0.1)
    scored(run, 0.9, 0.9, "evaluation-set-val-crop320-2.json", ignored=["sky"])
    table = summarize.table(summarize.collect([run]))
    assert "| ours | 10.0 | 10.0 |" in table
    assert "| ours | 90.0 | 90.0 |" in table
    assert "**set-val-crop320, without sky**, 1 run, %" in table


def test_runs_trained_differently_are_not_averaged(tmp_path):
    runs = [scored(tmp_path / name, 0.1, 0.1, backbone=name) for name in ("vit", "cnn")]
    table = summarize.table(summarize.collect(runs))
    assert "**backbone vit; set-val-crop320**, 1 run, %" in table
    assert "**backbone cnn; set-val-crop320**, 1 run, %" in table


def test_an_option_that_an_older_run_does_not_know_had_its_default(tmp_path):
    older = scored(tmp_path / "older", 0.2, 0.5)
    default = scored(tmp_path / "default", 0.4, 0.5, options={"graph_features": "high"})
    other = scored(tmp_path / "other", 0.9, 0.9, options={"graph_features": "all"})
    table = summarize.table(summarize.collect([older, default, other]))
    assert "| ours | 30.0 ± 14.1 | 50.0 ± 0.0 |" in table
    assert "| ours | 90.0 | 90.0 |" in table


def test_what_is_averaged_is_told_by_the_settings_not_by_the_file(tmp_path):
    second = "evaluation-set-val-crop320-2.json"
    first = scored(tmp_path / "a", 0.2, 0.5, limit=9)
    other = scored(scored(tmp_path / "b", 0.9, 0.9), 0.4, 0.5, second, limit=9)
    table = summarize.table(summarize.collect([first, other]))
    assert "| ours | 30.0 ± 14.1 | 50.0 ± 0.0 |" in table
    assert "| ours | 90.0 | 90.0 |" in table


def test_edges_are_rows_and_boundaries_columns_of_a_table(tmp_path):
    """One run was scored without boundaries: their mean is over the others."""
    runs = []
    for name, f in (("a", 0.2), ("b", 0.4), ("c", None)):
        runs.append(scored(tmp_path / name, 0.25, 0.125, edges="graph"))
        file = runs[-1] / "evaluation-set-val-crop320.json"
        content = json.loads(file.read_text("utf-8"))
        stages = content["methods"]["ours"]["stages"]
        stages["graph"] = {"matchings": {"iou": {"accuracy": 0.5, "mean_iou": 0.25}}}
        stages["clusters"] = stages["none"]
        if f is not None:
            stages["graph"]["boundary"] = {"iou": {"f": f, "interval": {"f": None}}}
        file.write_text(json.dumps(content))
    table = summarize.table(summarize.collect(runs))
    assert "IoU vote: accuracy | mIoU | boundary F |" in table
    assert "| ours | 25.0 ± 0.0 | 12.5 ± 0.0 |  |" in table
    assert "| ours, graph | 50.0 ± 0.0 | 25.0 ± 0.0 | 30.0 ± 14.1 |" in table
    assert "| ours, CRF on clusters | 25.0 ± 0.0 |" in table
    assert "**set-val-crop320**, 3 runs" in table


def test_a_method_scored_twice_alike_counts_once(tmp_path):
    run = scored(tmp_path / "a", 0.2, 0.5)
    scored(run, 0.2, 0.5, "evaluation-set-val-crop320-2.json", methods=["ours", "kmeans"])
    (scores,) = summarize.collect([run]).values()
    assert len(scores) == 1


def test_a_run_that_is_given_twice_counts_once(tmp_path, capsys):
    """As by a pattern and a name."""
    runs = [str(scored(tmp_path / name, share, 0.5)) for name, share in (("a", 0.2), ("b", 0.4))]
    outputs = []
    for given in (runs, [*runs, f"{tmp_path}/b/../b"]):
        assert summarize.main(given) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_the_rows_of_a_table_are_equally_long(tmp_path):
    lines = summarize.table(summarize.collect([scored(tmp_path / "a", 0.1, 0.1)])).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_a_run_without_scores_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert summarize.main([str(tmp_path / "empty")]) == 2
    assert "empty: holds no scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff", b'{"settings": {}, "methods": 1}']
)
def test_damaged_scores_are_named(tmp_path, capsys, content):
    run = scored(tmp_path / "a", 0.1, 0.1)
    file = next(run.glob("evaluation-*.json"))
    file.write_bytes(content)
    assert summarize.main([str(run)]) == 2
    assert f"error: {file}: expected scores written by" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag, capsys):
    with pytest.raises(SystemExit):
        summarize.main([flag])
    assert "nefkern.evaluate" in capsys.readouterr().out


# ---- over the images ----

NAME = "evaluation-set-val-crop320"


def resampled(folder, wrong: dict[str, list[int]], size=100, bootstrap=300, backbone="vit"):
    """A run whose methods have so many wrong pixels of 2 * size in each image."""
    run = scored(folder, 0.5, 0.5, backbone=backbone)
    images = len(next(iter(wrong.values())))
    honesty, methods = Honesty(torch.full((images,), 2 * size), bootstrap, 2), {}
    for name, pixels in wrong.items():
        counts = ImageCounts(2, 2)
        for w in pixels:
            counts.add(torch.tensor([[size - w, 0], [w, size]]))
        matched = match(counts.total())
        told = honesty.add(name, "none", counts, matched, lambda table: matchings(table)[0])
        methods[name] = {"stages": {"none": matched.as_dict(["a", "b"]) | told}}
    content = json.loads((run / f"{NAME}.json").read_text("utf-8")) | {"methods": methods}
    (run / f"{NAME}.json").write_text(json.dumps(content))
    (run / f"{NAME}.npz").write_bytes(honesty.packed())
    return run


def cells(text: str, *first: str) -> list[str]:
    """The other cells of the row that begins so."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {' | '.join(first)} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][len(first) :]


def test_the_mean_over_runs_has_an_interval_and_so_has_the_difference(tmp_path):
    runs = [
        resampled(tmp_path / "0", {"ours": [10, 20, 30, 20], "kmeans": [30, 40, 50, 40]}),
        resampled(tmp_path / "1", {"ours": [20, 10, 20, 30], "kmeans": [20, 60, 20, 60]}),
    ]
    text = summarize.interval_table(summarize.collect_resampled(runs))
    accuracy, _, other, _ = cells(text, "ours", "count vote")
    assert accuracy.startswith("90.0 [")  # 20 of 200 pixels wrong on average, in both runs
    assert other.startswith("90.0 [")
    accuracy, said, *_ = cells(text, "kmeans - ours", "count vote")
    assert accuracy.startswith("-10.0 [-")  # 40 of 200
    assert said == "lower"


def test_what_the_runs_say_apart_is_no_difference(tmp_path):
    """In each run it would be one, with opposite signs; their mean is not."""
    runs = [
        resampled(tmp_path / "0", {"ours": [10] * 6, "kmeans": [30, 29, 31, 30, 30, 30]}),
        resampled(tmp_path / "1", {"ours": [30, 30, 30, 31, 29, 30], "kmeans": [10] * 6}),
    ]
    for run, said in zip(runs, ("lower", "higher"), strict=True):
        alone = summarize.interval_table(summarize.collect_resampled([run]))
        assert cells(alone, "kmeans - ours", "count vote")[1] == said
    text = summarize.interval_table(summarize.collect_resampled(runs))
    assert cells(text, "kmeans - ours", "count vote")[1] == "not told apart"


def test_settings_scored_on_the_same_images_are_told_apart(tmp_path):
    first = resampled(tmp_path / "0", {"ours": [30, 29, 31, 30, 30, 30]})
    second = resampled(tmp_path / "1", {"ours": [10] * 6}, backbone="cnn")
    text = summarize.interval_table(summarize.collect_resampled([first, second]))
    accuracy, said, *_ = cells(text, "backbone cnn", "backbone vit", "ours", "IoU vote")
    assert accuracy.startswith("+10.0 [+")
    assert said == "higher"


def test_settings_scored_on_other_images_are_not_compared(tmp_path):
    first = resampled(tmp_path / "0", {"ours": [10, 20, 30]})
    second = resampled(tmp_path / "1", {"ours": [10, 20, 30]}, size=90, backbone="cnn")
    text = summarize.interval_table(summarize.collect_resampled([first, second]))
    assert text.count("over the images") == 2
    assert "Differences between evaluations" not in text


def test_scores_of_other_images_have_no_common_interval(tmp_path):
    runs = [
        resampled(tmp_path / "0", {"ours": [10, 20, 30]}),
        resampled(tmp_path / "1", {"ours": [10, 20, 30]}, size=90),
    ]
    assert summarize.collect_resampled(runs) == {}
    assert summarize.main([str(run) for run in runs]) == 0


def test_damaged_resamples_are_named(tmp_path, capsys):
    run = resampled(tmp_path / "0", {"ours": [10, 20, 30]})
    (run / f"{NAME}.npz").write_bytes(b"PK")
    assert summarize.main([str(run)]) == 2
    assert f"{NAME}.npz: expected what python -m nefkern.evaluate wrote" in capsys.readouterr().err
