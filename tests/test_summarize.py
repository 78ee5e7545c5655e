import json

import pytest

from nefkern import summarize


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


def test_a_method_scored_twice_alike_counts_once(tmp_path):
    run = scored(tmp_path / "a", 0.2, 0.5)
    scored(run, 0.2, 0.5, "evaluation-set-val-crop320-2.json", methods=["ours", "kmeans"])
    (scores,) = summarize.collect([run]).values()
    assert len(scores) == 1


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
