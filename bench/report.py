"""``python -m bench.report [RESULTS.json ...] [--gpu FILE]``: the README's tables and plots.

The files given (results of ``pytest bench/ --benchmark``) become ``bench/published.json``, a later
file's case taking the place of an earlier one's; without files the published results are drawn
anew. Then the table between README.md's markers is written, and the plots beside the results.
--gpu takes what ``python -m bench.gpu_check`` found and makes it ``bench/published-gpu.json``, from
which the second table is.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from nefkern.runtime.errors import ArgumentParser, UserError, command
from nefkern.runtime.files import replace_file

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PUBLISHED = HERE / "published.json"
PUBLISHED_GPU = HERE / "published-gpu.json"
PLOTS = HERE / "plots"
BEGIN, END = "<!-- written by python -m bench.report -->", "<!-- end of what it wrote -->"
GPU_BEGIN, GPU_END = "<!-- GPU: written by python -m bench.report -->", "<!-- end of GPU -->"
NO_GPU = "(No GPU has been measured yet.)"
OURS = "nefkern"
#: The bare product writes into a buffer that it is handed: it has no memory of its own to show.
GIVEN_MEMORY = "torch.mm alone"


def merge(files: list[Path]) -> dict:
    """One document of several results: every case from the last file that has it."""
    cases: dict[str, list[dict]] = {}
    environment: dict = {}
    for file in files:
        try:
            document = json.loads(file.read_text("utf-8"))
            entries, environment = document["entries"], document["environment"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"expected results of pytest bench/ --benchmark ({error})"
            raise UserError(f"{file}: {reason}") from None
        found: dict[str, list[dict]] = {}
        for entry in entries:
            found.setdefault(entry["case"], []).append(entry)
        cases |= found
    return {"environment": environment, "entries": [e for found in cases.values() for e in found]}


def by_case(document: dict) -> dict[str, list[dict]]:
    """The entries of each case, ours first."""
    cases: dict[str, list[dict]] = {}
    for entry in document["entries"]:
        cases.setdefault(entry["case"], []).append(entry)
    return cases


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def memory(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**30:.1f} GB" if value >= 2**30 else f"{value / 2**20:.0f} MB"


def times(value: float) -> str:
    return f"{value:.0f}×" if value >= 20 else f"{value:.1f}×"


def table(document: dict) -> str:
    """The Markdown table: one row a case; those of the scaling plot stay out."""
    where = document["environment"]
    rates = where["rates"]
    lines = [
        f"{where['gpu'] or where['processor']}, {where['threads']} threads, PyTorch "
        f"{where['torch']}; measured: {rates['flops']['float32'] / 1e9:.0f} GFLOP/s in float32, "
        f"{rates['flops']['bfloat16'] / 1e9:.0f} in bfloat16, {rates['bandwidth'] / 1e9:.0f} GB/s.",
        "",
        "| case | ours | of floor | memory | others take (memory) |",
        "|---|---|---|---|---|",
    ]
    for case, (ours, *others) in by_case(document).items():
        if case.startswith("scaling"):
            continue
        floor = f"{ours['floor'] / ours['seconds']:.0%}" if ours.get("floor") else ""
        cells = [case, seconds(ours["seconds"]), floor, memory(ours["peak_bytes"])]
        lines.append(f"| {' | '.join(cells)} | {', '.join(map(_opponent, others))} |")
    return "\n".join(lines)


def _opponent(entry: dict) -> str:
    return f"{entry['contestant']} {times(entry['ratio'])} ({memory(entry['peak_bytes'])})"


def publish_gpu(file: Path) -> None:
    """What a run of bench.gpu_check found becomes what is published, without its logs.

    Raises:
        UserError: it is something else, or a rehearsal, or lacks the times.
    """
    try:
        document = json.loads(file.read_text("utf-8"))
        device, found = document["device"], document["entries"] and document["stages"]
        measured = document["environment"]["rates"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: expected what python -m bench.gpu_check --out writes ({error})"
        ) from None
    if device != "cuda" or not found or not measured:
        raise UserError(f"{file}: expected times measured on a GPU, got a run on {device} without")
    replace_file(PUBLISHED_GPU, json.dumps(_without_logs(document), indent=1) + "\n")


#: What a run keeps to be mended by, and what says where the machine keeps its programs.
LOGS = ("output", "traceback", "log", "tools")


def _without_logs(found: object) -> object:
    if isinstance(found, dict):
        return {key: _without_logs(value) for key, value in found.items() if key not in LOGS}
    return [_without_logs(value) for value in found] if isinstance(found, list) else found


def gpu_table(path: Path) -> str:
    """The second table: times of the GPU, beside what was predicted of it; what failed."""
    if not path.exists():
        return NO_GPU
    document = json.loads(path.read_text("utf-8"))
    where, rates = document["environment"], document["environment"]["rates"]
    flops = ", ".join(f"{rate / 1e12:.0f} in {name}" for name, rate in rates["flops"].items())
    lines = [
        f"{where['gpu']}, PyTorch {where['torch']}; measured: {flops} TFLOP/s, "
        f"{rates['bandwidth'] / 1e12:.1f} TB/s. Times are the device's; host: to enqueue a call.",
        "",
        "| case | ours | host | of floor | memory | others take (memory) |",
        "|---|---|---|---|---|---|",
    ]
    for case, (ours, *others) in by_case(document).items():
        floor = f"{ours['floor'] / ours['seconds']:.0%}" if ours.get("floor") else ""
        host = seconds(ours["dispatch"]) if ours.get("dispatch") else ""
        cells = [case, seconds(ours["seconds"]), host, floor, memory(ours["peak_bytes"])]
        lines.append(f"| {' | '.join(cells)} | {', '.join(map(_opponent, others))} |")
    return "\n".join([*lines, "", *_beside_the_model(document)])


def _beside_the_model(document: dict) -> list[str]:
    """Times beside docs/gpu.md's, and how many cases are wrong."""
    stages = document["stages"]
    times_ = {
        **stages.get("kernels", {}).get("cases", {}),
        **{f"step, {n}": c for n, c in stages.get("training", {}).get("cases", {}).items()},
    }
    lines = ["| call | measured | predicted | ratio |", "|---|---|---|---|"]
    for name, case in times_.items():
        measured, predicted = case.get("step") or case.get("device"), case.get("predicted")
        if measured and predicted:
            cells = [name, seconds(measured), seconds(predicted), times(measured / predicted)]
            lines.append(f"| {' | '.join(cells)} |")
    cases = stages.get("operators", {}).get("cases", {}).values()
    passed = sum(case.get("status") == "passed" for case in cases)
    failed = sum(case.get("status") in ("failed", "crashed", "hung") for case in cases)
    return [*lines, "", f"Against float64: {passed} cases right, {failed} wrong."]


