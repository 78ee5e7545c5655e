"""The example of docs/distributed.md for SLURM."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from torch.distributed.run import get_args_parser

from nefkern import train
from nefkern.training.option_parsing import resolve


def test_the_slurm_example_is_a_script(tmp_path):
    """Run with stand-ins for SLURM's commands: what srun is given is torchrun with a command that
    train can read, on all cores; the job is put back only where the time was up."""
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    (script,) = (part for part in page.read_text("utf-8").split("```") if "#SBATCH" in part)
    for name, body in (
        (
            "scontrol",
            'if [ "$1" = show ]; then echo node0; echo node1; else echo "$@" > requeued; fi',
        ),
        ("srun", 'printf "%s\\n" "$@" > given'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"NNODES": 2, "JOB_ID": 7, "JOB_NODELIST": "node[0-1]", "CPUS_PER_TASK": 64}
    env = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    for seconds, requeued in ((0, False), (43_100, True)):
        text = f"SECONDS={seconds}\n{script.removeprefix('bash')}"
        subprocess.run(["bash", "-eu", "-c", text], check=True, cwd=tmp_path, env=env)
        assert (tmp_path / "requeued").exists() == requeued
    given = (tmp_path / "given").read_text("utf-8").splitlines()
    assert given[:2] == ["--cpus-per-task=64", "torchrun"]
    launcher, command = given[2 : given.index("-m")], given[given.index("-m") + 1 :]
    launched = get_args_parser().parse_args([*launcher, "-m", "nefkern.train"])
    assert (launched.nnodes, launched.rdzv_endpoint) == ("2", "node0:29500")
    assert command[0] == "nefkern.train"
    flags = vars(train.parser().parse_args(command[1:]))
    assert resolve(flags, flags.pop("config")).resume
