"""Files replaced in one step, and what is said where that fails."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from nefkern.runtime.files import remove_parts, replace_file, shortened


def test_the_old_file_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    replace_file(path, "old")
    replace_file(path, "äψ")
    assert path.read_bytes() == "äψ".encode()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        replace_file(path, "half")
    assert error.value.filename == str(path)
    assert path.read_text("utf-8") == "äψ"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("unicode_names")
def test_names_as_long_as_a_file_system_takes_them(tmp_path):
    for name in ("a" * 250, "é空" * 50):
        replace_file(tmp_path / name, "content")
        assert (tmp_path / name).read_text("utf-8") == "content"
    assert shortened("a" * 250) == "a" * 200
    assert shortened("é空" * 50) == "é空" * 40  # of five bytes each
    assert shortened("空" * 80) == "空" * 66
    assert shortened("a.png") == "a.png"


def test_a_disk_that_can_only_be_read_names_the_file(tmp_path, monkeypatch):
    """There even removing the part that was never made is refused."""

    def refused(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr("pathlib.Path.unlink", refused)
    with pytest.raises(OSError, match="Read-only") as error:
        replace_file(tmp_path / "a.txt", "content")
    assert error.value.filename == str(tmp_path / "a.txt")


def test_parts_of_killed_processes_go(tmp_path):
    def part(path: str, age: float = 0.0) -> Path:
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
        return path

    old, new = part("run/ab/.entry.0.part", 7200), part("run/ab/.entry.1.part")
    above, elsewhere = part("run/.state.2.part"), part("elsewhere/.other.3.part")
    whole = part("run/ab/entry")
    (tmp_path / "run/link").symlink_to(tmp_path / "elsewhere")
    remove_parts(tmp_path / "run", "*/.*.part", older=3600)
    assert [p.exists() for p in (old, new, above, elsewhere, whole)] == [False, *[True] * 4]
    remove_parts(tmp_path / "run", "*/.*.part")
    assert [p.exists() for p in (new, above, elsewhere, whole)] == [False, *[True] * 3]
    remove_parts(tmp_path / "run")
    assert not above.exists()
