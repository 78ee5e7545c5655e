"""A training step on a GPU asks it nothing: traced whole on fake tensors; captured where one is."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.captured import CapturedStep
from nefkern import backends
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.loading import load_backbone
from nefkern.runtime.errors import UserError
from nefkern.spectral.eigenfunction import Eigenfunction
from nefkern.training.options import TrainOptions
from nefkern.training.record import KnownRecord, Record, Underway
from nefkern.training.step import TrainingStep

aten = torch.ops.aten
#: What reads a device's memory to go on, whatever it is called with.
READING = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.equal.default, aten._linalg_check_errors.default, aten.masked_select.default,
    aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
COPIES = {aten._to_copy.default: 0, aten.copy_.default: 1}


class Waits(TorchDispatchMode):
    """The names of the operations that make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_gpu = [t.device.type == "cuda" for t in tensors]
        if function in READING and any(on_gpu):
            self.found.append(str(function))
        if function is aten._fused_adam_.tensor_lr:  # has no fake kernel
            return None
        result = function(*args, **kwargs)
        if function in COPIES:
            source = tensors[COPIES[function]].device.type
            crosses = {source, result.device.type} == {"cpu", "cuda"}
            if crosses and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                self.found.append(f"{function} from {source}")
        return result


def walk_back(loss: torch.Tensor, *_) -> None:
    """``loss.backward()`` without autograd's engine, which asks the driver for its devices."""
    grads: dict = defaultdict(dict)
    grads[loss.grad_fn][0] = torch.ones_like(loss)
    waiting: dict = defaultdict(int)
    seen, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = grads.pop(node, {})
        results: tuple = ()
        if hasattr(node, "variable"):
            if given:
                old, new = node.variable.grad, given[0].detach()
                node.variable.grad = new if old is None else old + new
        elif given:
            inputs = [given.get(i) for i in range(len(node._input_metadata))]
            if hasattr(node, "apply"):  # in Python: it has results for numbers, too, all None
                found = iter([r for r in node.apply(*inputs) if r is not None])
                results = tuple(None if after is None else next(found)
                                for after, _ in node.next_functions)  # fmt: skip
            else:
                results = node(*inputs)
            results = results if isinstance(results, tuple) else (results,)
        for (after, place), grad in zip(
            node.next_functions, results or [None] * len(node.next_functions), strict=True
        ):
            if after is None:
                continue
            if grad is not None:
                wanted = after._input_metadata[place]  # the engine fits them, too
                grad = grad.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)
                known = grads[after].get(place)
                grads[after][place] = grad if known is None else known + grad
            waiting[after] -= 1
            if waiting[after] == 0:
                ready.append(after)


def on_fake_gpu(module: torch.nn.Module, *_) -> torch.nn.Module:
    """The module's tensors, without content, on a GPU that need not exist."""
    for part in module.modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None:
                continue
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            if name in part._parameters:
                part._parameters[name] = torch.nn.Parameter(fake, tensor.requires_grad)
            else:
                part._buffers[name] = fake
    return module


def fake_step(monkeypatch, fakes: FakeTensorMode, backbone: str, **options) -> TrainingStep:
    """A step whose tensors have no content, on a GPU that need not exist."""
    options = TrainOptions(
        data="folder", weights="random", backbone=backbone, crop=64, k="16", num_eigenfunctions=8,
        heads=3, mlp_hidden=96, batch_size=4, **options,
    )  # fmt: skip
    loaded = load_backbone(backbone, "random")
    monkeypatch.setattr(backends, "compiled", lambda device: True)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda weight, std: weight)  # it reads
    monkeypatch.setattr(Eigenfunction, "to", on_fake_gpu)
    monkeypatch.setattr(torch.amp.autocast_mode.torch.cuda.amp.common,
                        "amp_definitely_not_available", lambda: False)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(torch.Tensor, "backward", walk_back)
    monkeypatch.setattr(Record, "__init__", lambda self, number, rows, known: setattr(
        self, "rows", rows))  # fmt: skip
    with fakes:
        on_fake_gpu(loaded)
        features = FeatureCache(None, loaded, amp=options.amp, tf32=options.tf32)
        return TrainingStep(options, loaded, features)


def fake_images(options: TrainOptions) -> torch.Tensor:
    return torch.empty(options.accumulate * options.batch_size, 3, 64, 64, dtype=torch.uint8)


def traced(monkeypatch, backbone: str, **options) -> tuple[list[str], TrainingStep, torch.Tensor]:
    """Two steps' waits, the step, and what its record is read from."""
    fakes = FakeTensorMode()
    step = fake_step(monkeypatch, fakes, backbone, **options)
    with fakes:
        images = fake_images(step.options)
        with Waits() as waits:
            step(images, 0.1, 1)
            record = step(images, 0.2, 2)
    return waits.found, step, record.rows


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("test_vit", {}),
        ("test_vit", {"amp": True, "accumulate": 2}),
        ("test_vit", {"amp": True, "tf32": False}),
        ("test_vit", {"alpha": 0.0, "feature_map": "elu"}),
        ("test_vit", {"psi": "convolution", "graph_features": "all"}),
        ("test_vit", {"gumbel": False, "orthogonal_head": False}),
        ("test_efficientnet", {"amp": True}),
    ],
    ids=str,
)
def test_a_whole_step_asks_the_gpu_nothing(monkeypatch, backbone, options):
    """Features, κ, ψ, the loss, its gradients and Adam."""
    waits, step, rows = traced(monkeypatch, backbone, **options)
    assert not waits
    assert rows.device.type == "cuda"
    assert rows.shape == (options.get("accumulate", 1), 6 + 8)
    weights = list(step.psi.parameters())
    assert all(w.grad is not None and w.grad.shape == w.shape for w in weights)
    assert len(step.optimizer.state) == len(weights)


