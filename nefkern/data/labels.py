"""What annotations hold over a whole set: classes that occur nowhere, and void."""

from __future__ import annotations

from collections.abc import Sequence

from nefkern.data.constants import VOID

_SHOWN = 5
_COMMON = 0.01  # the share of void from which it may be meant for a class


def absent_classes(
    classes: Sequence[str], pixels: Sequence[int], void: int | None = None
) -> str | None:
    """A line about classes without a pixel; above all where 255 may stand for one of them.

    Args:
        classes: their names.
        pixels: how many pixels each has.
        void: pixels of index 255, where the files hold the classes' indices themselves.

    Returns:
        The line, None where every class occurs.
    """
    absent = [index for index, count in enumerate(pixels) if not count]
    if not absent:
        return None
    numbered = void is not None
    names = [f"{classes[i]} ({i})" if numbered else classes[i] for i in absent[:_SHOWN]]
    more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
    line = f"no pixel is {', '.join(names)}{more}"
    share = (void or 0) / max(1, sum(pixels) + (void or 0))
    if share < _COMMON:
        return line
    return (
        f"{line}, but {100 * share:.0f}% of the pixels are {VOID}, which is void and never scored; "
        f"if {VOID} is meant for a class, as in masks of 0 and {VOID}, write its index instead "
        f"({classes[absent[0]]}: {absent[0]})"
    )


def one_class_left(pixels: Sequence[int], void: int) -> bool:
    """Whether all pixels are of one class or void, void is common, and other classes are named.

    No score says anything then, and 255 was most probably meant for a class.
    """
    common = void >= _COMMON * (sum(pixels) + void)
    return common and len(pixels) > 1 and sum(count > 0 for count in pixels) == 1
