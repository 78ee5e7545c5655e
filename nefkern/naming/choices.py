"""What ``--formats`` takes; free of torch, so that ``--help`` comes at once."""

from __future__ import annotations

from nefkern.runtime.errors import UserError

FORMATS = {
    "coco": "coco.json: polygons, areas and boxes of all images",
    "coco-rle": "coco-rle.json: the same with run-length encoded masks: exactly the pixels",
    "labelme": "labelme/NAME.json of polygons for each image, which LabelMe opens with it",
    "cvat": 'cvat.xml: masks of all images, as "CVAT for images 1.1"',
    "voc": "voc/: SegmentationClass, SegmentationObject, Annotations, ImageSets, labelmap.txt",
}


def parse_formats(text: str) -> list[str]:
    """``--formats``, as a list without repetition.

    Raises:
        UserError: a format that isn't one.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--formats {name!r}: expected some of {','.join(FORMATS)}")
    return names
