"""``python -m tests.fuzz``: mutated inputs of every kind, for as long as one likes."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.operators import operators
from tests.fuzz.running import generator, run
from tests.fuzz.targets import TARGETS

ALL = {**TARGETS, "operators": (operators, 0.11)}


def shares(inputs: int, chosen: list[str]) -> dict[str, int]:
    """How many of ``inputs`` go to each of the chosen targets."""
    whole = sum(ALL[name][1] for name in chosen)
    return {name: max(1, round(inputs * ALL[name][1] / whole)) for name in chosen}


def main() -> int:
    """Run, and tell what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20000, metavar="N", help="in all [20000]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    parser.add_argument("--target", action="append", choices=[*ALL], help="one of them; repeatable")
    parser.add_argument("--only", type=int, metavar="N", help="one input, here, with its traceback")
    asked = parser.parse_args()
    chosen = asked.target or list(ALL)
    if asked.only is not None:
        return _one(chosen[0], asked.seed, asked.only)
    findings = 0
    for name, count in shares(asked.inputs, chosen).items():
        started = time.perf_counter()
        report = run(name, ALL[name][0], count, asked.seed)
        findings += len(report.findings)
        outcomes = ", ".join(f"{n} {what}" for what, n in sorted(report.outcomes.items()))
        print(f"{name}: {report.inputs} inputs, {time.perf_counter() - started:.0f} s: {outcomes}")
        for number, text in report.findings.items():
            print(f"  --target {name} --seed {asked.seed} --only {number}:")
            lines = [line for line in text.strip().splitlines() if set(line) - set(" ^~")]
            print("    " + "\n    ".join(lines[-8:]), flush=True)
    print(f"{findings} findings")
    return min(findings, 1)


def _one(name: str, seed: int, number: int) -> int:
    import os
    import tempfile
    from pathlib import Path

    os.environ["NEFKERN_MAX_PIXELS"] = "4000000"
    with tempfile.TemporaryDirectory() as folder:
        print(ALL[name][0](Path(folder))(generator(seed, name, number)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
