"""Stage "build": the machine, and the extension for it: found, or built, or why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu import process, tools
from bench.gpu.plan import NO_DEVICE, Settings
from bench.gpu.worker import Skipped

BUILD = process.ROOT / "build" / "gpu_check"
LIMIT = 170.0  # seconds


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    if case != "environment" and settings.device == "cuda" and not torch.cuda.is_available():
        raise Skipped(NO_DEVICE)
    yield from {"environment": environment, "extension": extension, "backends": backends}[case](
        settings
    )


def environment(settings: Settings) -> Iterator[dict[str, Any]]:
    """Machine and versions, which :mod:`bench.report` wants too."""
    from bench import harness

    found = harness.environment(rates=False)
    yield {"environment": found}
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(NO_DEVICE)
    yield {
        "cores": os.cpu_count(),
        "tools": {name: tools.find(name) for name in ("nvcc", "ncu", "compute-sanitizer")},
        "triton": _version("triton"),
        "gpu": _gpu() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu"
    says = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ) if shutil.which("nvidia-smi") else None  # fmt: skip
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        query: says.stdout.strip() if says else None,
    }


def extension(settings: Settings) -> Iterator[dict[str, Any]]:
    """Take the extension that is there, if it serves this device; else build it for this one."""
    reason = unfit(settings)
    if reason is None:
        yield {"extension": "found"}
        return
    yield {"extension": "to be built", "because": reason}
    command = ["cmake", "-S", process.ROOT, "-B", BUILD, "-G", "Ninja",
               f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    if settings.rehearsal:
        command.append("-DNEFKERN_CUDA=0")
    for step in (command, ["cmake", "--build", BUILD]):
        done = process.run(step, LIMIT, environment={"TORCH_CUDA_ARCH_LIST": architecture()})
        if done.code != 0:
            yield {"extension": "not built", "log": process.tail(done.output, 60)}
            raise RuntimeError(first_error(done))
    yield {"extension": "built", "architectures": architecture()}
    if again := _in_a_new_process(settings):
        raise RuntimeError(again)


def unfit(settings: Settings) -> str | None:
    """Why the extension that is installed does not serve the device; None: it does."""
    from nefkern.backends import native_module, serves

    native = native_module()
    if isinstance(native, str):
        return native
    if settings.rehearsal:
        return None
    built = native.build_info()
    if not built["cuda"]:
        return f"built without CUDA: {built.get('why_no_cuda', 'by an older version')}"
    return None if serves(built["cuda_architectures"], torch.cuda.get_device_capability()) else (
        f"built for {built['cuda_architectures']}"
    )  # fmt: skip


def _in_a_new_process(settings: Settings) -> str | None:
    """:func:`unfit`, where the old extension has not been looked for."""
    code = (
        "from bench.gpu import build, plan; "
        f"print(build.unfit(plan.Settings({settings.device!r}, {settings.size!r}, '')) or '')"
    )
    done = process.run([sys.executable, "-c", code], 60)
    return done.output.strip() or None if done.code == 0 else process.tail(done.output)


def architecture() -> str:
    """Of the device, as TORCH_CUDA_ARCH_LIST has it; with Hopper's own instructions."""
    if not torch.cuda.is_available():
        return os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def first_error(done: process.Finished) -> str:
    """The first line of a failed build that speaks of an error."""
    if done.code is None:
        return f"the build took more than {LIMIT:.0f} s"
    lines = [line.strip() for line in done.output.splitlines() if line.strip()]
    found = next((line for line in lines if re.search(r"\berror\b", line, re.I)), None)
    return found or (lines[-1] if lines else f"exit code {done.code}")


def backends(settings: Settings) -> Iterator[dict[str, Any]]:
    """Which can run, in a new process: this one may have loaded an older extension."""
    done = process.run([sys.executable, "-c", REPORT], 60)
    if done.code != 0:
        raise RuntimeError(process.tail(done.output))
    found = json.loads(done.output.strip().splitlines()[-1])
    yield {"backends": found["backends"], "environment": {"build": found["build"]}}
    wanted = ("cuda", "triton") if settings.device == "cuda" else ("cpu",)
    if all(found["backends"][name] for name in wanted):
        raise RuntimeError(f"no backend to check: {found['backends']}")


REPORT = """
import json
from nefkern import backends
native = backends.native_module()
build = native if isinstance(native, str) else dict(native.build_info())
print(json.dumps({"backends": backends.available(), "build": build}))
"""
