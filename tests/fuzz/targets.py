"""What is fuzzed: files of every kind that the library reads, through what reads them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from nefkern import segment, summarize
from nefkern.data.folder import open_folder
from nefkern.data.images import read_annotation, read_image
from nefkern.evaluation.report import write_report
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.loading import load_backbone
from nefkern.naming.names import read_names
from nefkern.runtime.errors import UserError
from nefkern.runtime.tensor_files import packed
from nefkern.segmentation import segmenter as segmenters
from nefkern.training.option_parsing import resolve
from nefkern.training.runs import CHECKPOINT, CONFIG, METRICS, Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.trainer import Trainer
from tests.fuzz.mutations import ODD, mutated_bytes, mutated_tree
from tests.fuzz.running import Attempt

SMALL = {
    "data": "folder", "backbone": "test_vit", "weights": "random", "crop": 32, "k": "3",
    "num_eigenfunctions": 4, "pictures": 1, "device": "cpu",
}  # fmt: skip
NEURAL = {"method": "neural", "epochs": 1, "batch_size": 2, "heads": 3, "mlp_hidden": 48,
          "workers": 0}  # fmt: skip


def refused(function: Callable[[], object]) -> str:
    """What a function that may raise UserError alone does: "taken" or "refused"."""
    try:
        function()
    except MemoryError:  # of this process's limit: the whole machine has more
        return "out of memory"
    except UserError as error:
        line = str(error)
        assert line, "an error without a word"
        return "refused"
    return "taken"


def told(main: Callable[[list[str]], int], arguments: list[str]) -> str:
    """What a command does: 0, or 2 and one line."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    if code == 0:
        return "taken"
    assert code == 2, f"exit code {code}"
    lines = errors.getvalue().replace("\r", "\n").splitlines()
    assert lines, "not a word"
    assert lines[-1].startswith("error: "), lines[-1]
    assert "Traceback" not in errors.getvalue()
    assert len(lines[-1]) < 3000, f"a line of {len(lines[-1])} characters"
    return "refused"


# ---- images


def _pictures() -> list[tuple[str, bytes]]:
    """Small valid images in the formats and modes that are read."""
    import tifffile

    colour = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    made = []
    for kind, modes in {
        "png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "jpeg": ("RGB", "L", "CMYK"),
        "gif": ("P",), "bmp": ("RGB", "P"), "webp": ("RGB", "RGBA"), "tiff": ("RGB", "CMYK", "L"),
        "ppm": ("RGB",),
    }.items():  # fmt: skip
        for mode in modes:
            content = io.BytesIO()
            if mode == "I;16":
                picture = Image.fromarray(colour[..., 0].astype(np.uint16) * 257)
            else:
                picture = Image.fromarray(colour).convert(mode)
            picture.save(content, format=kind)
            made.append((kind, content.getvalue()))
    for array in (
        colour.astype(np.uint16) * 200, colour.astype(np.float32) / 255,
        np.repeat(colour, 2, 2)[..., :5],
    ):  # fmt: skip
        content = io.BytesIO()
        tifffile.imwrite(content, array)
        made.append(("tiff", content.getvalue()))
    return made


def images(folder: Path) -> Attempt:
    pictures = _pictures()

    def attempt(random: random.Random) -> str:
        kind, content = random.choice(pictures)
        path = folder / f"image.{kind}"
        path.write_bytes(mutated_bytes(random, content))
        side = random.choice((None, None, 8))

        def read() -> None:
            pixels = read_image(path, min_side=side)
            assert pixels.dtype == torch.uint8
            assert pixels.ndim == 3
            assert pixels.shape[0] == 3

        return refused(read)

    return attempt


def masks(folder: Path) -> Attempt:
    indices = np.random.default_rng(0).integers(0, 3, (16, 12), np.uint8)
    seeds = []
    for mode in ("P", "L"):
        content, picture = io.BytesIO(), Image.fromarray(indices)
        if mode == "P":
            picture.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0])
        picture.save(content, format="png")
        seeds.append(content.getvalue())
    path = folder / "mask.png"

    def attempt(random: random.Random) -> str:
        path.write_bytes(mutated_bytes(random, random.choice(seeds)))

        def read() -> None:
            found = read_annotation(path, num_classes=3, size=(16, 12))
            assert found.shape == (16, 12)
            assert bool(((found < 3) | (found == 255)).all())

        return refused(read)

    return attempt


# ---- text


