"""The estimates as they stand in docs/gpu.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.roofline.counts import counts
from bench.roofline.cuda import cuda_kernels, merged, million_rows
from bench.roofline.model import Kernel
from bench.roofline.sizes import NEIGHBOURS, STEPS, THEN, B, N
from bench.roofline.training_step import attention, gradient_kernels, graph_kernels, sparse, step
from nefkern.triton.rates import GPUS, H100, RTX_3090, Gpu


def milliseconds(seconds: float) -> str:
    """About two digits: no estimate has more."""
    amount = seconds * 1e3
    return f"{amount:.{0 if amount >= 10 else 1 if amount >= 1 else 2}f}"


def span(kernels: Sequence[Kernel], gpu: Gpu) -> str:
    """Milliseconds of all of them, from least to expected."""
    ends = sum(k.least(gpu) for k in kernels), sum(k.expected(gpu) for k in kernels)
    return "–".join(map(milliseconds, ends))


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def rates_table() -> str:
    """The data sheets' figures that everything else is computed from."""
    lines = [
        table_row("", *(f"{gpu.name} ({gpu.arch})" for gpu in GPUS)),
        "|---|" + "---|" * len(GPUS),
    ]
    kinds = [("bfloat16, float16, TFLOP/s", "half", 1e12), ("TF32, TFLOP/s", "tf32", 1e12),
             ("float32, TFLOP/s", "float32", 1e12), ("float64, TFLOP/s", "float64", 1e12),
             ("memory, GB/s", "memory", 1e9), ("L2, GB/s (see below)", "cache", 1e9),
             ("L2, MiB", "cache_bytes", 2**20), ("multiprocessors", "multiprocessors", 1),
             ("clock, GHz", "clock", 1e9)]  # fmt: skip
    for title, name, unit in kinds:
        lines.append(table_row(title, *(f"{getattr(gpu, name) / unit:.4g}" for gpu in GPUS)))
    return "\n".join(lines)


def kernel_table(kernels: Sequence[Kernel]) -> str:
    """One row a kernel: its work, what limits it, and its time on each GPU."""
    names = [f"{gpu.name}, ms" for gpu in GPUS]
    lines = [table_row("kernel", "kind", "GFLOP", "memory, MB", "L2, MB", "shared, 10⁶",
                       "issued, 10⁶", "slowest on an H100", *names)]  # fmt: skip
    lines.append("|---|---|" + "---:|" * 5 + "---|" + "---:|" * len(names))
    for kernel in kernels:
        work = (sum(kernel.flops.values()) / 1e9, kernel.moved / 1e6, kernel.cached / 1e6,
                kernel.shared / 1e6, kernel.issued / 1e6)  # fmt: skip
        times = [span([kernel], gpu) for gpu in GPUS]
        shown = [f"{amount:,.0f}" if amount >= 0.5 else "" for amount in work]
        lines.append(table_row(kernel.name, kernel.kind, *shown, kernel.limit(H100), *times))
    return "\n".join(lines)


def step_table() -> str:
    """A step by parts, with --amp and in float32, and how often it fits into the paper's."""
    titles = (f"{gpu.name}, {how}" for gpu in GPUS for how in ("amp", "float32"))
    lines = [table_row("part, ms", *titles)]
    lines.append("|---|" + "---:|" * (2 * len(GPUS)))
    columns = [(gpu, step(amp)) for gpu in GPUS for amp in (True, False)]
    for part in dict.fromkeys(kernel.part for kernel in step(True)):
        times = (span([k for k in kernels if k.part == part], g) for g, kernels in columns)
        lines.append(table_row(part, *times))
    totals = [sum(k.expected(g) for k in kernels) for g, kernels in columns]
    floors = [sum(k.floor(g) for k in kernels) for g, kernels in columns]
    lines.append(table_row("**step**", *(f"**{span(kernels, g)}**" for g, kernels in columns)))
    lines.append(table_row("its floor", *map(milliseconds, floors)))
    lines.append(table_row("images a second", *(f"{B / t:,.0f}" for t in totals)))
    minutes = (f"{STEPS * t / 60:.0f} min" for t in totals)
    lines.append(table_row(f"{STEPS:,} steps", *minutes))
    return "\n".join(lines)


