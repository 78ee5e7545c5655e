"""names.yaml: read back as written, merged by name, and every mistake told with its entry."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from nefkern.naming.names import Names, fingerprint, parse_names, read_names, write_names
from nefkern.runtime.errors import UserError
from nefkern.segmentation.pictures import palette

HAND_WRITTEN = """
clusters: 6
classes:
  - {name: road, colour: '#102030'}
  - water
names:
  4: sky
  0: road
  2: sky
"""


def test_hand_written(tmp_path):
    path = tmp_path / "names.yaml"
    path.write_text(HAND_WRITTEN)
    names = read_names(path)
    assert names.classes == ["road", "water", "sky"]
    assert names.class_of().tolist() == [0, 255, 2, 255, 2, 255]
    assert names.palette()[0].tolist() == [16, 32, 48]
    assert len({tuple(c) for c in names.palette().tolist()}) == 3


@pytest.mark.parametrize(
    "name",
    [
        "yes",
        "12",
        "a: b",
        "- x",
        "été 空 🚗",
        "'\"",
        "#1",
        "<b>&",
        "~",
        "a\u00a0b",
        "می\u200cخواهم",
    ],
)
def test_written_names_are_read_back(tmp_path, name):
    names = Names(8, {3: name, 5: "b", 7: name}, {"b": "#00ff00"}, "0123456789012345")
    write_names(tmp_path / "n.yaml", names)
    again = read_names(tmp_path / "n.yaml")
    assert (again.names, again.classes) == (names.names, ["b", name])
    assert again.checkpoint == names.checkpoint
    assert np.array_equal(again.palette(), names.palette())


def test_a_given_colour_is_not_given_twice():
    taken = "#{:02x}{:02x}{:02x}".format(*palette(1)[0])
    colours = Names(3, {0: "a", 1: "b"}, {"b": taken}).palette().tolist()
    assert colours[0] == palette(1)[0].tolist()
    assert colours[1] != colours[0]


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("[1, 2]", "expected the entries clusters, checkpoint"),
        ("", "expected the entries clusters, checkpoint, classes, names, got nothing"),
        ("names: {0: a}", "clusters: expected how many the run has, got None"),
        ("clusters: true", "clusters: expected how many the run has, got True"),
        ("clusters: 4\nnmaes: {}", "nmaes: no such entry"),
        ("clusters: 4\nnames: [a]", "names: expected cluster: name, got list"),
        ("clusters: 4\nnames: {4: a}", "names: 4: expected a cluster, 0 to 3"),
        ("clusters: 4\nnames: {-1: a}", "names: -1: expected a cluster, 0 to 3"),
        ("clusters: 4\nnames: {x: a}", "names: 'x': expected a cluster"),
        ("clusters: 4\nnames: {1: a, 1: b}", "1 comes twice"),
        ("clusters: 4\nnames: {1: a, '1': b}", "comes twice"),
        ("clusters: 4\nnames: {2: yes}", "names: 2: expected a name, got True; in quotes"),
        ("clusters: 4\nnames: {2: ' a'}", "names: 2: expected 1 to 200 characters"),
        ('clusters: 4\nnames: {2: "a\\nb"}', "names: 2: expected 1 to 200 characters"),
        ("clusters: 4\nnames: {2: ''}", "names: 2: expected 1 to 200 characters"),
        ('clusters: 4\nnames: {2: "a\\eb"}', "names: 2: expected 1 to 200 characters"),
        ('clusters: 4\nnames: {2: "a\\Pb"}', "names: 2: expected 1 to 200 characters"),
        ("clusters: 4\nclasses: {a: b}", "classes: expected a list, got dict"),
        ("clusters: 4\nclasses: [a, a]", "classes: entry 2: the name 'a' is there already"),
        ("clusters: 4\nclasses: [{name: a, colour: red}]", "classes: entry 1: colour: expected"),
        ("clusters: 4\nclasses: [{nam: a}]", "classes: entry 1: expected a name and a colour"),
        ("clusters: 4\nclasses: [{colour: '#000000'}]", "classes: entry 1: expected a name, got"),
        ("clusters: 4\ncheckpoint: 12", "checkpoint: expected text in quotes, got 12"),
        ("clusters: {", "not YAML"),
        ("clusters: !!python/object:os.system {}", "not YAML"),
    ],
)
def test_a_mistake_names_file_and_entry(tmp_path, text, entry):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_names(path)
    assert str(error.value).startswith(f"{path}: ")
    assert entry in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_binary_files(tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00\x80")
    for path, entry in ((tmp_path / "no", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=entry):
            read_names(path)
    with pytest.raises(UserError, match="not YAML"):
        read_names(tmp_path / "b")


def test_as_many_classes_as_an_index_image_holds():
    content = {"clusters": 300, "names": {i: f"n{i}" for i in range(255)}}
    assert len(parse_names(content, "x").palette()) == 255
    content["names"][255] = "one more"
    with pytest.raises(UserError, match="names: 256 different ones, expected at most 255"):
        parse_names(content, "x")


def test_names_of_another_training_are_refused(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"a")
    mine = fingerprint(tmp_path)
    names = Names(4, {}, {}, mine)
    names.require_run("n", 4, mine)
    with pytest.raises(UserError, match="n: clusters: names those of a run of 4, this run has 5"):
        names.require_run("n", 5, mine)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"b")
    with pytest.raises(UserError, match="n: checkpoint: names the clusters of another training"):
        names.require_run("n", 4, fingerprint(tmp_path))
    Names(4, {}).require_run("n", 4, fingerprint(tmp_path))


def test_json_keys_are_numbers_again():
    names = parse_names({"clusters": 3, "names": {"2": "a"}}, "page")
    assert names.names == {2: "a"}
    assert yaml.safe_load(yaml.safe_dump(names.as_dict()))["names"] == {2: "a"}
