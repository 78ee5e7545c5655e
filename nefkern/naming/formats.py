"""What annotation tools read: COCO, LabelMe, CVAT and Pascal VOC."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree as xml

import numpy as np
from PIL import Image

from nefkern.data.constants import VOID
from nefkern.naming.instances import Instance, box_runs, coco_rle, polygon
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import make_folder, replace_file, shortened
from nefkern.segmentation.pictures import write_png
from nefkern.version import __version__

log = logging.getLogger(__name__)

#: Characters of file names that XML 1.0 has no place for, not even as references.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Annotated:
    """An image and its classes.

    Attributes:
        file: the image.
        name: what its files are called, perhaps in a folder, without a suffix.
        classes: uint8 ``[H, W]``, 255 void.
        instances: the connected regions of ``classes``.
    """

    file: Path
    name: str
    classes: np.ndarray
    instances: Sequence[Instance]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.classes.shape
        return height, width

    @property
    def image_name(self) -> str:
        """The image's file name, in the folder that ``name`` has; where another image has that, the
        file's path as it was given."""
        own = {shortened(self.file.stem), shortened(self.file.name)}
        if Path(self.name).name not in own:  # numbered
            return self.file.as_posix()
        return str(PurePosixPath(Path(self.name).parent.as_posix(), self.file.name))


class Format:
    """A writer of annotations.

    Args:
        folder: to write to.
        classes: names of the classes.
        colours: uint8 ``[C, 3]``.
    """

    def __init__(self, folder: Path, classes: Sequence[str], colours: np.ndarray) -> None:
        self.folder, self.classes, self.colours = folder, list(classes), colours

    def add(self, image: Annotated) -> None:
        """Take an image; writes what is the image's own."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what is of all images."""


class Coco(Format):
    """One JSON of all images; segments are polygons, areas those of the pixels."""

    file = "coco.json"

    def __init__(self, folder: Path, classes: Sequence[str], colours: np.ndarray) -> None:
        super().__init__(folder, classes, colours)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, image: Annotated) -> None:
        height, width = image.size
        number = len(self._images) + 1
        name = image.image_name
        self._images.append({"id": number, "file_name": name, "width": width, "height": height})
        for instance in image.instances:
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": number,
                    "category_id": instance.label + 1,  # 0 is the background by custom
                    "segmentation": self._segmentation(instance, image.size),
                    "area": instance.area,
                    "bbox": list(instance.box),
                    "iscrowd": 0,
                }
            )

    def _segmentation(self, instance: Instance, size: tuple[int, int]) -> Any:
        return [[round(c, 2) for point in polygon(instance) for c in point]]

    def finish(self) -> None:
        content = {
            "info": {"description": f"written by nefkern {__version__}"},
            "licenses": [],
            "images": self._images,
            "annotations": self._annotations,
            "categories": [
                {"id": i + 1, "name": name, "supercategory": ""}
                for i, name in enumerate(self.classes)
            ],
        }
        replace_file(self.folder / self.file, json.dumps(content, ensure_ascii=False))


class CocoRLE(Coco):
    """As :class:`Coco`, with exactly the pixels."""

    file = "coco-rle.json"

    def _segmentation(self, instance: Instance, size: tuple[int, int]) -> Any:
        return coco_rle(instance, size)