def test_a_wait_would_be_seen():
    with FakeTensorMode(), Waits() as waits:
        x = torch.eye(3, device="cuda")
        torch.linalg.cholesky(x)
        x.cpu()
        x.copy_(torch.empty(3, 3))
        x.to("cpu", non_blocking=True)
    assert waits.found == [
        "aten._linalg_check_errors.default", "aten._to_copy.default from cuda",
        "aten.copy_.default from cpu",
    ]  # fmt: skip


def test_walking_back_is_what_the_engine_does():
    def gradients(backward):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.GELU(), torch.nn.Linear(4, 4))
        y = layer(torch.randn(3, 5))
        backward(((y @ y.T).softmax(0) + y.sum()).square().sum() + y.chunk(2, 1)[0].sum())
        return [w.grad for w in layer.parameters()]

    for a, b in zip(gradients(walk_back), gradients(torch.Tensor.backward), strict=True):
        torch.testing.assert_close(a, b)


# ---- records that arrive later


class Late(KnownRecord):
    """There once it is said so."""

    there = False

    def ready(self):
        return self.there


def test_records_come_in_order_and_no_more_than_a_few_late():
    underway, late = Underway(most=2), [Late(i, {"loss": i}) for i in range(5)]
    got = []
    for i, record in enumerate(late):
        underway.add(record, {"step": i}, {"rate": -i})
        got += underway.arrived()
    assert [row["step"] for row in got] == [0, 1, 2]
    assert list(got[2].items()) == [("step", 2), ("loss", 2), ("rate", -2)]
    late[4].there = True
    assert not list(underway.arrived()), "its turn has not come"
    late[3].there = True
    assert [row["loss"] for row in underway.arrived()] == [3, 4]
    underway.add(Late(5, {"loss": 5}), {}, {})
    assert [row["loss"] for row in underway.arrived(all=True)] == [5]


def test_a_run_whose_records_are_late_leaves_the_same_folder(tiny, tmp_path, monkeypatch):
    """Checkpoints after every step: none counts a step that is not in the record."""
    from nefkern.training.runs import Run
    from nefkern.training.trainer import Trainer

    def run(name):
        options = tiny(out=str(tmp_path / name), checkpoint_seconds=0.0, epochs=2)
        written = []
        save = Trainer.save

        def saving(self):
            written.append((self.position.total, len(self.run.metrics())))
            save(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "save", saving)
            last = Trainer(options, Run.create(options)).train()
        rows = Run(options.out).metrics()
        assert last == rows[-1]
        assert all(total == rows for total, rows in written)
        for row in rows:
            del row["images_per_second"], row["input_wait"]
        return rows

    prompt = run("prompt")
    monkeypatch.setattr(KnownRecord, "ready", lambda self: self.number % 3 == 0)
    assert run("late") == prompt


# ---- Adam's own guard


def test_adam_leaves_psi_as_it_is_once_a_loss_was_not_finite():
    """As the step has it on a GPU, where the host finds out later."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    weight.grad = torch.full((3,), math.nan)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3))
    optimizer.found_inf = torch.tensor(0.0)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_a_record_tells_of_a_loss_that_is_not_finite():
    rows = torch.zeros(2, 6 + 4)
    assert Record(3, rows, {"lr": 1.0}).row() == {
        "loss": 0, "trace": 0, "penalty": 0, "live": 0, "dead": 0, "off_diagonal": 0,
        "confidence": 0, "lr": 1.0,
    }  # fmt: skip
    rows[1, 0] = math.inf
    with pytest.raises(UserError, match="the loss is inf at step 3; a lower --lr may help"):
        Record(3, rows, {}).row()


def test_a_checkpoint_of_adam_fits_any_device(tiny):
    from nefkern.training.runs import Run
    from nefkern.training.trainer import Trainer

    options = tiny(epochs=1)
    trainer = Trainer(options, Run.create(options))
    trainer.train()
    state = trainer.step.optimizer_state()
    state["param_groups"][0] |= {"lr": torch.tensor(0.5), "capturable": True}
    trainer.step.load_optimizer(state)
    (group,) = trainer.step.optimizer.param_groups
    assert group["lr"] == options.lr
    assert group["capturable"] is False
    trainer.step(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), 0.0, 1)


# ---- where there is a GPU


@pytest.mark.skipif(
    not (torch.cuda.is_available() and backends.compiled("cuda")),
    reason="needs a GPU and kernels for it",
)
def test_a_step_is_captured_in_one_graph_and_never_waits():
    options = TrainOptions(
        data="folder", weights="random", backbone="test_vit", crop=64, k="16", amp=True,
        num_eigenfunctions=8, heads=3, mlp_hidden=96, batch_size=4,
    )  # fmt: skip
    backbone = load_backbone("test_vit", "random", device="cuda")
    step = TrainingStep(options, backbone, FeatureCache(None, backbone, amp=True))
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8).pin_memory()
    for number in range(1, 4):  # compiles and tunes
        step(images, 0.1, number).row()
    torch.cuda.set_sync_debug_mode("error")
    try:
        record = step(images, 0.1, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(record.row()["loss"])
    captured = CapturedStep(step, images)
    before = [w.detach().clone() for w in step.psi.parameters()]
    assert captured(images).isfinite().all()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.psi.parameters(), strict=True))
