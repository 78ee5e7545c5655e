"""bench.edge_parameters, on images whose edges are known."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.edge_parameters import BILINEAR, CHOSEN, USUAL, Drawn, table
from nefkern.segmentation.graph_edges import DEFAULT
from nefkern.segmentation.refinement import Job


def jobs(count: int = 4) -> list[Job]:
    """Two halves, dark and bright, of a slanting border; probabilities of patches of 12 pixels."""
    found = []
    for number in range(count):
        y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
        annotation = (x + y // 2 > 26 + 3 * number).to(torch.uint8)
        image = (40 + 160 * annotation).expand(3, -1, -1).contiguous().to(torch.uint8)
        share = F.avg_pool2d(annotation[None, None].float(), 12)
        share = F.interpolate(share, (48, 48), mode="bilinear")[0, 0]
        probabilities = torch.stack([1 - share, share]).half()
        sample = SimpleNamespace(annotation=annotation)
        found.append(Job("", image, probabilities, torch.tensor([1, 0]), (sample, "ours"), 12.0))
    return found


def test_edges_are_drawn_and_matched():
    """Clusters are numbered the other way round."""
    every = torch.ones(4, dtype=torch.bool)
    plain, graph = (Drawn(jobs(), (2, 2), chosen) for chosen in (None, DEFAULT))
    matching = plain.matching(every)
    assert matching.tolist() == [1, 0]
    before, after = (drawn.scores(matching, every) for drawn in (plain, graph))
    assert (after > before).all()
    assert after[0] > 0.97


def test_the_table_holds_the_other_half():
    told = table(jobs(), (2, 2), splits=1)
    rows = {line.split("|")[1].strip(): line for line in told.splitlines() if line.startswith("|")}
    assert {BILINEAR, CHOSEN, USUAL} <= rows.keys()
    assert told.count(" of 2)") >= 1
