"""What a wheel depends on, with versions and licences, as CycloneDX 1.6.

    python .ci/sbom.py WHEEL FOLDER

The wheel's own requirements, without extras, and theirs, as they are installed beside this Python:
a statement of what was built and tested with. A CUDA wheel holds NVIDIA's static runtime besides.
"""

from __future__ import annotations

import email
import importlib.metadata as metadata
import json
import re
import sys
import time
import uuid
import zipfile
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import Requirement
except ImportError:  # pip has a copy
    from pip._vendor.packaging.requirements import Requirement


def write_sbom(wheel: Path, out: Path, date: int) -> Path:
    """The list of a wheel's dependencies, NAME-VERSION.cdx.json in a folder."""
    about = wheel_metadata(wheel)
    name, version = about["Name"], about["Version"]
    components = [component(one) for one in dependencies(about.get_all("Requires-Dist", []))]
    own = {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}@{version}",
        "name": name,
        "version": version,
        "licenses": licences(about),
        "purl": f"pkg:pypi/{name}@{version}",
    }
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(components))}",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(date)),
            "component": own,
        },
        "components": components,
    }
    path = out / f"{name}-{version}.cdx.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return path


def wheel_metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def dependencies(requirements: list[str]) -> list[metadata.Distribution]:
    """What is required, and what that requires, as far as it is installed; sorted by name."""
    found: dict[str, metadata.Distribution] = {}
    left = list(requirements)
    while left:
        requirement = Requirement(left.pop())
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        left += found[name].requires or []
    return [found[name] for name in sorted(found)]


def component(one: metadata.Distribution) -> dict[str, Any]:
    name = re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()
    purl = f"pkg:pypi/{name}@{one.version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": one.metadata["Name"],
        "version": one.version,
        "licenses": licences(one.metadata),
        "purl": purl,
    }


def licences(about: Any) -> list[dict[str, Any]]:
    """An SPDX expression where the package gives one, else the names that it gives."""
    if expression := about.get("License-Expression"):
        return [{"expression": expression}]
    names = [c.split("::")[-1].strip() for c in about.get_all("Classifier") or []
             if c.startswith("License ::")]  # fmt: skip
    if not names and (text := (about.get("License") or "").strip()):
        names = [text.splitlines()[0][:100]]  # some give the whole text
    return [{"license": {"name": name}} for name in names or ["unknown"]]


if __name__ == "__main__":
    wheel, out = map(Path, sys.argv[1:])
    written = write_sbom(wheel, out, 0)
    for entry in json.loads(written.read_text("utf-8"))["components"]:
        told = [one.get("expression") or one["license"]["name"] for one in entry["licenses"]]
        print(f"{entry['name']:<28} {entry['version']:<16} {', '.join(told)}")