def yardstick() -> str:
    """A step on the RTX 3090 beside a step of the paper's training."""
    amp, plain = (sum(k.expected(RTX_3090) for k in step(how)) for how in (True, False))
    return (
        f"Half a day for {STEPS:,} steps is {THEN:.2f} s a step on an RTX 3090. Expected on the "
        f"same card: {plain * 1e3:.0f} ms in float32 ({THEN / plain:.0f} times as fast), "
        f"{amp * 1e3:.0f} ms with --amp ({THEN / amp:.0f} times)."
    )


def cuda_table() -> str:
    """The kernels of csrc/cuda, operator by operator, each followed by its sum."""
    rows = []
    for part in dict.fromkeys(kernel.part for kernel in cuda_kernels()):
        kernels = [kernel for kernel in cuda_kernels() if kernel.part == part]
        named = [
            replace(k, name=f"{part}: {k.name}" if part not in k.name else k.name) for k in kernels
        ]
        rows += kernel_table(named).splitlines()[2 if rows else 0 :]
        if len(kernels) > 1 and part != "spmm":
            totals = (f"**{span(kernels, gpu)}**" for gpu in GPUS)
            rows.append(table_row(f"**{part}**", *[""] * 7, *totals))
    return "\n".join(rows)


def million_table() -> str:
    """knn of a million rows, before and now."""
    rows = []
    for symmetric in (False, True):
        kernels = million_rows(symmetric)
        named = [replace(k, name=f"{k.name}, {k.part}") for k in kernels]
        rows += kernel_table(named).splitlines()[2 if rows else 0 :]
        totals = (f"**{span(kernels, gpu)}**" for gpu in GPUS)
        rows.append(table_row(f"**{kernels[0].part}**", *[""] * 7, *totals))
    return "\n".join(rows)


def cuda_graph() -> str:
    """What κ costs by csrc/cuda beside what it costs by Triton."""
    mine = [k for k in cuda_kernels() if k.part in ("knn, fused", "knn of pixels", "kappa")]
    times = ", ".join(
        f"{gpu.name} {span(mine, gpu)} instead of {span(list(graph_kernels()), gpu)}"
        for gpu in GPUS
    )
    return f"κ by these kernels instead of Triton's, ms: {times}."


#: Nodes of the counted case (tests/emulator/costs.py).
HUB_NODES = 2400
#: Rounds of loads, one after the other, of a block that merges a row: two passes over its names,
#: four a thread at a time, and one over its entries; and seconds of one, from the L2 cache.
MERGE_THREADS, LOADS_AT_ONCE, LATENCY = 256, 4, 0.7e-6


def hub() -> str:
    """What the dearest row of κ costs, one that half of all nodes name, beside all of them."""
    names = N // 2
    case = counts()["kappa of a hub of half the nodes"]["merge_rows"]
    clocks = case["longest_block"] * names / (HUB_NODES // 2)
    waits = names / MERGE_THREADS * (2 / LOADS_AT_ONCE + 1) * LATENCY
    whole = [k for k in merged("kappa", NEIGHBOURS + 15, 2, "fill_both_merged")
             if k.name == "rows merged"]  # fmt: skip
    return (
        f"A hub that half of the {N:,} nodes name: on an H100 its block takes "
        f"{clocks / H100.clock * 1e6:.0f} µs by the counts of the first-level cache and some "
        f"{waits * 1e6:.0f} µs by the latency of its loads; it is begun first, and all rows "
        f"take {span(whole, H100)} ms."
    )


def estimates() -> str:
    """The generated part of the page."""
    mixed = [attention(True), sparse("bfloat16", 2), *gradient_kernels()]
    return "\n\n".join(
        [
            "**Estimates, computed from data sheets. None of these times was measured.**",
            "### Rates", rates_table(),
            "### Triton's kernels and the rest of a step: least–expected ms",
            kernel_table([*step(False), *mixed]),
            "### The kernels of csrc/cuda: least–expected ms", cuda_table(), cuda_graph(), hub(),
            "### Products of a million rows, k = 10: least–expected ms", million_table(),
            "### A training step, with Triton's kernels", step_table(), yardstick(),
        ]
    )  # fmt: skip
