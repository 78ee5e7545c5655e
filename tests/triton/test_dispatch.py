"""Launches that do not ask Triton again: what they start is what Triton itself would start."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from bench import host_dispatch
from nefkern.triton import configs


def compare() -> dict[str, object]:
    """Every launch of every operator by Triton, and twice by what is kept; what is kept of three
    attentions: the second one's tensors are aligned as the first one's, the third one's are not."""
    from nefkern.triton import linear_attention as attention

    differ, kept, launches = [], configs._launch, 0
    with host_dispatch.recording() as started:

        def twice(kernel, grid, *args, **options):
            nonlocal launches
            for launch in (lambda k, g, *a, **o: k[g](*a, **o), kept, kept):
                launch(kernel, grid, *args, **options)
            own, first, again = map(host_dispatch.addressed, started[-3:])
            launches += 1
            if not own == first == again:
                differ.append(kernel.__name__)

        configs._launch = twice
        for call in host_dispatch.calls().values():
            call()
        configs._launch = kept
        forms = []
        x = torch.zeros(4, 2, 33, 16, dtype=torch.float16)
        for tensors in (x[:3, :, :32], x[:3, :, 1:], x.flatten()[1:97].view(3, 1, 2, 16)):
            before = len(configs._COMPILED)
            for _ in range(2):
                attention.linear_attention(*tensors[:, None], None, "elu", 1e-6)
            forms.append(len(configs._COMPILED) - before)
    return {"launches": launches, "differ": differ, "forms": forms}


def test_launches_start_what_triton_starts():
    """In a process of its own: this one may be interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "from tests.triton.test_dispatch import *\n"
         "print(json.dumps(compare()))"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["launches"] >= 20
    assert found["differ"] == []
    first, same, misaligned = found["forms"]
    assert (first, same) == (3, 0)
    assert misaligned > 0


def test_what_is_kept_is_bounded(monkeypatch):
    """A size that always changes must not fill the memory."""

    class Kernel(configs.JITFunction):
        arg_names = ("x",)

        def __init__(self):
            pass

        def __getitem__(self, grid):
            return lambda *args, **options: "compiled"

        def __hash__(self):
            return 0

    monkeypatch.setattr(configs, "driver", host_dispatch.SimpleNamespace(
        active=host_dispatch.Driver([])))  # fmt: skip
    monkeypatch.setattr(configs, "_COMPILED", {})
    monkeypatch.setattr(configs, "MOST_COMPILED", 4)
    kernel = Kernel()
    for size in range(11):
        configs.launch(kernel, (1,))(size)
    assert len(configs._COMPILED) == 3
