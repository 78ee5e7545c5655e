"""``python -m bench.profile_step``: where a training step spends its time, before and after.

"Before" is the same step on the reference backend, pure PyTorch. Times are those of the profiler's
operators themselves (self time), on the device that computes.
"""

from __future__ import annotations

import sys
from collections import Counter

from torch.profiler import ProfilerActivity, profile

from bench.graph_inputs import SIZES
from bench.harness import DEVICE, on_reference
from bench.train_step import Step
from nefkern.runtime.errors import ArgumentParser, command

#: The first group whose key is part of an operator's name takes its time.
GROUPS = {
    "knn": ("nefkern::knn", "nefkern_native::knn"),
    "graph assembly": (
        "kappa",
        "normalized_adjacency",
        "nefkern::add",
        "nefkern_native::add",
        "csr",
    ),
    "objective": ("neuralef_loss", "spmm"),
    "attention": ("linear_attention",),
    "dense products": ("::mm", "::addmm", "::bmm", "::linear", "mkldnn"),
    "LayerNorm, GELU": ("layer_norm", "gelu"),
    "Gumbel-Softmax": ("softmax", "exponential", "log"),
    "Adam": ("adam",),
    "copies and casts": ("copy", "cat", "_to_copy", "clone", "contiguous"),
}


def group_of(name: str) -> str:
    lowered = name.lower()
    return next((g for g, keys in GROUPS.items() if any(k in lowered for k in keys)), "other")


def measure(step) -> Counter:
    """Seconds of one call by group. What an operator of ours calls counts as its own."""
    step()
    activities = [ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        step()
    found: Counter = Counter()
    for event in recorded.events():
        if event.cpu_parent is not None and "nefkern" in _ancestors(event):
            continue
        ours = event.name.startswith("nefkern::")
        if DEVICE.type == "cuda":
            time = event.device_time_total if ours else event.self_device_time_total
        else:
            time = event.cpu_time_total if ours else event.self_cpu_time_total
        found[group_of(event.name)] += time / 1e6
    return found


def _ancestors(event) -> str:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name if event.name.startswith("nefkern::") else "")
    return " ".join(names)


def table(before: Counter, after: Counter) -> str:
    """Markdown: seconds and shares of both."""
    lines = ["| part | before | | after | |", "|---|---|---|---|---|"]
    for name in sorted(before | after, key=lambda n: -after[n]):
        cells = [name]
        for found in (before, after):
            cells += [f"{found[name]:.3f} s", f"{found[name] / found.total():.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| all | {before.total():.2f} s | | {after.total():.2f} s | |")
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m bench.profile_step", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="paper")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    options = parser.parse_args(arguments)
    step = Step(options.size)

    def ours():
        return step.ours(amp=options.amp)

    print(table(measure(on_reference(ours)), measure(ours)))


if __name__ == "__main__":
    sys.exit(main())
