"""Options: flags over YAML over the preset over the paper's defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from nefkern.images.graph import GraphConfig
from nefkern.images.layers import Layer, parse_high, parse_input_size
from nefkern.runtime.errors import UserError
from nefkern.train import parser
from nefkern.training.option_parsing import read_config, resolve
from nefkern.training.options import TrainOptions, parse_pairs
from nefkern.training.presets import SAMPLES, SPECTRAL

FIELDS = dataclasses.fields(TrainOptions)


def given(*arguments: str) -> TrainOptions:
    flags = vars(parser().parse_args(arguments))
    return resolve(flags, flags.pop("config"))


@pytest.fixture
def config(tmp_path):
    def write(content) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def test_every_option_is_in_the_help_with_its_default():
    text = " ".join(parser().format_help().split())
    for f in FIELDS:
        assert f"--{f.name.replace('_', '-')}" in text, f.name
        if isinstance(f.default, bool):
            assert f"--no-{f.name.replace('_', '-')}" in text, f.name
    for shown in ("[256]", "[0.3]", "[10:2.0,5:0.1]", "[1.0:0.3]", "[0.001]", "[samples: 2%]",
                  "[cityscapes: 768]", "the authors' command for Cityscapes has 8",
                  "[ade20k: 512]", "[imagenet: 5]"):  # fmt: skip
        assert shown in text, shown
    assert "%%" not in text


def test_the_defaults_are_the_paper_s():
    options = given("--method", "neural", "--data", "folder", "--data-root", "x")
    assert options == TrainOptions(data="folder", data_root="x")
    paper = {
        "k": "256", "num_eigenfunctions": 256, "alpha": 0.3, "beta": 0.08, "t": 0.01, "lr": 1e-3,
        "final_lr": 1e-5, "epochs": 40, "batch_size": 16, "blocks": 2, "heads": 18, "head_dim": 64,
        "mlp_hidden": 576, "psi": "transformer", "crop": 480, "feature_map": "softmax",
        "orthogonal_head": True, "gumbel": True, "min_norm": 1.0, "views": 0, "augment": True,
        "amp": False,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in paper} == paper
    assert options.graph() == GraphConfig("256", 0.3)
    assert options.temperatures() == (1.0, 0.3)
    assert options.base_size() == 520


def test_samples_preset_applies_only_to_samples_and_gives_way_to_flags():
    assert given() == TrainOptions(**{**SAMPLES, **SPECTRAL}, method="spectral")
    assert given("--method", "neural") == TrainOptions(**SAMPLES)
    assert given("--crop", "111", "--no-amp").crop == 111
    assert given("--crop", "111", "--no-amp").amp is False
    assert given("--crop", "111").num_eigenfunctions == SAMPLES["num_eigenfunctions"]


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ((), "spectral"),
        (("--data", "folder", "--data-root", "x", "--alpha", "1", "--k", "9"), "spectral"),
        (("--standardize",), "spectral"),
        (("--epochs", "3"), "neural"),  # an option of ψ
        (("--k", "2%"), "neural"),  # a share of a batch
        (("--k", "2%", "--method", "spectral"), "spectral"),
        (("--no-gumbel",), "neural"),
        (("--data", "cityscapes", "--data-root", "x"), "neural"),  # the paper's
        (("--data", "cityscapes", "--data-root", "x", "--method", "spectral"), "spectral"),
        (("--method", "auto", "--lr", "1"), "neural"),
    ],
)
def test_the_method_where_none_is_asked_for(flags, method, caplog):
    caplog.set_level("INFO")
    options = given(*flags)
    assert options.method == method
    usual = SPECTRAL if method == "spectral" else {"high": "auto"}
    assert options.high == usual["high"]
    if "--epochs" in flags:
        assert "--method neural, since --epochs is an option of ψ" in caplog.text


def test_the_method_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert given().method == "neural"


def test_a_run_of_before_there_were_methods(config):
    assert given("--config", config({"options": {"crop": 64}})).method == "neural"
    once = given("--config", config({"options": {"method": "spectral", "num_eigenfunctions": 5}}))
    assert (once.eigenvectors, once.cluster_on, once.standardize) == (5, "vectors", False)


@pytest.mark.parametrize(
    ("data", "expected"),  # crop, resize, K, epochs of section 4.1
    [
        ("pascal_context", (480, 520, 256, 40)),
        ("cityscapes", (768, 1024, 256, 40)),
        ("ade20k", (512, 512, 512, 20)),
        ("imagenet", (480, 520, 256, 5)),
    ],
)
def test_presets_of_the_paper_s_data_sets(data, expected, config):
    def sizes(options):
        return options.crop, options.base_size(), options.num_eigenfunctions, options.epochs

    asked = ("--data", data, "--data-root", "x")
    assert sizes(given(*asked)) == expected
    assert given(*asked).backbone == TrainOptions().backbone
    own = ("--crop", "96", "--resize", "100", "-K", "9", "--epochs", "3")
    assert sizes(given(*asked, *own)) == (96, 100, 9, 3)
    by_file = config({"data": data, "data_root": "x", "crop": 64})
    assert sizes(given("--config", by_file)) == (64, *expected[1:])
    assert f"runs/{data}-" in str(given(*asked).run_folder())


def test_flags_win_over_yaml(config):
    path = config({"lr": 0.5, "epochs": 7, "k": 99, "strict": True, "amp": True})
    options = given("--config", path, "--lr", "0.25", "--no-strict")
    assert (options.lr, options.epochs, options.k, options.strict) == (0.25, 7, "99", False)
    assert options.amp is True


def test_yaml_accepts_dashes_shares_and_numbers_without_a_point(config):
    options = given("--config", config("batch-size: 3\nlr: 1e-3\nk: 2%\nalpha: 1\nresize: null\n"))
    assert (options.batch_size, options.lr, options.k) == (3, 1e-3, "2%")
    assert type(options.alpha) is float
    assert options.resize is None


def test_a_run_s_configuration_is_a_config(config):
    before = TrainOptions(data="folder", data_root="x", lr=3e-5, k="3%", resize=77, out="o")
    path = config({"options": dataclasses.asdict(before), "versions": {"torch": "2"}})
    assert given("--config", path) == before
    assert given("--config", path, "--seed", "4").seed == 4


@pytest.mark.parametrize(("dim", "heads", "hidden"), [(384, 18, 576), (768, 36, 1152), (8, 1, 12)])
def test_a_run_whose_heads_and_mlp_followed_the_backbone(config, dim, heads, hidden):
    """An earlier version's: heads that cover 3C channels, and mlp_ratio times C hidden ones."""
    content = {
        "options": {"data": "folder", "data_root": "x", "head_dim": 64, "mlp_ratio": 1.5},
        "backbone": {"dim": dim, "concat_dim": 3 * dim},
    }
    path = config(content)
    options = given("--config", path)
    assert (options.heads, options.head_dim, options.mlp_hidden) == (heads, 64, hidden)
    assert given("--config", path, "--heads", "5").heads == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mlp_ratio: 1.5", "mlp_ratio is an option no more: heads and mlp_hidden give the"),
        ("psi: recurrent", "psi: expected one of transformer, convolution"),
        ("colour: red", "unknown option 'colour'"),
        ("epochs: 2.5", "epochs: expected int, got 2.5"),
        ("epochs: true", "epochs: expected int, got True"),
        ("amp: 1", "amp: expected bool, got 1"),
        ("lr: fast", "lr: expected float, got 'fast'"),
        ("lr: null", "lr: expected float, got None"),
        ("backbone: [a]", "backbone: expected str"),
        ("feature_map: relu", "feature_map: expected one of softmax, elu"),
        ("- 1\n- 2", "expected a mapping"),
        ("options: 3", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [", "not a YAML file"),
    ],
)
def test_bad_yaml(config, content, message):
    path = config(content)
    with pytest.raises(UserError) as caught:
        read_config(Path(path))
    assert str(caught.value).startswith(f"--config {path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match=f"--config {path}: "):
            read_config(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not a YAML file"):
        read_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--crop 0", "--crop 0: expected at least 1"),
        ("--epochs 0", "--epochs 0: expected at least 1"),
        ("--batch-size -1", "--batch-size -1: expected at least 1"),
        ("--workers -1", "--workers -1: expected at least 0"),
        ("--heads 0", "--heads 0: expected at least 1"),
        ("--mlp-hidden 0", "--mlp-hidden 0: expected at least 1"),
        ("--psi recurrent", "argument --psi: invalid choice"),
        ("-K 1", "--num-eigenfunctions 1: expected at least 2"),
        ("--workers 257", "--workers 257: expected at most 256"),
        ("--seed -1", "--seed -1: expected at least 0"),
        (f"--seed {2**63}", f"--seed {2**63}: expected at most {2**63 - 1}"),
        ("--lr 0", "--lr 0.0: expected more than 0"),
        ("--lr nan", "--lr nan: expected more than 0"),
        ("--beta inf", "--beta inf: expected at least 0"),
        ("--alpha -1", "--alpha -1.0: expected"),
        ("--k none", "--k none: expected a number of neighbours"),
        ("--k 0", "--k 0: expected a number of neighbours"),
        ("--temperature 1", "--temperature 1: expected start:end"),
        ("--high last", "--high last: expected auto, or one or several, comma-separated, of final"),
        ("--high block:-1", "--high block:-1: expected auto, or"),
        ("--high block:9,", "--high block:9,: expected auto, or"),
        ("--high auto,final", "--high auto,final: expected auto, or"),
        ("--high final:2", "--high final:2: expected auto, or"),
        ("--input-size 0", "--input-size 0: expected auto, crop, native, or a number of pixels"),
        ("--input-size 1e3", "--input-size 1e3: expected auto"),
        ("--temperature 1:0", "--temperature 1:0: expected start:end"),
        ("--temperature nan:1", "--temperature nan:1: expected start:end"),
        ("--pixel-graphs 10", "--pixel-graphs 10: expected pairs"),
        ("--pixel-graphs 0:1", "--pixel-graphs 0:1.0: expected"),
        ("--data folder", "--data folder: expected --data-root DIR beside it"),
        ("--data ade20k", "--data ade20k: expected --data-root DIR beside it"),
        ("--data-root x", "--data-root x: expected --data folder beside it, or one of pascal"),
        ("--data cloud", "argument --data: invalid choice"),
        ("--lr fast", "argument --lr: invalid float value"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_flags_out_of_range(arguments, message):
    with pytest.raises(UserError) as caught:
        given(*arguments.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_high_maps():
    assert parse_high("auto") == ()
    assert parse_high("keys, block:8,block:11,final") == (
        *(Layer("keys"), Layer("block", 8), Layer("block", 11)),
        Layer("final"),
    )
    assert [str(layer) for layer in parse_high("keys:10,stage:2")] == ["keys:10", "stage:2"]


def test_input_sizes(config):
    assert [parse_input_size(text) for text in ("auto", "crop", "224", 336)] == [
        *("auto", "crop"),
        *(224, 336),
    ]
    asked = given("--config", config("high: block:9\ninput-size: 224\n"))
    assert (asked.high, asked.input_size) == ("block:9", "224")


def test_pairs():
    assert parse_pairs("--x", "10:2.0, 5:0.1") == ((10, 2.0), (5, 0.1))
    assert parse_pairs("--x", "") == ()


def test_run_folder_names():
    assert str(TrainOptions(backbone="hf/model").run_folder()) == "runs/samples-hf_model"
    named = TrainOptions(data="folder", data_root="/a/voc/", backbone="b")
    assert str(named.run_folder()) == "runs/voc-b"


@pytest.mark.parametrize("root", [".", "inside/.."])
def test_the_run_of_the_current_folder_has_its_name(root, tmp_path, monkeypatch):
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    options = TrainOptions(data="folder", data_root=root, backbone="b")
    assert str(options.run_folder()) == "runs/birds-b"
