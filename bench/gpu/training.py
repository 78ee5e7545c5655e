"""Stage "training": steps on made-up input; how busy the device is, and what holds up the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from bench import device_time
from bench.gpu import predictions
from bench.gpu.plan import Settings
from bench.gpu.worker import Skipped
from bench.harness import DEVICE, wall
from bench.profile_step import group_of
from bench.roofline import training_step

if TYPE_CHECKING:
    from nefkern.training.step import TrainingStep

STEPS = {"paper": 30, "small": 3}
WARM, PROFILED = 3, 3


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """ "psi" (κ, ψ, objective, Adam on given features), "whole" (with a backbone) or "captured"
    (that as one CUDA graph), and how."""
    part, how = case.split()
    steps = {"psi": psi_step, "whole": whole_step, "captured": captured_step}
    step = steps[part](settings, how == "amp")
    for _ in range(WARM):
        step()
    yield {"step": wall(step, STEPS[settings.size])}  # what training takes
    kinds = ("cpu_op",) if settings.rehearsal else device_time.DEVICE_WORK
    trace = device_time.traced(step, PROFILED, kinds)
    yield summary(trace)
    if settings.size == "paper":
        gpu = predictions.rates()
        kernels = [
            k for k in training_step.step(how == "amp") if part != "psi" or k.part != "backbone"
        ]
        yield {"predicted": predictions.expected(kernels, gpu), "rates of": gpu.name}


def summary(trace: device_time.Trace) -> dict[str, Any]:
    """Figures of a step."""
    groups: dict[str, float] = {}
    for name, work in trace.work.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + work.seconds / PROFILED
    longest = sorted(trace.work.items(), key=lambda item: -item[1].seconds)[:25]
    return {
        "busy share": trace.busy / trace.span if trace.span else None,
        "busy": trace.busy / PROFILED,
        "launches": trace.launches / PROFILED,
        "waits": {request: count / PROFILED for request, count in trace.waits.items()},
        "groups": groups,
        "kernels": {name: {"seconds": work.seconds / PROFILED, "launches": work.count / PROFILED}
                    for name, work in longest},
        "peak memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }  # fmt: skip


def psi_step(settings: Settings, amp: bool) -> Callable[[], object]:
    from bench.train_step import Step

    step = Step(settings.size)
    return lambda: step.ours(amp=amp)


def whole_step(settings: Settings, amp: bool) -> Callable[[], object]:
    """The trainer's step."""
    step, images = trainers_step(settings, amp)
    numbers = iter(range(1, 1_000_000))
    return lambda: step(images, 0.5, next(numbers))


def captured_step(settings: Settings, amp: bool) -> Callable[[], object]:
    """The same as one CUDA graph; AssertionError where a replay does not train."""
    if settings.rehearsal:
        raise Skipped("a processor has no CUDA graphs; tests/training/test_captured.py rehearses")
    from bench.gpu.captured import CapturedStep

    step, images = trainers_step(settings, amp)
    captured = CapturedStep(step, images)
    before = [weight.detach().clone() for weight in step.psi.parameters()]
    rows = captured(images)
    if not bool(rows.isfinite().all()):
        raise AssertionError(f"figures of a replay that are not finite: {rows[:, :6].tolist()}")
    if all(torch.equal(a, b) for a, b in zip(before, step.psi.parameters(), strict=True)):
        raise AssertionError("a replay left every weight of ψ as it was")
    return lambda: captured(images)


def trainers_step(settings: Settings, amp: bool) -> tuple[TrainingStep, torch.Tensor]:
    """At the paper's size, with a backbone of random weights; and images."""
    from nefkern.images.feature_cache import FeatureCache
    from nefkern.images.loading import load_backbone
    from nefkern.training.options import TrainOptions
    from nefkern.training.step import TrainingStep

    paper = {"backbone": "vit_small_patch16_384", "crop": 480, "batch_size": 16}
    small = {"backbone": "test_vit", "crop": 64, "batch_size": 2, "k": "16",
             "num_eigenfunctions": 8, "heads": 3, "mlp_hidden": 96}  # fmt: skip
    chosen = paper if settings.size == "paper" else small
    options = TrainOptions(data="folder", weights="random", amp=amp, **chosen)
    backbone = load_backbone(options.backbone, "random", device=DEVICE)
    step = TrainingStep(options, backbone, FeatureCache(None, backbone, amp=amp))
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, 3, options.crop, options.crop)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    images = images.pin_memory() if torch.cuda.is_available() else images  # as the loader does
    return step, images