def _dumped(random: random.Random, tree: Any) -> bytes:
    """A mutated tree as YAML, or mutated text."""
    if random.random() < 0.4:
        return mutated_bytes(random, yaml.safe_dump(tree, allow_unicode=True).encode())
    text = yaml.safe_dump(mutated_tree(random, tree), allow_unicode=True)
    return text.encode(errors="surrogatepass")


def configs(folder: Path) -> Attempt:
    tree = {**SMALL, "data_root": str(folder), "seed": 3, "lr": 1e-3, "alpha": 0.3, "keep": "all"}
    whole = {
        "options": tree,
        "versions": {"torch": "2"},
        "backbone": {"dim": 64, "concat_dim": 192},
    }
    path = folder / "config.yaml"

    def attempt(random: random.Random) -> str:
        path.write_bytes(_dumped(random, random.choice((tree, whole))))
        return refused(lambda: resolve({}, path).run_folder())

    return attempt


def names(folder: Path) -> Attempt:
    tree = {
        "clusters": 6, "checkpoint": "0123456789abcdef",
        "classes": [{"name": "sky", "colour": "#87ceeb"}, {"name": "road", "colour": "#808080"}],
        "names": {"0": "sky", "3": "road", "5": "tree"},
    }  # fmt: skip
    path = folder / "names.yaml"

    def attempt(random: random.Random) -> str:
        path.write_bytes(_dumped(random, tree))

        def read() -> None:
            found = read_names(path)
            assert found.class_of().shape == (found.num_clusters,)
            assert all(name.isprintable() for name in found.classes)
            found.as_dict()

        return refused(read)

    return attempt


