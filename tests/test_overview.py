"""README's overview picture is the one that its script draws, and follows light and dark."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "docs" / "overview.py"


def test_the_picture_is_what_the_script_draws():
    spec = importlib.util.spec_from_file_location("overview", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = SCRIPT.with_suffix(".svg").read_text("utf-8")
    assert script.overview() == drawn
    root = ET.fromstring(drawn)
    words = "".join(root.itertext())
    for word in ("frozen", "patch features", "κ", "ψ", "eigenfunctions", "argmax", "classes"):
        assert word in words
    for name, (light, dark) in script.THEMES.items():
        assert f".{name}{{fill:{light}}}" in words.partition("@media")[0]
        assert f".{name}{{fill:{dark}}}" in words.partition("@media(prefers-color-scheme:dark)")[2]
    assert "overview.svg" in (SCRIPT.parents[1] / "README.md").read_text("utf-8")
