"""What benchmarks of segments have in common: an evaluation with nothing beside its counts."""

from __future__ import annotations

from nefkern import evaluate
from nefkern.evaluation.evaluator import Evaluator


def evaluator(options: list[str]) -> Evaluator:
    """That of ``python -m nefkern.evaluate`` with these options, without pictures, intervals,
    floors and ceilings."""
    bare = ["--no-bounds", "--pictures", "0", "--bootstrap", "0"]
    parsed = evaluate.parser().parse_args([*options, *bare])
    return Evaluator(parsed, evaluate.chosen_methods(parsed))
