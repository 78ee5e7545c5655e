"""The 59 frequent classes of Pascal Context among its 459 labels.

In alphabetical order, which is that of their labels. Everything else is background. The customary
colours are ADE20K's first 60, background first.
"""

from __future__ import annotations

from nefkern.data.tables import ade20k

NUM_LABELS = 459

#: Name and label, the number that LabelMap holds in the publisher's .mat files.
CLASSES = (
    ("aeroplane", 2), ("bag", 9), ("bed", 18), ("bedclothes", 19), ("bench", 22), ("bicycle", 23),
    ("bird", 25), ("boat", 31), ("book", 33), ("bottle", 34), ("building", 44), ("bus", 45),
    ("cabinet", 46), ("car", 59), ("cat", 65), ("ceiling", 68), ("chair", 72), ("cloth", 80),
    ("computer", 85), ("cow", 98), ("cup", 104), ("curtain", 105), ("dog", 113), ("door", 115),
    ("fence", 144), ("floor", 158), ("flower", 159), ("food", 162), ("grass", 187),
    ("ground", 189), ("horse", 207), ("keyboard", 220), ("light", 232), ("motorbike", 258),
    ("mountain", 259), ("mouse", 260), ("person", 284), ("plate", 295), ("platform", 296),
    ("pottedplant", 308), ("road", 324), ("rock", 326), ("sheep", 347), ("shelves", 349),
    ("sidewalk", 354), ("sign", 355), ("sky", 360), ("snow", 366), ("sofa", 368), ("table", 397),
    ("track", 415), ("train", 416), ("tree", 420), ("truck", 424), ("tvmonitor", 427),
    ("wall", 440), ("water", 445), ("window", 454), ("wood", 458),
)  # fmt: skip

NAMES = tuple(name for name, _ in CLASSES)
LABELS = tuple(label for _, label in CLASSES)
BACKGROUND_COLOUR, COLOURS = ade20k.COLOURS[0], ade20k.COLOURS[1:60]
