"""Which stages there are, in the order of their importance, and which cases each has.

Free of torch: the driver must start at once, and live where torch does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

#: Why nothing can be done.
NO_DEVICE = "PyTorch finds no CUDA device"


@dataclass(frozen=True)
class Settings:
    """What every stage is told.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        size: "paper" or "small".
        out: the file of the results; those of earlier stages can be read there.
    """

    device: str
    size: str
    out: str

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Stage:
    """Cases of one kind.

    Attributes:
        module: has ``run(case, settings)``, which yields dictionaries of figures as they come, and
            raises what is wrong.
        cases: by name, the most important first.
        share: of the time left that the stage may take.
        patience: seconds that one case may take.
        jobs: cases at a time; 1 where times are measured.
        repeats: failed cases that are repeated alone, under a checker of memory where there is one.
    """

    name: str
    module: str
    cases: Sequence[str]
    share: float
    patience: float
    jobs: int = 1
    repeats: int = 0


NAMES = ("build", "operators", "kernels", "opponents", "training", "counters", "sanitizer",
         "suite")  # fmt: skip
#: Operator and variant, each with the dtypes that it is tried in.
FLOATS = ("float32", "bfloat16", "float16")
OPERATORS: dict[str, Sequence[str]] = {
    "knn cosine": FLOATS,
    "knn euclidean": FLOATS,
    "knn inner_product": ("float32",),
    "knn database": FLOATS,
    "knn segments": ("float32",),
    "normalized_adjacency mean": ("float32",),
    "normalized_adjacency union": ("float32",),
    "add": ("float32",),
    "kappa": ("float32",),
    "kappa_padded": ("float32",),
    "feature_kappa": FLOATS,
    "weights_gradient": ("float32",),
    "spmm": FLOATS,
    "sddmm": FLOATS,
    "quadratic_form": FLOATS,
    "neuralef_loss": FLOATS,
    "linear_attention elu": FLOATS,
    "linear_attention softmax": FLOATS,
}
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
#: Without a kernel for processors, where nobody waits for an answer.
ON_GPUS_ALONE = ("kappa_padded",)
RAGGED = "ragged"  # no size a multiple of anything

#: Timed by device: operator, dtype.
TIMED = (
    *(("knn cosine", "float32"), ("kappa", "float32"), ("spmm", "float32")),
    *(("linear_attention softmax", "bfloat16"), ("neuralef_loss", "float32")),
    *(("knn segments", "float32"), ("linear_attention softmax", "float32"), ("spmm", "bfloat16")),
    *(("linear_attention elu", "bfloat16"), ("normalized_adjacency mean", "float32")),
    *(("add", "float32"), ("sddmm", "float32"), ("quadratic_form", "float32")),
    *(("kappa_padded", "float32"), ("weights_gradient", "float32")),
)
OPPONENTS = (
    *("bench_knn.test_cosine", "bench_spmm.test_spmm", "bench_kappa.test_kappa"),
    *("bench_neuralef_loss.test_neuralef_loss", "bench_train_step.test_graph_and_objective"),
    "bench_linear_attention.test_forward_and_backward softmax bfloat16",
    "bench_linear_attention.test_forward_and_backward softmax float32",
    "bench_linear_attention.test_forward_and_backward elu bfloat16",
    *("bench_knn.test_pixels", "bench_spmm.test_spmm_bfloat16", "bench_sddmm.test_sddmm"),
    *("bench_train_step.test_train_step", "bench_knn.test_euclidean", "bench_knn.test_database"),
)
#: On a processor the others compile for longer than a rehearsal takes.
REHEARSED_OPPONENTS = ("bench_spmm.test_spmm", "bench_kappa.test_kappa")


#: "psi": κ, ψ, objective and Adam on given features; "whole": with a backbone; "captured": that as
#: one CUDA graph.
TRAINING = ("whole amp", "captured amp", "psi amp", "whole float32", "psi float32")
REHEARSED_TRAINING = ("whole amp", "captured amp", "psi amp")
REHEARSED_TIMES = 5  # of TIMED
#: By rank, of what ncu looks at: the least sure prediction first.
COUNTED = ("1", "2", "3", "4")


def operator_cases(settings: Settings) -> list[str]:
    """ "operator/backend/dtype/size": the paper's size in float32 first, then ragged, then half."""
    cases = [
        f"{operator}/{backend}/{dtype}/{size}"
        for operator, dtypes in OPERATORS.items()
        if settings.device != "cpu" or operator not in ON_GPUS_ALONE
        for backend in BACKENDS[settings.device]
        for dtype in dtypes
        for size in (settings.size, RAGGED)
    ]
    order = {dtype: number for number, dtype in enumerate(FLOATS)}
    return sorted(cases, key=lambda case: (order[_part(case, 2)], _part(case, 3) == RAGGED))


def timed_cases(settings: Settings) -> list[str]:
    return ["machine rates", "launches"] + [
        f"{operator}/{backend}/{dtype}/{settings.size}"
        for operator, dtype in TIMED[: REHEARSED_TIMES if settings.rehearsal else None]
        for backend in BACKENDS[settings.device]
    ]


def opponent_cases(settings: Settings) -> Sequence[str]:
    return REHEARSED_OPPONENTS if settings.rehearsal else OPPONENTS


def _part(case: str, number: int) -> str:
    return case.split("/")[number]


def stages(settings: Settings) -> list[Stage]:
    """All of them, the most important first: a short budget ends where it ends."""
    # Dense float64 matrices of the paper's size are 1.7 GB each, a few at a time in each job.
    jobs = min(6, max(1, (os.cpu_count() or 1) // 2))

    def stage(name: str, cases: Sequence[str], share: float, patience: float, **more) -> Stage:
        return Stage(name, f"bench.gpu.{name}", cases, share, patience, **more)

    return [
        stage("build", ("environment", "extension", "backends"), 0.4, 180),
        stage("operators", operator_cases(settings), 0.4, 60, jobs=jobs, repeats=3),
        stage("kernels", timed_cases(settings), 0.35, 40),
        stage("opponents", opponent_cases(settings), 0.4, 60),
        stage("training", REHEARSED_TRAINING if settings.rehearsal else TRAINING, 0.4, 60),
        stage("counters", COUNTED, 0.4, 50),
        stage("sanitizer", ("memcheck", "racecheck", "synccheck", "initcheck", "operators"),
              0.5, 90, jobs=2),
        stage("suite", ("tests",), 1.0, 600),
    ]  # fmt: skip
