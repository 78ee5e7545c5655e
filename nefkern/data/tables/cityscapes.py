"""The labels of Cityscapes: position in the table is the id that ``*_gtFine_labelIds.png`` hold."""

from __future__ import annotations

from nefkern.data.constants import VOID

#: Name, train id (the 19 classes of the benchmark; VOID for the others), colour.
LABELS = (
    ("unlabeled", VOID, (0, 0, 0)),
    ("ego vehicle", VOID, (0, 0, 0)),
    ("rectification border", VOID, (0, 0, 0)),
    ("out of roi", VOID, (0, 0, 0)),
    ("static", VOID, (0, 0, 0)),
    ("dynamic", VOID, (111, 74, 0)),
    ("ground", VOID, (81, 0, 81)),
    ("road", 0, (128, 64, 128)),
    ("sidewalk", 1, (244, 35, 232)),
    ("parking", VOID, (250, 170, 160)),
    ("rail track", VOID, (230, 150, 140)),
    ("building", 2, (70, 70, 70)),
    ("wall", 3, (102, 102, 156)),
    ("fence", 4, (190, 153, 153)),
    ("guard rail", VOID, (180, 165, 180)),
    ("bridge", VOID, (150, 100, 100)),
    ("tunnel", VOID, (150, 120, 90)),
    ("pole", 5, (153, 153, 153)),
    ("polegroup", VOID, (153, 153, 153)),
    ("traffic light", 6, (250, 170, 30)),
    ("traffic sign", 7, (220, 220, 0)),
    ("vegetation", 8, (107, 142, 35)),
    ("terrain", 9, (152, 251, 152)),
    ("sky", 10, (70, 130, 180)),
    ("person", 11, (220, 20, 60)),
    ("rider", 12, (255, 0, 0)),
    ("car", 13, (0, 0, 142)),
    ("truck", 14, (0, 0, 70)),
    ("bus", 15, (0, 60, 100)),
    ("caravan", VOID, (0, 0, 90)),
    ("trailer", VOID, (0, 0, 110)),
    ("train", 16, (0, 80, 100)),
    ("motorcycle", 17, (0, 0, 230)),
    ("bicycle", 18, (119, 11, 32)),
)