def classes(folder: Path) -> Attempt:
    root = folder / "annotated"
    for name in ("images", "annotations"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images" / "1.png")
    Image.new("L", (8, 8)).save(root / "annotations" / "1.png")
    lines = b"sky\nroad\ntree\ncar\n"

    def attempt(random: random.Random) -> str:
        (root / "classes.txt").write_bytes(mutated_bytes(random, lines))
        ignored = (
            [random.choice(("sky", "0", 2, "\x1b", 10**9, -1))] if random.random() < 0.3 else []
        )

        def read() -> None:
            dataset = open_folder(root, split="train", ignore_classes=ignored)
            assert all("\x1b" not in name for name in dataset.classes)

        return refused(read)

    return attempt


# ---- runs


@functools.cache
def _backbone(*arguments: Any, **options: Any) -> Any:
    return load_backbone(*arguments, **options)


def _photographs(folder: Path) -> Path:
    root = folder / "photos"
    root.mkdir()
    dice = np.random.default_rng(0)
    for number in range(4):
        pixels = dice.integers(0, 256, (40, 40 + number, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


def _trained(folder: Path, name: str, **options: Any) -> Path:
    asked = resolve(
        {**SMALL, "data_root": str(_root(folder)), "out": str(folder / name), **options}
    )
    run = Run.create(asked)
    (SpectralTrainer if asked.method == "spectral" else Trainer)(asked, run).train()
    return run.folder


def _root(folder: Path) -> Path:
    root = folder / "photos"
    return root if root.exists() else _photographs(folder)


def _segmented(run: Path, pixels: torch.Tensor) -> None:
    found = segmenters.Segmenter.load(run, "cpu")
    found.require_clusters()
    clusters = found(pixels)
    assert clusters.shape == pixels.shape[1:]
    assert 0 <= int(clusters.min()) <= int(clusters.max()) < found.num_clusters


def _runs(folder: Path) -> list[Path]:
    segmenters.load_backbone = _backbone
    return [
        _trained(folder, "spectral", method="spectral"),
        _trained(folder, "neural", **NEURAL),
        _trained(folder, "continuous", **NEURAL, gumbel=False, teacher="spectral", dataset_k="3"),
    ]


def _mutated_tensors(random: random.Random, path: Path) -> bytes:
    """With a checksum that is right: a file that somebody made, not one that a disk changed."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    for _ in range(random.choice((1, 1, 2))):
        if random.random() < 0.3 and metadata:
            key = random.choice(sorted(metadata))
            metadata[key] = random.choice(("", "x", "-1", "99999999999999999999", "../../x", "nan"))
            if random.random() < 0.3:
                del metadata[key]
            continue
        name = random.choice(sorted(tensors))
        tensors[name] = _odd_tensor(random, tensors[name])
        if random.random() < 0.15:
            tensors[random.choice(("x", "../x", name + ".x"))] = tensors.pop(name)
    return packed(tensors, metadata)


def _odd_tensor(random: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    value = random.choice((0, -1, 1, 2**20, float("nan"), float("inf"), -1e30))
    kind = random.randrange(7)
    if kind == 0:
        return tensor.new_zeros([*tensor.shape[:-1], 0] if tensor.ndim else [0])
    if kind == 1:
        return tensor.repeat(2, *(1 for _ in tensor.shape[1:])) if tensor.ndim else tensor[None]
    if kind == 2:
        return tensor.flatten()
    if kind == 3:
        return tensor.to(random.choice((torch.float64, torch.int32, torch.float16, torch.bool)))
    if kind == 4:
        return tensor.mT.contiguous() if tensor.ndim > 1 else tensor[..., None]
    if tensor.is_floating_point():
        return tensor.fill_(value) if kind == 5 else tensor.flip(0) if tensor.ndim else -tensor
    if tensor.dtype == torch.bool:
        return ~tensor
    return tensor.fill_(int(value) if value == value and abs(value) < 1e9 else 2**30)


def checkpoints(folder: Path) -> Attempt:
    """A run's files of tensors and its configuration, to segmentation, resumption and report."""
    runs, pixels = _runs(folder), torch.randint(256, (3, 40, 40), dtype=torch.uint8)

    def attempt(random: random.Random) -> str:
        run = folder / "tried"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(random.choice(runs), run)
        files = [run / CONFIG, *run.glob("*.safetensors"), *run.glob("state-*.pt")]
        path = random.choice([run / CHECKPOINT, *files])
        if path.suffix == ".safetensors" and random.random() < 0.6:
            path.write_bytes(_mutated_tensors(random, path))
        elif path.name == CONFIG:
            path.write_bytes(_dumped(random, yaml.safe_load(path.read_text("utf-8"))))
        else:
            path.write_bytes(mutated_bytes(random, path.read_bytes()))
        if random.random() < 0.4:
            return f"resume: {refused(lambda: _resumed(run))}"
        return f"segment: {refused(lambda: _segmented(run, pixels))}"

    return attempt


def _resumed(run: Path) -> None:
    options = Run(run).options()
    for name, most in {"epochs": 1, "num_eigenfunctions": 8, "crop": 64, "batch_size": 4}.items():
        if getattr(options, name) > most:
            raise UserError("an option that takes long")
    options.out, options.resume = str(run), True
    trainer = (SpectralTrainer if options.method == "spectral" else Trainer)(
        options, Run.create(options)
    )
    trainer.train()


def records(folder: Path) -> Attempt:
    """A run's record, scores and spectrum, to report and summary."""
    run = _trained(folder, "run", **NEURAL)
    scores = {
        "settings": {"data_root": "x", "split": "val", "protocol": "crop", "ignored": [],
                     "seed": 0, "methods": ["ours"], "crf": False, "window": 32, "stride": 16,
                     "resize": 0},
        "asked": {}, "num_clusters": 4, "images": 3, "classes": ["a", "b"],
        "pixels": {"a": 10, "b": 5}, "void_pixels": 0,
        "methods": {"ours": {"title": "Ours", "stages": {"none": {"clusters_used": 3, "matchings": {
            "iou": {"accuracy": 0.5, "mean_iou": 0.25, "classes_matched": 2,
                    "iou": {"a": 0.5, "b": None}}}}}}},
    }  # fmt: skip
    record = (run / METRICS).read_bytes()

    def attempt(random: random.Random) -> str:
        (run / METRICS).write_bytes(record)
        path = run / "evaluation-x-val-crop.json"
        path.write_text(json.dumps(scores))
        if random.random() < 0.4:
            rows = [json.loads(line) for line in record.splitlines()]
            lines = [json.dumps(row) for row in mutated_tree(random, rows) or [0]]
            text = "\n".join(lines).encode()
            (run / METRICS).write_bytes(
                mutated_bytes(random, text) if random.random() < 0.4 else text
            )
        elif random.random() < 0.5:
            path.write_text(json.dumps(mutated_tree(random, scores)))
        else:
            path.write_bytes(mutated_bytes(random, json.dumps(scores).encode()))
        outcome = refused(lambda: write_report(Run(run)))
        page = (run / "report.html").read_text("utf-8")
        assert "<script>alert" not in page
        return f"report {outcome}, summary {told(summarize.main, [str(run)])}"

    return attempt


def caches(folder: Path) -> Attempt:
    """Entries of a feature cache: damaged ones are computed again, to the same maps."""
    backbone = load_backbone("test_vit", "random")
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    cache = FeatureCache(folder / "cache", backbone)
    expected = cache(pixels).concat.half().float()
    entries = sorted((folder / "cache").rglob("*.safetensors"))
    whole = [entry.read_bytes() for entry in entries]

    def attempt(random: random.Random) -> str:
        for entry, content in zip(entries, whole, strict=True):
            entry.write_bytes(content)
        place = random.randrange(len(entries))
        entries[place].write_bytes(mutated_bytes(random, whole[place]))
        again = FeatureCache(folder / "cache", backbone)
        found = again(pixels).concat
        assert torch.equal(found, expected) or torch.allclose(found, expected, atol=1e-2)
        return f"{again.misses} computed again"

    return attempt


def folders(folder: Path) -> Attempt:
    """``segment`` on files and folders of odd names, links and kinds."""
    run = _trained(folder, "run", method="spectral")
    segmenters.load_backbone = _backbone
    valid = (folder / "photos" / "0.png").read_bytes()
    secret = folder / "secret.txt"
    endings = (".png", ".PNG", ".jpg", ".clusters.png", "", ".png.png", ".tif")
    stems = ("a", " ", "-h", "\x1b[2J", "a\nb", "ä", "\udce9", "x" * 200, "..a", "%s", "'\"", "<b>")

    def attempt(random: random.Random) -> str:
        root, out = folder / "given", folder / "out"
        for path in (root, out):
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
        root.mkdir()
        secret.write_text("untouched")
        for _ in range(random.choice((0, 1, 2))):
            path = root / (random.choice(stems) + random.choice(endings))
            kind = random.random()
            if path.exists() or path.is_symlink():
                continue
            if kind < 0.6:
                path.write_bytes(valid if kind < 0.3 else mutated_bytes(random, valid))
            elif kind < 0.7:
                path.mkdir()
            elif kind < 0.8:
                path.symlink_to(random.choice((secret, root / "none", path, "/dev/zero", "/")))
            elif kind < 0.9:
                os.mkfifo(path)
            else:
                path.touch()
        if random.random() < 0.3:
            out.mkdir()
            (out / "a.clusters.png").symlink_to(secret)
        if random.random() < 0.2:
            out.symlink_to(random.choice((secret, folder / "none"))) if not out.exists() else None
        given = [str(root)] if random.random() < 0.6 else [str(p) for p in root.iterdir()] or ["x"]
        more = random.choice(([], ["--recursive"], ["--crf-workers", "0"], ["--classes", "3"]))
        outcome = told(segment.main, [str(run), "--out", str(out), *more, "--", *given])
        assert secret.read_text("utf-8") == "untouched"
        return outcome

    return attempt


def flags(folder: Path) -> Attempt:
    """Command lines of ``train`` with odd values; nothing is trained."""
    import dataclasses

    from nefkern.train import parser
    from nefkern.training.options import TrainOptions

    options = [f.name for f in dataclasses.fields(TrainOptions)]
    values = [str(odd) for odd in ODD if not isinstance(odd, (list, dict))]

    def attempt(random: random.Random) -> str:
        line = ["--data", "folder", "--data-root", str(folder)]
        for _ in range(random.choice((1, 2))):
            line += [f"--{random.choice(options).replace('_', '-')}={random.choice(values)}"]

        def parse() -> None:
            given = vars(parser().parse_args(line))
            resolve(given, given.pop("config"))

        try:
            return refused(parse)
        except SystemExit as end:  # --help has no value, so none asks for it
            raise AssertionError(f"ended with {end.code}") from None

    return attempt


#: Name → what prepares it, and its share of the inputs.
TARGETS: dict[str, tuple[Callable[[Path], Attempt], float]] = {
    "images": (images, 0.30),
    "masks": (masks, 0.10),
    "configs": (configs, 0.12),
    "names": (names, 0.14),
    "classes": (classes, 0.10),
    "flags": (flags, 0.02),
    "records": (records, 0.005),
    "caches": (caches, 0.03),
    "checkpoints": (checkpoints, 0.04),
    "folders": (folders, 0.02),
}

if sys.platform != "linux":  # limits, forks, pipes
    TARGETS = {}
