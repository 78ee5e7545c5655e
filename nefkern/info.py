"""``python -m nefkern.info``: versions, devices, and which backends can run here."""

from __future__ import annotations

import sys

from nefkern.runtime.commandline import command_parser
from nefkern.runtime.errors import command


def describe() -> str:
    """The page that the command prints."""
    import torch

    from nefkern import backends
    from nefkern.images import weights
    from nefkern.ops import registry
    from nefkern.training.runs import versions

    lines = ["versions"]
    lines += [f"  {name:<12} {version}" for name, version in versions().items()]
    lines += ["devices", f"  {'cpu':<12} {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        lines.append(f"  {f'cuda:{i}':<12} {torch.cuda.get_device_name(i)}")
    if not torch.cuda.is_available():
        lines.append(f"  {'cuda':<12} none found by PyTorch")
    native = backends.native_module()
    if not isinstance(native, str):
        built = native.build_info()
        lines.append("extension")
        lines += [f"  {name:<12} {value}" for name, value in built.items()]
        if reason := backends.failed_build():
            lines.append(f"  {'outdated':<12} the last installation built none: {reason}")
    lines.append(f"backends (now: {backends.current()})")
    for name, reason in backends.available().items():
        lines.append(
            f"  {name:<12} {'available' if reason is None else 'not available: ' + reason}"
        )
    lines.append("operators")
    for name, found in registry.implemented().items():
        lines.append(f"  {name:<30} {', '.join(found)}")
    lines.append("packaged backbones")
    for name, package in weights.PACKAGES.items():
        state = "installed" if package.path() else f"not installed: {package.install}"
        lines.append(f"  {name:<30} {state}")
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> None:
    """Print the page."""
    what = "Print versions, devices, and which backends can run here and why others not."
    command_parser("info", what, "").parse_args(arguments)
    import nefkern.ops  # noqa: F401  registers the operators
    from nefkern import backends

    backends.check_environment(runnable=False)

    print(describe())


if __name__ == "__main__":
    sys.exit(main())
