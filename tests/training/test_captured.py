"""The capture of a whole step in a CUDA graph, on stand-ins for graph, streams and memory: what of
it is Python's, and which tensors the graph goes on reading."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.gpu.captured import WARM, CapturedStep
from tests.training.test_unread import Waits, fake_images, fake_step

#: Reads offsets on the host, which plans its launches by them: images of one size have the same.
PLANNED = {torch.ops.nefkern.knn.default}


class Recording(TorchDispatchMode):
    """What a graph would keep of the operations in it: the memory that they read and write.

    Attributes:
        given: storages that were there before, of which a replay takes the content anew.
        baked: operations whose operand on the host, or copy from it, a replay would repeat as it
            was.
    """

    def __init__(self):
        super().__init__()
        self.given, self.made, self.baked, self.count = set(), set(), [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if (
            function not in PLANNED
            and any(x.device.type != "cuda" for x in inputs)
            and any(x.device.type == "cuda" for x in [*inputs, *outputs])
        ):
            self.baked.append(str(function))
        self.given |= {StorageWeakRef(x.untyped_storage()) for x in inputs} - self.made
        self.made |= {StorageWeakRef(x.untyped_storage()) for x in outputs} - self.given
        return result


class Machine:
    """Stands for streams and graphs: what is asked of them, in order."""

    def __init__(self, monkeypatch):
        self.asked, self.recording, self.capturing = [], Recording(), False
        machine = self

        class Stream:
            def __init__(self, device=None):
                self.device = device

            def wait_stream(self, other):
                machine.asked.append("wait")

        class CUDAGraph:
            def replay(self):
                machine.asked.append("replay")

        @contextlib.contextmanager
        def stream(one):
            machine.asked.append("on the side")
            yield

        @contextlib.contextmanager
        def graph(one):
            assert isinstance(one, CUDAGraph)
            machine.asked.append("capture")
            machine.capturing = True
            with machine.recording:
                yield
            machine.capturing = False
            machine.asked.append("captured")

        def refuse(*_, **__):
            raise AssertionError("the host waits for a capture that has run nothing")

        current = Stream()
        for name, stand_in in {
            "Stream": Stream, "CUDAGraph": CUDAGraph, "stream": stream, "graph": graph,
            "current_stream": lambda device=None: current, "synchronize": refuse,
            "is_current_stream_capturing": lambda: machine.capturing,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.parametrize(
    "options",
    [{}, {"amp": True}, {"amp": True, "accumulate": 2}, {"feature_map": "elu", "alpha": 0.0}],
    ids=str,
)
def test_a_step_is_captured_whole(monkeypatch, options):
    fakes = FakeTensorMode()
    step = fake_step(monkeypatch, fakes, "test_vit", **options)
    machine, updates = Machine(monkeypatch), []
    update = step.update
    step.update = lambda *args: updates.append(machine.capturing) or update(*args)
    with fakes, Waits() as waits:
        captured = CapturedStep(step, fake_images(step.options))
    assert waits.found == []
    assert updates == [False] * WARM + [True]
    assert machine.asked == ["wait", "on the side", "wait", "capture", "captured"]
    assert machine.recording.count > 300, "a step is many operations"
    assert machine.recording.baked == []
    # What a replay reads is there for as long as the graph: nothing lives in a tensor that is gone.
    assert not [one for one in machine.recording.given if one.expired()]
    read = {one.cdata for one in machine.recording.given}
    state = [value for one in step.optimizer.state.values() for value in one.values()]
    group = step.optimizer.param_groups[0]
    for what in (captured.images, step.temperature, step.optimizer.found_inf, group["lr"],
                 *step.psi.parameters(), *state):  # fmt: skip
        assert StorageWeakRef(what.untyped_storage()).cdata in read
    assert captured.rows.shape == (step.options.accumulate, 6 + 8)
    assert all(weight.grad is not None for weight in step.psi.parameters())
    assert group["capturable"]
    with fakes:
        rows = captured(fake_images(step.options))
    assert rows is captured.rows
    assert machine.asked[-1] == "replay"


def test_what_a_capture_must_not_do_is_seen(monkeypatch):
    fakes, machine = FakeTensorMode(), Machine(monkeypatch)
    with fakes:
        here, gone = torch.ones(3, device="cuda"), torch.ones(3, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            kept = here + gone
            here += torch.ones(())
            here.copy_(torch.ones(3), non_blocking=True)
            with pytest.raises(AssertionError, match="waits"):
                torch.cuda.synchronize()
        assert machine.recording.baked == ["aten.add_.Tensor", "aten.copy_.default"]
        assert not [one for one in machine.recording.given if one.expired()]
        del gone
        assert len([one for one in machine.recording.given if one.expired()]) == 1
    assert kept is not None
