import pytest
import torch

from nefkern.runtime import devices
from nefkern.runtime.devices import choose_device, memory
from nefkern.runtime.errors import UserError


def test_devices():
    assert choose_device("cpu").type == "cpu"
    for name in ("nonsense", "cuda:x", "meta", ""):
        with pytest.raises(UserError, match=f"^--device {name}: expected auto, cpu, cuda"):
            choose_device(name)
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(UserError, match="--device cuda: not usable on this machine"):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "4096\n"}, 4096),
        ("0::/\n", {"memory.max": "max\n"}, 1 << 40),
        ("0::/\n", {}, 1 << 40),  # the root of a machine
        (
            "0::/jobs.slice/job/step\n",
            {"jobs.slice/memory.max": "max\n", "jobs.slice/job/memory.max": "8192\n"},
            8192,
        ),
        ("0::/a/b\n", {"a/memory.max": "4096\n", "a/b/memory.max": "8192\n"}, 4096),
        # Version 1; the path is the one outside the container.
        (
            "5:cpu,cpuacct:/docker/x\n4:hugetlb,memory:/docker/x\n",
            {"memory/memory.limit_in_bytes": "2048\n", "memory.max": "7\n"},
            2048,
        ),
        ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, 1 << 40),
    ],
)
def test_memory_is_what_the_control_group_may_use(tmp_path, monkeypatch, group, files, expected):
    monkeypatch.setattr(devices, "_machine_memory", lambda: 1 << 40)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert memory(tmp_path) == expected


def test_memory_without_control_groups(tmp_path):
    assert memory(tmp_path) == devices._machine_memory() > 0
    assert 0 < memory() <= devices._machine_memory()
