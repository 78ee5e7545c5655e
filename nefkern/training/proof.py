"""What training leaves for others to verify: states before some steps, and hashes of what they did.

``steps.jsonl`` in the run's folder begins with the options. Every step of the first epoch has a row
with a hash of each image that it saw. Some steps, chosen by the seed, say more: hashes of features,
κ, ψ's outputs, gradients, and ψ's weights before and after. The state before them, from which
``python -m nefkern.verify`` repeats them, is kept in ``steps/``: ψ, the optimiser and the
generators. The first step has none, its ψ is the seed's; the last one's result is the checkpoint.
Several processes record nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nefkern.ops import CSRGraph
from nefkern.runtime import distributed, tensor_files
from nefkern.runtime.files import make_folder, replace_file
from nefkern.training.digests import (
    Digest,
    digest,
    graph_digest,
    image_hashes,
    joint_digest,
    state_hashes,
)
from nefkern.training.options import TrainOptions
from nefkern.training.runs import FREE_OPTIONS, STATES, Run

if TYPE_CHECKING:
    from nefkern.training.step import TrainingStep

#: States that are kept if nothing else is asked for: as many as these bytes hold, at most so many,
#: and none without so many steps for it.
_BYTES, _MOST, _SPACING = 1 << 29, 8, 256

#: Options that say where something lies; what lies there has hashes.
_PLACES = frozenset(("data_root", "weights", "feature_cache"))


def recorded_options(options: TrainOptions) -> dict[str, Any]:
    """Those that decide what a run computes."""
    left_out = FREE_OPTIONS | _PLACES
    return {n: v for n, v in dataclasses.asdict(options).items() if n not in left_out}


def first_row(options: TrainOptions, backbone: str) -> dict[str, Any]:
    """What the record begins with.

    Args:
        options: of the run.
        backbone: the digest of its weights.
    """
    return {"step": 0, "options": recorded_options(options), "backbone": backbone}


def chosen_steps(total: int, states: int, seed: int) -> set[int]:
    """The steps to record, from 1 to ``total``: the first, the last, and one at random in each of
    as many equal stretches as ``states`` leaves.

    Args:
        total: steps of the training.
        states: to keep; that of the first step is none.
        seed: of the choice.
    """
    if states < 1:
        return set()
    between = min(states - 1, max(0, total - 2))
    draw = random.Random(seed)
    edges = [2 + (total - 2) * i // between for i in range(between + 1)] if between else []
    return {1, total, *(draw.randrange(a, b) for a, b in itertools.pairwise(edges))}


class Watch:
    """What one step did, graph by graph; :class:`nefkern.training.step.TrainingStep` tells it."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, Digest]] = []

    def graph(self, features: Tensor, outputs: Tensor, **others: Tensor | CSRGraph) -> None:
        """One graph's ``features`` and ψ's ``outputs`` ``[B, h·w, C]``; κ or a teacher's targets.

        What is large on a GPU is not kept: it is reduced at once.
        """
        told = {"features": features, **others, "outputs": outputs}
        self.graphs.append(
            {
                name: graph_digest(one) if isinstance(one, CSRGraph) else digest(one)
                for name, one in told.items()
            }
        )


def state_before(step: TrainingStep, first: bool) -> dict[str, Tensor]:
    """All that a step starts from, as tensors; of the first step's, what the seed does not give."""
    tensors = {"rng": torch.get_rng_state()}
    if step.device.type == "cuda":
        tensors["cuda_rng"] = torch.cuda.get_rng_state(step.device)
    if first:
        return tensors
    tensors |= {f"psi.{name}": one for name, one in step.psi.state_dict().items()}
    for place, moments in step.optimizer_state()["state"].items():
        tensors |= {f"adam.{place}.{name}": one for name, one in moments.items()}
    return tensors


def take_state(step: TrainingStep, tensors: dict[str, Tensor], source: object) -> None:
    """Let a step start from what :func:`state_before` gave.

    Raises:
        UserError: not such a state.
    """
    psi = {n.removeprefix("psi."): t for n, t in tensors.items() if n.startswith("psi.")}
    if psi:
        step.psi.load(psi, source)
        state: dict[int, dict[str, Tensor]] = {}
        weights = list(step.psi.parameters())
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, place, moment = name.split(".")
                state.setdefault(int(place), {})[moment] = _laid_out(tensor, weights[int(place)])
        groups = step.optimizer_state()["param_groups"]
        step.load_optimizer({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["rng"])
    if "cuda_rng" in tensors and step.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda_rng"], step.device)


def _laid_out(moment: Tensor, weight: Tensor) -> Tensor:
    """A moment in its weight's order in memory, which a file does not keep: Adam's fused kernel
    goes through both side by side."""
    if moment.shape != weight.shape:
        return moment
    return torch.empty_like(weight, device=moment.device, dtype=moment.dtype).copy_(moment)


@contextlib.contextmanager
def watched(step: TrainingStep) -> Iterator[dict[str, Any]]:
    """What a step that is taken within has done, once it is."""
    before = {name: one.detach().clone() for name, one in step.psi.state_dict().items()}
    found: dict[str, Any] = {"before": state_hashes(before)}
    step.watch = watch = Watch()
    try:
        yield found
    finally:
        step.watch = None
    after = step.psi.state_dict()
    found["graphs"] = watch.graphs
    gradients = (p.grad for p in step.psi.parameters() if p.grad is not None)
    found["gradient"] = joint_digest(gradients)
    moved = [one - before[name] for name, one in after.items() if one.is_floating_point()]
    found["update"] = joint_digest(moved)
    found["after"] = state_hashes(after)


class Recorder:
    """Writes a run's record while it trains.

    Args:
        run: the folder.
        options: of the run.
        step: what is trained.
    """

    def __init__(self, run: Run, options: TrainOptions, step: TrainingStep) -> None:
        self.run, self.options, self.step = run, options, step
        self.on = distributed.ranks() == 1 and options.record_steps != 0
        self.chosen: set[int] = set()

    def plan(self, total: int) -> None:
        """Choose among the steps of a training of ``total``."""
        if self.on:
            self.chosen = chosen_steps(total, self._states(total), self.options.seed)

    def _states(self, total: int) -> int:
        if self.options.record_steps is not None:
            return self.options.record_steps
        size = 12 * sum(p.numel() for p in self.step.psi.parameters())  # ψ and Adam's two moments
        return max(1, min(_MOST, _BYTES // size, 1 + total // _SPACING))

    @contextlib.contextmanager
    def around(self, images: Tensor, number: int, where: dict[str, int]) -> Iterator[None]:
        """Record the step taken within, if it is one to record.

        Args:
            images: it sees.
            number: of the step, from 1.
            where: ``epoch``, ``at`` (its place there) and ``batch_size``.
        """
        if not self.on or not (number in self.chosen or where["epoch"] == 0):
            yield
            return
        row = {"step": number, **where, "images": image_hashes(images)}
        if number not in self.chosen:
            yield
        else:
            self._keep_state(number)
            with watched(self.step) as found:
                yield
            row |= {"threads": torch.get_num_threads(), **found}
        self.run.append_step(row)

    def _keep_state(self, number: int) -> None:
        path = self.run.state_path(number)
        make_folder(self.run.folder, self.run.path(STATES))
        tensors = state_before(self.step, first=number == 1)
        replace_file(path, tensor_files.packed(tensors, {"step": str(number - 1)}))
