"""``python -m bench.gpu_check --out FILE``: all that a few minutes on a GPU machine can tell.

The extension is found or built; every operator is held against float64 on each of the GPU's back
ends; kernels, opponents and training steps are timed beside what docs/gpu.md predicts; ncu,
compute-sanitizer and the tests follow as far as they are there and the time reaches. What fails is
recorded, and stops nothing but itself.

--out is rewritten after each figure. "python -m bench.report --gpu FILE" publishes it.
"--device cpu" rehearses everything on a processor, in seconds.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import plan, summary
from bench.gpu.document import Document, cases
from bench.gpu.plan import NO_DEVICE, Settings, Stage
from bench.gpu.supervise import Supervisor
from nefkern.runtime.errors import ArgumentParser, UserError, command

RESERVE = 3.0  # seconds, for the summary
LEAST = 2.0  # what a stage is begun with


def check(stages: Sequence[Stage], settings: Settings, budget: float) -> Document:
    """Run the stages within ``budget`` seconds; the results, as they stand in ``settings.out``."""
    document = Document(
        Path(settings.out), budget=budget, device=settings.device, size=settings.size
    )
    end = time.monotonic() + budget - RESERVE
    for stage in stages:
        if _without_device(document):
            document.stage(stage.name, why=NO_DEVICE)
        elif (left := end - time.monotonic()) < LEAST:
            document.stage(stage.name, why=f"not begun: {max(0.0, left):.1f} s were left")
        else:
            _run(stage, settings, document, left * stage.share)
    return document


def _run(stage: Stage, settings: Settings, document: Document, limit: float) -> None:
    print(f"{stage.name}: {len(stage.cases)} cases, at most {limit:.0f} s", flush=True)
    began = time.monotonic()
    document.stage(stage.name, limit=round(limit, 1))
    try:
        Supervisor(stage, settings, document, began + limit).run()
    finally:
        document.stage(stage.name, seconds=round(time.monotonic() - began, 1))


def _without_device(document: Document) -> bool:
    found = cases(document.content, "build").get("environment", {})
    return NO_DEVICE in found.get("why", "")


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt("the results so far are kept")


@command
def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON of results")
    parser.add_argument("--budget", type=float, default=480, metavar="S", help="seconds; [480]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument(
        "--size", choices=("paper", "small"), help="of the inputs [paper; on a cpu small]"
    )
    parser.add_argument(
        "--stages", metavar="NAME,...", help="only these: " + ", ".join(plan.NAMES) + " [all]"
    )
    options = parser.parse_args(arguments)
    if not options.budget > RESERVE + LEAST:
        raise UserError(f"--budget {options.budget:g}: expected more than {RESERVE + LEAST:g} s")
    size = options.size or ("small" if options.device == "cpu" else "paper")
    settings = Settings(options.device, size, str(options.out.resolve()))
    chosen = _chosen(options.stages, plan.stages(settings))
    before = signal.signal(signal.SIGTERM, _interrupted)
    try:
        check(chosen, settings, options.budget)
    finally:
        signal.signal(signal.SIGTERM, before)
        content = json.loads(options.out.read_text("utf-8"))
        print(summary.text(content))
        print(f"\nresults: {options.out}")
    return 1 if summary.wrong(content) or _without_results(content) else 0


def _chosen(names: str | None, stages: list[Stage]) -> list[Stage]:
    if names is None:
        return stages
    wanted = names.split(",")
    if unknown := set(wanted) - {stage.name for stage in stages}:
        raise UserError(
            f"--stages {names}: expected names of {', '.join(plan.NAMES)}, got {sorted(unknown)[0]}"
        )
    return [stage for stage in stages if stage.name in wanted]


def _without_results(content: dict) -> bool:
    return not any(
        case.get("status") == "passed"
        for stage in content["stages"].values()
        for case in stage["cases"].values()
    )


if __name__ == "__main__":
    sys.exit(main())