def with_table(
    page: str, text: str, *, path: Path = README, begin: str = BEGIN, end: str = END
) -> str:
    """The page, by default the README, with ``text`` between its markers."""
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path}: expected the lines {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def draw_scaling(document: dict, path: Path) -> bool:
    """Time by N² and memory by N over N, ours against the opponents; False without such cases."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    curves: dict[str, list[dict]] = {}
    for case, entries in by_case(document).items():
        if case.startswith("scaling"):
            kind = case.split(",")[1].strip()
            for entry in entries:
                curves.setdefault(f"{kind}: {entry['contestant']}", []).append(entry)
    if not curves:
        return False
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, entries in curves.items():
        entries.sort(key=lambda e: e["sizes"]["N"])
        rows = [e["sizes"]["N"] for e in entries]
        style = "o-" if name.endswith(OURS) else "s--"
        times_ = [1e9 * e["seconds"] / e["sizes"]["N"] ** 2 for e in entries]
        (line,) = left.plot(rows, times_, style, label=name)
        if name.endswith(GIVEN_MEMORY):
            continue
        bytes_ = [(e["peak_bytes"] or math.nan) / e["sizes"]["N"] / 1024 for e in entries]
        right.plot(rows, bytes_, style, color=line.get_color())
    left.set(ylabel="time / N², nanoseconds", title="Time by N²")
    right.set(ylabel="peak extra memory / N, KiB", title="Memory by N")
    ticks = sorted({e["sizes"]["N"] for entries in curves.values() for e in entries})
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="rows N")
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _save(figure, path)
    return True


def draw_ratios(document: dict, path: Path) -> None:
    """How many times as long as ours each opponent takes, on a logarithmic scale."""
    from matplotlib.figure import Figure

    bars = [
        (f"{case}: {entry['contestant']}", entry["ratio"])
        for case, (_, *others) in by_case(document).items()
        if not case.startswith("scaling")
        for entry in others
        if not entry["contestant"].startswith(OURS)
    ]
    figure = Figure(figsize=(9, 0.26 * len(bars) + 1), layout="constrained")
    axes = figure.subplots()
    names, ratios = zip(*reversed(bars), strict=True)
    colours = ["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios]
    axes.barh(names, [ratio - 1 for ratio in ratios], left=1, color=colours)
    for position, ratio in enumerate(ratios):
        axes.text(max(ratio, 1) * 1.05, position, times(ratio), va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as long as nefkern")
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.12, y=0.01)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    from nefkern.segmentation.charts import svg  # costs seconds, of torchvision

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, svg(figure) + "\n")


def written(page: str, document: dict) -> str:
    """The README with both tables."""
    page = with_table(page, table(document))
    return with_table(page, gpu_table(PUBLISHED_GPU), begin=GPU_BEGIN, end=GPU_END)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n\n")[1])
    parser.add_argument("results", nargs="*", type=Path, help="default: what is published")
    parser.add_argument("--gpu", type=Path, metavar="FILE", help="results of bench.gpu_check")
    options = parser.parse_args(arguments)
    if options.gpu:
        publish_gpu(options.gpu)
    if options.results:
        document = merge(options.results)
        replace_file(PUBLISHED, json.dumps(document, indent=1) + "\n")
    document = merge([PUBLISHED])
    replace_file(README, written(README.read_text("utf-8"), document))
    draw_ratios(document, PLOTS / "ratios.svg")
    scaled = draw_scaling(document, PLOTS / "scaling.svg")
    print(f"{README}: table of {len(by_case(document))} cases; plots in {PLOTS}")
    if not scaled:
        print("no scaling cases among the results: no scaling.svg")


if __name__ == "__main__":
    sys.exit(main())
