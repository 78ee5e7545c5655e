"""What an exported file does before and after the networks, in ONNX's own operators.

The sizes are known where the file runs, not where it is made: so these parts are written in ONNX,
where every size is a number like others. They compute what
:meth:`nefkern.segmentation.segmenter.Segmenter.__call__` does with an image that it sees in one
piece: the resize to the scale of training, padding to whole patches, and bilinear up-sampling of
the logits before the argmax, row by row, so that memory does not grow with K times the pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nefkern.data.constants import LONGEST

if TYPE_CHECKING:
    import onnx

    from nefkern.segmentation.segmenter import Segmenter

#: Of all parts.
OPSET, IR_VERSION = 20, 10

#: What the names of values in these parts begin with: no exporter's do.
PREFIX = "nefkern_"

_SCALE = """
  crop = Constant <value = double[1] {{{crop}}}> ()
  longest = Constant <value = double[1] {{{longest}}}> ()
  least = Constant <value = double[1] {{{least}}}> ()
  one = Constant <value = double[1] {{1}}> ()
  whole_sides = Shape <start = 2> (image)
  sides = Cast <to = 11> (whole_sides)
  short = ReduceMin (sides)
  long = ReduceMax (sides)
  enlarged = Div (crop, short)
  most = Div (longest, long)
  bound = Max (one, most)
  scale = Min (enlarged, bound)
  exact = Mul (sides, scale)
  rounded = Round (exact)
  size = Max (least, rounded)
  exact_image = Cast <to = 11> (image)
"""

#: For backbones that see images resized to their own input size.
_NATIVE = """
  side = Constant <value = double[1] {{{side}}}> ()
  reference = {reference} (size)
  more = Mul (size, side)
  native = Div (more, reference)
  native_rounded = Round (native)
  seen = Max (one, native_rounded)
"""

_AS_IT_IS = """
  seen = Identity (size)
  resized = Identity (at_scale)
"""

#: The matrix ``{r}_weights`` [after, before] that resizes one axis. ONNX's Resize is antialiased
#: too, but every runtime rounds in its own way; this is what PyTorch does with bytes, with its
#: weights of 16 bits, to the last bit.
_WEIGHTS = """
  {r}_first = Constant <value = int64[1] {{{place}}}> ()
  {r}_second = Constant <value = int64[1] {{{after}}}> ()
  {r}_before = Slice ({size_before}, {r}_first, {r}_second)
  {r}_after = Slice ({size_after}, {r}_first, {r}_second)
  {r}_scalar = Constant <value = int64[0] {{}}> ()
  {r}_begin = Constant <value = double {{0}}> ()
  {r}_unit = Constant <value = double {{1}}> ()
  {r}_half = Constant <value = double {{0.5}}> ()
  {r}_two = Constant <value = double {{2}}> ()
  {r}_a = Reshape ({r}_after, {r}_scalar)
  {r}_b = Reshape ({r}_before, {r}_scalar)
  {r}_new = Range ({r}_begin, {r}_a, {r}_unit)
  {r}_old = Range ({r}_begin, {r}_b, {r}_unit)
  {r}_ratio = Div ({r}_before, {r}_after)
  {r}_width = Max ({r}_ratio, {r}_unit)
  {r}_new_centre = Add ({r}_new, {r}_half)
  {r}_old_centre = Add ({r}_old, {r}_half)
  {r}_place = Mul ({r}_new_centre, {r}_ratio)
  {r}_as_column = Constant <value = int64[1] {{1}}> ()
  {r}_column = Unsqueeze ({r}_place, {r}_as_column)
  {r}_difference = Sub ({r}_old_centre, {r}_column)
  {r}_distance = Abs ({r}_difference)
  {r}_x = Div ({r}_distance, {r}_width)
{kernel}
  {r}_sum = ReduceSum <keepdims = 1> ({r}_kernel, {r}_as_column)
  {r}_normal = Div ({r}_kernel, {r}_sum)
  {r}_largest = ReduceMax <keepdims = 0> ({r}_normal)
  {r}_bits = Constant <value = double {{32767.5}}> ()
  {r}_room = Div ({r}_bits, {r}_largest)
  {r}_room_single = Cast <to = 1> ({r}_room)
  {r}_log = Log ({r}_room_single)
  {r}_log_two = Constant <value = float {{0.6931471805599453}}> ()
  {r}_binary = Div ({r}_log, {r}_log_two)
  {r}_ceiled = Ceil ({r}_binary)
  {r}_one_single = Constant <value = float {{1}}> ()
  {r}_most_bits = Constant <value = float {{22}}> ()
  {r}_below = Sub ({r}_ceiled, {r}_one_single)
  {r}_exponent = Min ({r}_below, {r}_most_bits)
  {r}_exponent_double = Cast <to = 11> ({r}_exponent)
  {r}_one = Pow ({r}_two, {r}_exponent_double)
  {r}_large = Mul ({r}_normal, {r}_one)
  {r}_sign = Sign ({r}_large)
  {r}_size = Abs ({r}_large)
  {r}_nearest = Add ({r}_size, {r}_half)
  {r}_floor = Floor ({r}_nearest)
  {r}_weights = Mul ({r}_floor, {r}_sign)
