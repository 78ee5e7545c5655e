"""The 27 groups of COCO-Stuff's labels: 12 of things and 15 of stuff.

The annotation files hold 0 to 181, a label's number less one: 91 of things, eleven of them in no
picture, then 91 of stuff in alphabetical order; 255 is unlabelled.
"""

from __future__ import annotations

from nefkern.data.constants import VOID
from nefkern.data.tables import voc

NUM_LABELS = 182

#: Groups of things, and the first label of each: they come one after another.
_THINGS = (
    ("person", 0), ("vehicle", 1), ("outdoor", 9), ("animal", 15), ("accessory", 25),
    ("sports", 33), ("kitchen", 43), ("food", 51), ("furniture", 61), ("electronic", 71),
    ("appliance", 77), ("indoor", 83),
)  # fmt: skip

#: Groups of stuff, with their labels.
_STUFF = {
    "ceiling": (101, 102),
    "floor": (100, 113, 114, 115, 116, 117),
    "food-stuff": (120, 121, 152, 169),
    "furniture-stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw-material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": (170, 171, 172, 173, 174, 175, 176),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}

NAMES = (
    "electronic", "appliance", "food", "furniture", "indoor", "kitchen", "accessory", "animal",
    "outdoor", "person", "sports", "vehicle", *_STUFF,
)  # fmt: skip
"""In the order that IIC, PiCIE and STEGO number them in."""

COLOURS = tuple(voc.colour(index + 1) for index in range(len(NAMES)))
"""No publisher has any: Pascal VOC's palette."""


def _class_of_label() -> tuple[int, ...]:
    found = [VOID] * NUM_LABELS
    ends = [first for _, first in _THINGS[1:]] + [91]
    for (name, first), end in zip(_THINGS, ends, strict=True):
        found[first:end] = [NAMES.index(name)] * (end - first)
    for name, labels in _STUFF.items():
        for label in labels:
            found[label] = NAMES.index(name)
    return tuple(found)


CLASS_OF_LABEL = _class_of_label()
"""Index in :data:`NAMES` of each of the 182 labels."""