class LabelMe(Format):
    """A JSON of polygons for each image, which it points to; in a folder, since an image may be
    called as another format's file."""

    def add(self, image: Annotated) -> None:
        height, width = image.size
        path = self.folder / "labelme" / f"{image.name}.json"
        content = {
            "version": "5.0.0",
            "flags": {},
            "shapes": [self._shape(instance) for instance in image.instances],
            "imagePath": _relative(image.file, path.parent),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        make_folder(self.folder, path.parent)
        replace_file(path, json.dumps(content, ensure_ascii=False, indent=1))

    def _shape(self, instance: Instance) -> dict[str, Any]:
        return {
            "label": self.classes[instance.label],
            "points": [[round(x, 2), round(y, 2)] for x, y in polygon(instance)],
            "group_id": None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
        }


class Cvat(Format):
    """One XML of all images, "CVAT for images 1.1", with masks."""

    def __init__(self, folder: Path, classes: Sequence[str], colours: np.ndarray) -> None:
        super().__init__(folder, classes, colours)
        self._root = xml.Element("annotations")
        xml.SubElement(self._root, "version").text = "1.1"
        task = xml.SubElement(xml.SubElement(self._root, "meta"), "task")
        self._size = xml.SubElement(task, "size")
        xml.SubElement(task, "mode").text = "annotation"
        labels = xml.SubElement(task, "labels")
        for name, colour in zip(self.classes, colours.tolist(), strict=True):
            label = xml.SubElement(labels, "label")
            xml.SubElement(label, "name").text = name
            xml.SubElement(label, "color").text = "#{:02x}{:02x}{:02x}".format(*colour)
            xml.SubElement(label, "type").text = "any"
            xml.SubElement(label, "attributes")
        self._count = 0

    def add(self, image: Annotated) -> None:
        height, width = image.size
        facts = {"id": self._count, "name": image.image_name, "width": width, "height": height}
        element = xml.SubElement(self._root, "image", {k: str(v) for k, v in facts.items()})
        self._count += 1
        for instance in image.instances:
            left, top, w, h = instance.box
            mask = {
                "label": self.classes[instance.label],
                "source": "auto",
                "occluded": "0",
                "rle": ", ".join(map(str, box_runs(instance))),
                **{"left": str(left), "top": str(top), "width": str(w), "height": str(h)},
                "z_order": "0",
            }
            xml.SubElement(element, "mask", mask)

    def finish(self) -> None:
        self._size.text = str(self._count)
        _write_xml(self._root, self.folder / "cvat.xml")


class Voc(Format):
    """The folders of Pascal VOC: class and object images, boxes, the list and the label map.

    Class 0 is VOC's background, so a class's index there is one more.
    """

    #: Index images have 8 bits; 0 is the background and 255 void.
    most_objects = 254

    def __init__(self, folder: Path, classes: Sequence[str], colours: np.ndarray) -> None:
        super().__init__(folder / "voc", classes, colours)
        bad = next(
            (name for name in classes if set(name) & set(":#") or name == "background"), None
        )
        if bad is not None:
            raise UserError(
                f"--formats voc: the name {bad!r} cannot stand in labelmap.txt: expected none with "
                "':' or '#', and not 'background', which VOC's index 0 has"
            )
        if len(classes) > self.most_objects:
            raise UserError(f"--formats voc: {len(classes)} classes, expected at most 254")
        self._names: list[str] = []
        # At once: by it the folder is known, whose index images are no photographs.
        self._write_labels()

    def _write_labels(self) -> None:
        labels = zip(("background", *self.classes), self._colours().tolist(), strict=True)
        text = "".join(f"{name}:{r},{g},{b}::\n" for name, (r, g, b) in labels)
        make_folder(self.folder.parent, self.folder)
        replace_file(self.folder / "labelmap.txt", f"# label:color_rgb:parts:actions\n{text}")

    def add(self, image: Annotated) -> None:
        name = PurePosixPath(Path(image.name)).as_posix()
        if len(name.splitlines()) == 1:
            self._names.append(name)
        else:
            log.warning("%s: left out of voc/ImageSets, where a line is a name", image.file)
        background = image.classes == VOID
        self._write("SegmentationClass", image, np.where(background, 0, image.classes + 1))
        objects = np.zeros(image.size, np.uint8)
        largest = sorted(image.instances, key=lambda i: -i.area)[: self.most_objects]
        for number, instance in enumerate(largest, 1):
            left, top, w, h = instance.box
            objects[top : top + h, left : left + w][instance.mask] = number
        self._write("SegmentationObject", image, objects, voc_colours())
        self._write_boxes(image, largest)

    def _write(
        self, kind: str, image: Annotated, index: np.ndarray, colours: np.ndarray | None = None
    ) -> None:
        path = self.folder / kind / f"{image.name}.png"
        make_folder(self.folder, path.parent)
        colours = self._colours() if colours is None else colours
        write_png(palette_image(index.astype(np.uint8), colours), path)

    def _colours(self) -> np.ndarray:
        return np.concatenate([np.zeros((1, 3), np.uint8), self.colours])

    def _write_boxes(self, image: Annotated, objects: Sequence[Instance]) -> None:
        height, width = image.size
        root = xml.Element("annotation")
        xml.SubElement(root, "folder").text = str(PurePosixPath(image.image_name).parent)
        xml.SubElement(root, "filename").text = image.image_name
        size = xml.SubElement(root, "size")
        for key, value in (("width", width), ("height", height), ("depth", 3)):
            xml.SubElement(size, key).text = str(value)
        xml.SubElement(root, "segmented").text = "1"
        for instance in objects:
            element = xml.SubElement(root, "object")
            xml.SubElement(element, "name").text = self.classes[instance.label]
            for key in ("difficult", "truncated", "occluded"):
                xml.SubElement(element, key).text = "0"
            left, top, w, h = instance.box  # VOC counts pixels from 1, the last one included
            box = xml.SubElement(element, "bndbox")
            sides = {"xmin": left + 1, "ymin": top + 1, "xmax": left + w, "ymax": top + h}
            for key, value in sides.items():
                xml.SubElement(box, key).text = str(value)
        path = self.folder / "Annotations" / f"{image.name}.xml"
        make_folder(self.folder, path.parent)
        _write_xml(root, path)

    def finish(self) -> None:
        lines = "".join(f"{name}\n" for name in self._names)
        for task in ("Segmentation", "Main"):
            make_folder(self.folder, self.folder / "ImageSets" / task)
            replace_file(self.folder / "ImageSets" / task / "default.txt", lines)


WRITERS: dict[str, type[Format]] = {
    "coco": Coco,
    "coco-rle": CocoRLE,
    "labelme": LabelMe,
    "cvat": Cvat,
    "voc": Voc,
}
"""By the names in :data:`nefkern.naming.choices.FORMATS`."""


def palette_image(index: np.ndarray, colours: np.ndarray) -> Image.Image:
    """uint8 indices as an image with a palette; 255 is void, and pale as in VOC, if it is free."""
    picture = Image.fromarray(index)
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    if len(colours) < 256:
        table[VOID] = (224, 224, 192)
    picture.putpalette(table.tobytes())
    return picture


def voc_colours() -> np.ndarray:
    """Pascal VOC's colours of objects, uint8 ``[256, 3]``: the index's bits dealt out to R, G, B,
    from the highest down."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel & 1) << (7 - bit)).astype(np.uint8)
        index = index >> 3
    return colours


def _relative(file: Path, folder: Path) -> str:
    """The way from a folder to a file; the whole path where there is none (another drive)."""
    try:
        return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return str(file.resolve())


def _write_xml(root: xml.Element, path: Path) -> None:
    xml.indent(root, " ")
    text = xml.tostring(root, encoding="unicode")
    text = _NOT_XML.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    replace_file(path, f"<?xml version='1.0' encoding='utf-8'?>\n{text}")
