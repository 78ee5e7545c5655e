"""The benchmark of a million rows, at a few thousand."""

from __future__ import annotations

from bench.million_rows import main


def test_stages_memory_and_agreement_are_printed(capsys):
    assert main(["--rows", "3000", "--columns", "16", "--clusters", "4", "--predict", "200"]) == 0
    printed = capsys.readouterr().out
    for part in ("nearest neighbours:", "graph and eigenvectors:", "K-means:", "peak"):
        assert part in printed
    for line in printed.splitlines():
        if "adjusted Rand index" in line:
            assert float(line.split()[-1]) > 0.98