"""

#: Bytes after one axis is resized: the sum, rounded.
_ROUNDED = """
  {r}_more = Mul ({r}_one, {r}_half)
  {r}_up = Add ({r}_product, {r}_more)
  {r}_share = Div ({r}_up, {r}_one)
  {r}_whole = Floor ({r}_share)
  {r}_white = Constant <value = double {{255}}> ()
  {r}_positive = Max ({r}_whole, {r}_begin)
  {result} = Min ({r}_positive, {r}_white)
"""

_KERNELS = {
    "bilinear": """
  {r}_slope = Sub ({r}_unit, {r}_x)
  {r}_kernel = Max ({r}_slope, {r}_begin)
""",
    # Keys's with a = -1/2: (3x - 5)x²/2 + 1 up to 1, ((5 - x)x - 8)x/2 + 2 up to 2.
    "bicubic": """
  {r}_three = Constant <value = double {{3}}> ()
  {r}_five = Constant <value = double {{5}}> ()
  {r}_eight = Constant <value = double {{8}}> ()
  {r}_square = Mul ({r}_x, {r}_x)
  {r}_inner_a = Mul ({r}_x, {r}_three)
  {r}_inner_b = Sub ({r}_inner_a, {r}_five)
  {r}_inner_c = Mul ({r}_inner_b, {r}_square)
  {r}_inner_d = Mul ({r}_inner_c, {r}_half)
  {r}_inner = Add ({r}_inner_d, {r}_unit)
  {r}_outer_a = Sub ({r}_five, {r}_x)
  {r}_outer_b = Mul ({r}_outer_a, {r}_x)
  {r}_outer_c = Sub ({r}_outer_b, {r}_eight)
  {r}_outer_d = Mul ({r}_outer_c, {r}_x)
  {r}_outer_e = Mul ({r}_outer_d, {r}_half)
  {r}_outer = Add ({r}_outer_e, {r}_two)
  {r}_is_inner = Less ({r}_x, {r}_unit)
  {r}_is_within = Less ({r}_x, {r}_two)
  {r}_far = Where ({r}_is_within, {r}_outer, {r}_begin)
  {r}_kernel = Where ({r}_is_inner, {r}_inner, {r}_far)
""",
}

_PADDED = """
  patch = Constant <value = double[1] {{{patch}}}> ()
  exact_cells = Div (seen, patch)
  cells = Ceil (exact_cells)
  padded = Mul (cells, patch)
  missing = Sub (padded, seen)
  at_end = Cast <to = 7> (missing)
  nothing = Constant <value = int64[6] {{0, 0, 0, 0, 0, 0}}> ()
  pads = Concat <axis = 0> (nothing, at_end)
  colours = Cast <to = 1> (resized)
  {pixels} = Pad <mode = "edge"> (colours, pads)
"""

#: Between which two cells the pixels of one axis lie, and how far from the first.
_AXIS = """
  {a}_at = Constant <value = int64[1] {{{place}}}> ()
  {a}_end = Constant <value = int64[1] {{{after}}}> ()
  {a}_length = Slice (sides, {a}_at, {a}_end)
  {a}_seen = Slice (seen, {a}_at, {a}_end)
  {a}_grid = Shape <start = {dim}, end = {dim_end}> ({logits})
  {a}_cells = Cast <to = 11> ({a}_grid)
  {a}_last = Sub ({a}_cells, one)
  {a}_zero = Sub (one, one)
  {a}_span = Mul ({a}_length, patch)
  {a}_step = Div ({a}_seen, {a}_span)
  {a}_empty = Constant <value = int64[0] {{}}> ()
  {a}_stop = Reshape ({a}_length, {a}_empty)
  {a}_first = Reshape ({a}_zero, {a}_empty)
  {a}_unit = Reshape (one, {a}_empty)
  {a}_pixels = Range ({a}_first, {a}_stop, {a}_unit)
  {a}_half = Constant <value = double[1] {{0.5}}> ()
  {a}_centres = Add ({a}_pixels, {a}_half)
  {a}_scaled = Mul ({a}_centres, {a}_step)
  {a}_moved = Sub ({a}_scaled, {a}_half)
  {a}_above = Max ({a}_moved, {a}_zero)
  {a}_position = Min ({a}_above, {a}_last)
  {a}_floor = Floor ({a}_position)
  {a}_next = Add ({a}_floor, one)
  {a}_bounded = Min ({a}_next, {a}_last)
  {a}_lower = Cast <to = 7> ({a}_floor)
  {a}_upper = Cast <to = 7> ({a}_bounded)
  {a}_exact = Sub ({a}_position, {a}_floor)
  {a}_share = Cast <to = 1> ({a}_exact)
"""

_AFTER = """
  left = Gather <axis = 3> ({logits}, x_lower)
  right = Gather <axis = 3> ({logits}, x_upper)
  difference = Sub (right, left)
  moved = Mul (difference, x_share)
  columns = Add (left, moved)
  found = Scan <num_scan_inputs = 3, scan_output_axes = [1], body = row (
      int64 lower, int64 upper, float share) => (int64[B, W] winner) {{
    above = Gather <axis = 2> (columns, lower)
    below = Gather <axis = 2> (columns, upper)
    change = Sub (below, above)
    part = Mul (change, share)
    logits_of_row = Add (above, part)
    winner = ArgMax <axis = 1, keepdims = 0> (logits_of_row)
  }}> (y_lower, y_upper, y_share)
  {clusters} = Cast <to = 6> (found)
"""

_CLASSES = """
  class_of = Constant <value = uint8[{count}] {{{table}}}> ()
  {classes} = Gather <axis = 0> (class_of, {clusters})
"""


def before(segmenter: Segmenter, pixels: str) -> str:
    """From ``image`` to the networks' input of that name."""
    backbone, crop = segmenter.backbone, segmenter.options.crop
    text = _SCALE.format(crop=crop, longest=LONGEST * crop, least=segmenter.patch)
    text += _resized("exact_image", "at_scale", "sides", "size", "bilinear")
    if backbone.side is None:
        text += _AS_IT_IS
    else:
        reference = "ReduceMax" if backbone.fixed else "ReduceMin"
        text += _NATIVE.format(side=backbone.side, reference=reference)
        text += _resized("at_scale", "resized", "size", "seen", backbone.interpolation)
    return text + _PADDED.format(patch=backbone.patch, pixels=pixels)


def _resized(image: str, result: str, before: str, after: str, interpolation: str) -> str:
    """From an image of ``before`` pixels to one of ``after``: columns first, then rows."""
    text, between = "", f"{result}_wide"
    for axis, place in (("x", 1), ("y", 0)):
        names = {"r": f"{result}_{axis}", "place": place, "after": place + 1}
        names |= {"size_before": before, "size_after": after}
        kernel = _KERNELS[interpolation].format(**names)
        text += _WEIGHTS.format(kernel=kernel, **names)
    x, y = f"{result}_x", f"{result}_y"
    # Not a product with the transpose: onnxruntime 1.23 fuses both to what it has no kernel for.
    text += f'  {x}_product = Einsum <equation = "bchw,vw->bchv"> ({image}, {x}_weights)\n'
    text += _ROUNDED.format(r=x, result=between)
    text += f"  {y}_product = MatMul ({y}_weights, {between})\n"
    return text + _ROUNDED.format(r=y, result=result)


def after(logits: str, clusters: str) -> str:
    """From the networks' output of that name to clusters."""
    axes = "".join(
        _AXIS.format(a=a, place=i, after=i + 1, dim=i + 2, dim_end=i + 3, logits=logits)
        for i, a in enumerate("yx")
    )
    return axes + _AFTER.format(logits=logits, clusters=clusters)


def classes(table: list[int], clusters: str, name: str) -> str:
    """From clusters to the class of each."""
    numbers = ", ".join(map(str, table))
    return _CLASSES.format(count=len(table), table=numbers, clusters=clusters, classes=name)


def nodes(text: str, inputs: str, outputs: str, kept: set[str]) -> list[onnx.NodeProto]:
    """The nodes of a part, its values renamed but for those of ``kept``."""
    import onnx.parser

    graph = onnx.parser.parse_graph(f"part ({inputs}) => ({outputs}) {{{text}}}")
    _rename(graph.node, kept)
    return list(graph.node)


def _rename(found: list[onnx.NodeProto], kept: set[str]) -> None:
    for node in found:
        for names in (node.input, node.output):
            names[:] = [n if not n or n in kept else PREFIX + n for n in names]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for value in (*attribute.g.input, *attribute.g.output):
                    value.name = PREFIX + value.name
                _rename(attribute.g.node, kept)
