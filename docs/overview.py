"""Draw ``docs/overview.svg``, the method at a glance: ``python docs/overview.py``.

Everything in the picture is made here: a landscape of a few shapes stands for a photograph, and
its patches for features, graph and eigenfunctions. Colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

WIDTH, HEIGHT = 1000, 452
TILE = (116, 87)  # pixels of a picture
GRID = (12, 9)  # patches of a picture

#: Light and dark colour of everything that is not part of a picture, by class.
THEMES = {
    "ink": ("#1f2328", "#f0f6fc"),
    "muted": ("#59636e", "#9198a1"),
    "near": ("#0b7a75", "#4cc9b0"),  # pixel graph
    "alike": ("#8250df", "#b794f6"),  # feature graph
    "panel": ("#f6f8fa", "#161b22"),
    "edge": ("#d1d9e0", "#3d444d"),
    "psi": ("#fff1d6", "#3a2d12"),
    "glow": ("#d4870f", "#f0b347"),
}
#: Clusters of the landscape, and the class that each is matched to.
CLUSTERS = ("sky", "sun", "far hill", "near hill", "lake", "sail")
CLUSTER_COLOURS = ("#6aaee8", "#f5c04a", "#4b9a8d", "#8bbf4d", "#7c83c9", "#e5645a")
CLASSES = {"sky": "#5b9fdd", "land": "#6fae57", "water": "#7c83c9", "boat": "#e5645a"}
CLASS_OF = ("sky", "sky", "land", "land", "water", "boat")
PHOTO_COLOURS = ("#bfe0f5", "#fff3b8", "#6f9fa3", "#6d9448", "#5f93b8", "#fdfbf6")
VIRIDIS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")


# ---- the landscape ----


def ridge(x: float, shift: float, height: float, base: float) -> float:
    """The outline of a hill: y at x, both from 0 to 1."""
    return base - height * max(0.0, math.sin(math.pi * (0.9 * x + shift)))


class Landscape:
    """Which cluster a place belongs to, and the shapes that say so; ``mirrored`` is another one."""

    def __init__(self, mirrored: bool = False) -> None:
        self.mirrored = mirrored

    def _x(self, x: float) -> float:
        return 1 - x if self.mirrored else x

    def shapes(self) -> list[list[tuple[float, float]]]:
        """Outlines of the clusters in the unit square, from back to front."""
        steps = [i / 40 for i in range(41)]
        turn = [2 * math.pi * i / 40 for i in range(40)]
        far = [(x, ridge(x, 0.12, 0.30, 0.66)) for x in steps]
        near = [(x, ridge(x, -0.42, 0.26, 0.66)) for x in steps]
        outlines = [
            [(0, 0), (1, 0), (1, 1), (0, 1)],
            [(0.80 + 0.075 * math.cos(a), 0.17 + 0.10 * math.sin(a)) for a in turn],
            [*far, (1, 0.67), (0, 0.67)],
            [*near, (1, 0.67), (0, 0.67)],
            [(0, 0.66), (1, 0.66), (1, 1), (0, 1)],
            [(0.30, 0.50), (0.42, 0.80), (0.44, 0.86), (0.20, 0.86), (0.18, 0.80), (0.27, 0.80)],
        ]
        return [[(self._x(x), y) for x, y in outline] for outline in outlines]

    def cluster(self, x: float, y: float) -> int:
        """The front-most shape at a place."""
        found = [k for k, outline in enumerate(self.shapes()) if inside(x, y, outline)]
        return max(found, default=0)

    def patches(self) -> list[int]:
        """The cluster of every patch, row by row."""
        w, h = GRID
        return [self.cluster((i + 0.5) / w, (j + 0.5) / h) for j in range(h) for i in range(w)]


def inside(x: float, y: float, outline: Sequence[tuple[float, float]]) -> bool:
    """Whether a point lies in a polygon (crossings of a ray)."""
    odd, (px, py) = False, outline[-1]
    for qx, qy in outline:
        if (qy > y) != (py > y) and x < (px - qx) * (y - qy) / (py - qy) + qx:
            odd = not odd
        px, py = qx, qy
    return odd


# ---- drawing ----


def mixed(a: str, b: str, share: float) -> str:
    """A colour between two, as #rrggbb."""
    channels = [
        round((1 - share) * int(a[i : i + 2], 16) + share * int(b[i : i + 2], 16))
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{c:02x}" for c in channels)


def viridis(value: float) -> str:
    """The colour of a value from 0 to 1."""
    place = min(max(value, 0.0), 0.999) * (len(VIRIDIS) - 1)
    return mixed(VIRIDIS[int(place)], VIRIDIS[int(place) + 1], place % 1)


def text(x: float, y: float, content: str, kind: str = "ink", size: float = 13, **more: str) -> str:
    """A line of text; ``content`` may hold :func:`raised` and :func:`lowered` pieces."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" font-size="{size:g}"{extra}>{content}</text>'


def shifted(content: str, dy: float) -> str:
    return f'<tspan dy="{dy}" font-size="72%">{content}</tspan><tspan dy="{-dy}">\u200b</tspan>'


def raised(content: str) -> str:
    """A superscript."""
    return shifted(content, -5)


def lowered(content: str) -> str:
    """A subscript."""
    return shifted(content, 3.5)


def italic(content: str) -> str:
    return f'<tspan font-style="italic">{content}</tspan>'


def polygon(points: Sequence[tuple[float, float]], fill: str, more: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polygon points="{path}" fill="{fill}"{more}/>'


def picture(
    left: float, top: float, scene: Landscape, colours: Sequence[str], outlined: bool
) -> str:
    """The landscape's shapes in these colours."""
    w, h = TILE
    line = ' stroke="#ffffff" stroke-width="1.2" stroke-linejoin="round"' if outlined else ""
    shapes = [
        polygon([(left + x * w, top + y * h) for x, y in outline], colour, line)
        for outline, colour in zip(scene.shapes(), colours, strict=True)
    ]
    clip = f"c{left:g}-{top:g}".replace(".", "_")
    return (
        f'<clipPath id="{clip}"><rect x="{left}" y="{top}" width="{w}" height="{h}" rx="5"/>'
        f'</clipPath><g clip-path="url(#{clip})">{"".join(shapes)}</g>'
    )


def tiles(
    left: float, top: float, width: float, height: float, colour: Callable[[int], str]
) -> str:
    """A patch grid, patch ``n`` in ``colour(n)``."""
    w, h = GRID
    cells = [
        f'<rect x="{left + i * width / w:.2f}" y="{top + j * height / h:.2f}" '
        f'width="{width / w + 0.15:.2f}" height="{height / h + 0.15:.2f}" '
        f'fill="{colour(j * w + i)}"/>'
        for j in range(h)
        for i in range(w)
    ]
    return "".join(cells)


def arrow(points: Sequence[tuple[float, float]], kind: str = "muted", dashed: bool = False) -> str:
    """A line through the points with a head at its end."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    dashes = ' stroke-dasharray="4 4"' if dashed else ""
    (ax, ay), (bx, by) = points[-2:]
    length = math.hypot(bx - ax, by - ay)
    ux, uy = (bx - ax) / length, (by - ay) / length
    head = [(bx, by)] + [
        (bx - 8 * ux - side * 4 * uy, by - 8 * uy + side * 4 * ux) for side in (-1, 1)
    ]
    tip = " ".join(f"{x:.1f},{y:.1f}" for x, y in head)
    return (
        f'<path d="{path}" class="line-{kind}" fill="none" stroke-width="1.6"{dashes}/>'
        f'<polygon points="{tip}" class="{kind}"/>'
    )


def panel(left: float, top: float, width: float, height: float, kind: str = "panel") -> str:
    return (
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="9" '
        f'class="{kind} line-edge"/>'
    )


# ---- the parts, from left to right ----


def batch(left: float, top: float) -> str:
    """Two images, one behind the other."""
    behind = picture(left + 9, top - 9, Landscape(mirrored=True), PHOTO_COLOURS, outlined=False)
    front = picture(left, top, Landscape(), PHOTO_COLOURS, outlined=False)
    w, h = TILE
    rim = (
        f'<rect x="{left - 1}" y="{top - 1}" width="{w + 2}" height="{h + 2}" rx="6" fill="none" '
        'class="line-page" stroke-width="2"/>'
    )
    return f'<g opacity="0.75">{behind}</g>{rim}{front}'


def backbone(left: float, top: float) -> str:
    """A funnel with a snow crystal on it: frozen."""
    h = TILE[1]
    shape = [(left, top), (left + 74, top + 15), (left + 74, top + h - 15), (left, top + h)]
    x, y = left + 37, top + h / 2
    arms = []
    for turn in range(6):
        a = math.pi * turn / 3 + math.pi / 2
        ex, ey = x + 17 * math.cos(a), y + 17 * math.sin(a)
        arms.append(f"M{x:.1f} {y:.1f}L{ex:.1f} {ey:.1f}")
        for side in (-0.75, 0.75):
            mx, my = x + 11 * math.cos(a), y + 11 * math.sin(a)
            tx, ty = mx + 6.5 * math.cos(a + side), my + 6.5 * math.sin(a + side)
            arms.append(f"M{mx:.1f} {my:.1f}L{tx:.1f} {ty:.1f}")
    points = " ".join(f"{px:g},{py:g}" for px, py in shape)
    return (
        f'<polygon points="{points}" class="panel line-edge" stroke-linejoin="round"/>'
        f'<path d="{"".join(arms)}" stroke="#5b9fdd" stroke-width="2" stroke-linecap="round"/>'
    )


def features(left: float, top: float) -> str:
    """Low, mid and high features, ever closer to the clusters, one behind the other."""
    noise, patches, made = random.Random(4), Landscape().patches(), []
    for shift, spread in ((22, 0.75), (11, 0.5), (0, 0.25)):
        shades = [noise.random() for _ in patches]
        others = [noise.choice(CLUSTER_COLOURS) for _ in patches]

        def colour(n: int, shades=shades, others=others, spread=spread) -> str:
            own = mixed(CLUSTER_COLOURS[patches[n]], others[n], spread * shades[n])
            return mixed(own, "#ffffff", 0.25 * shades[-1 - n])

        x, y = left + shift, top - shift * 0.75
        w, h = TILE[0] - 22, TILE[1] - 16.5
        made.append(tiles(x, y + 16.5, w, h, colour))
        made.append(
            f'<rect x="{x}" y="{y + 16.5}" width="{w}" height="{h}" fill="none" class="line-page" '
            'stroke-width="1.6"/>'
        )
    return "".join(made)


def network(left: float, top: float) -> str:
    """ψ: what is trained."""
    h = TILE[1]
    blocks = "".join(
        f'<rect x="{left + x}" y="{top + 12}" width="9" height="{h - 24}" rx="2.5" class="glow" '
        f'opacity="{opacity}"/>'
        for x, opacity in ((13, 0.55), (28, 0.8), (67, 1.0))
    )
    symbol = text(left + 52, top + h / 2 + 9, italic("ψ"), size=28, text_anchor="middle")
    return panel(left, top, 88, h, "psi") + blocks + symbol


def eigenfunctions(left: float, top: float) -> str:
    """A map for each cluster, light where it wins."""
    noise, patches, made = random.Random(9), Landscape().patches(), []
    w, h, gap = 54, 40.5, 6
    for k in range(6):
        values = [(0.86 if own == k else 0.07) + noise.uniform(-0.07, 0.13) for own in patches]
        x, y = left + k % 2 * (w + gap), top + k // 2 * (h + gap) - 23
        made.append(tiles(x, y, w, h, lambda n, values=values: viridis(values[n])))
    return "".join(made)


def graph(left: float, top: float) -> str:
    """Patches of two images as nodes, joined where features are alike and where pixels are near."""
    step, apart, choice = 12.5, 186, random.Random(3)
    nodes = []
    for image, scene in enumerate((Landscape(), Landscape(mirrored=True))):
        for n, own in enumerate(scene.patches()):
            x = left + image * apart + n % GRID[0] * step
            nodes.append((x, top + n // GRID[0] * step, own, image))
    near, alike = [], []
    for i, (x, y, own, image) in enumerate(nodes):
        for j in (i + 1, i + GRID[0]):
            if j < len(nodes) and nodes[j][3] == image and own == nodes[j][2]:
                u, v = nodes[j][:2]
                if abs(u - x) + abs(v - y) < step * 1.5:
                    near.append(f"M{x:g} {y:g}L{u:g} {v:g}")
    for own in range(6):
        members = [node for node in nodes if node[2] == own]
        for _ in range(5 if own not in (1, 5) else 3):
            a = choice.choice([m for m in members if m[3] == 0])
            b = choice.choice([m for m in members if m[3] == 1])
            bend = -14 - 0.12 * (b[0] - a[0])
            mx, my = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2 + bend
            alike.append(f"M{a[0]:g} {a[1]:g}Q{mx:.1f} {my:.1f} {b[0]:g} {b[1]:g}")
    dots = "".join(
        f'<circle cx="{x:g}" cy="{y:g}" r="3.1" fill="{CLUSTER_COLOURS[own]}"/>'
        for x, y, own, _ in nodes
    )
    return (
        f'<path d="{"".join(near)}" class="line-near" stroke-width="1.3" fill="none"/>'
        f'<path d="{"".join(alike)}" class="line-alike" stroke-width="1" fill="none" '
        f'opacity="0.8"/>{dots}'
    )


def matrix(
    left: float, top: float, width: float, height: float, colour: Callable[[float, float], str]
) -> str:
    """A matrix of small squares, ``colour(row, column)`` from 0 to 1; "" leaves one empty."""
    size, made = 8, []
    rows, columns = round(height / size), round(width / size)
    for i in range(rows):
        for j in range(columns):
            if fill := colour(i / rows, j / columns):
                made.append(
                    f'<rect x="{left + j * size}" y="{top + i * size}" width="{size - 0.6}" '
                    f'height="{size - 0.6}" fill="{fill}"/>'
                )
    frame = (
        f'<rect x="{left - 1.5}" y="{top - 1.5}" width="{columns * size + 2.4}" '
        f'height="{rows * size + 2.4}" rx="2" fill="none" class="line-edge"/>'
    )
    return frame + "".join(made)


def objective(left: float, top: float) -> str:
    """Uᵀ κ U = R, and what is wanted of R."""
    noise, n, k = random.Random(7), 96, 48

    def own(place: float) -> int:
        return int(place * 6)

    def u(row: float, column: float) -> str:
        return viridis((0.85 if own(row) == own(column) else 0.06) + noise.uniform(-0.06, 0.1))

    def kappa(row: float, column: float) -> str:
        pair = random.Random(f"{min(row, column):.3f} {max(row, column):.3f}")  # symmetric
        joined = own(row) == own(column) or pair.random() < 0.06
        return ("#9a6ee8" if pair.random() < 0.55 else "#2fa59b") if joined else ""

    def r(row: float, column: float) -> str:
        return viridis(0.9 if own(row) == own(column) else noise.uniform(0, 0.16))

    middle = top + n / 2
    parts = [
        matrix(left, middle - k / 2, n, k, lambda row, column: u(column, row)),
        matrix(left + 110, top, n, n, kappa),
        matrix(left + 220, top, k, n, u),
        text(left + 288, middle + 6, "=", size=20, text_anchor="middle"),
        matrix(left + 308, middle - k / 2, k, k, r),
    ]
    names = (
        (48, italic("U") + raised("⊤")),
        (158, italic("κ")),
        (244, italic("U")),
        (332, italic("R")),
    )
    parts += [
        text(left + x, top + n + 20, name, size=15, text_anchor="middle") for x, name in names
    ]
    return "".join(parts)


def captions(middle: float, title: str, below: Sequence[str]) -> str:
    """A title above and lines below one of the upper row's parts."""
    lines = [text(middle, 22, title, size=14, font_weight="600", text_anchor="middle")]
    for number, line in enumerate(below):
        lines.append(text(middle, 164 + 16 * number, line, "muted", 12, text_anchor="middle"))
    return "".join(lines)


def upper_row() -> str:
    """From the image to its classes: what is there when training is over."""
    top, middle = 57, 57 + TILE[1] / 2
    segments = [mixed(c, "#ffffff", 0.04) for c in CLUSTER_COLOURS]
    classes = [CLASSES[name] for name in CLASS_OF]
    words = (
        (0.36, 0.25, "sky"), (0.66, 0.58, "land"), (0.72, 0.88, "water"), (0.315, 0.975, "boat")
    )  # fmt: skip
    names = "".join(
        f'<text x="{872 + x * TILE[0]:.1f}" y="{top + y * TILE[1]:.1f}" fill="#ffffff" '
        f'font-size="11.5" font-weight="600" text-anchor="middle">{name}</text>'
        for x, y, name in words
    )
    parts = [
        batch(12, top), captions(70, "images", ["a batch, no labels"]),
        arrow([(142, middle), (166, middle)]),
        backbone(172, top), captions(209, "backbone", ["frozen:", "ViT or CNN"]),
        arrow([(250, middle), (274, middle)]),
        features(282, top), captions(340, "patch features", ["low | mid | high"]),
        arrow([(404, middle), (430, middle)]),
        network(438, top), captions(482, "small network", ["the only part", "that is trained"]),
        arrow([(530, middle), (556, middle)]),
        eigenfunctions(564, top), captions(621, "eigenfunctions", []),
        text(621, 187, "K functions of a patch", "muted", 12, text_anchor="middle"),
        arrow([(686, middle), (728, middle)]),
        text(706, middle - 9, "argmax", "muted", 11.5, text_anchor="middle"),
        picture(734, top, Landscape(), segments, outlined=True),
        captions(792, "segments", ["up-sampled,", "one per function"]),
        arrow([(854, middle), (868, middle)]),
        picture(872, top, Landscape(), classes, outlined=False), names,
        captions(930, "classes", ["clusters matched", "to score them"]),
    ]  # fmt: skip
    return "".join(parts)


def lower_row() -> str:
    """The graph and the objective: training."""
    top = 232
    root = raised("−1/2")
    kappa_is = (
        f"{italic('κ')} = {italic('D')}{root} {italic('A')} {italic('D')}{root} + "
        f"{italic('α')} {italic('D̃')}{root} {italic('Ã')} {italic('D̃')}{root}"
    )
    loss = (
        f"minimise −{italic('t/K')} Σ{lowered('j')} {italic('R')}{lowered('jj')} + "
        f"{italic('βt')}{raised('2')}{italic('/K')} Σ{lowered('i&lt;j')} "
        f"{italic('R̂')}{lowered('ij')}{raised('2')}"
    )
    bold = {"font_weight": "600", "size": 14}
    parts = [
        panel(12, top, 420, 208),
        text(30, top + 26, f"sparse graph {italic('κ')} of the batch's patches", **bold),
        graph(60, top + 48),
        text(34, top + 170, f"{italic('A')}: alike in features", "alike", 12.5),
        text(410, top + 170, f"{italic('Ã')}: near in place and colour", "near", 12.5,
             text_anchor="end"),
        text(222, top + 194, kappa_is, size=14, text_anchor="middle"),
        panel(476, top, 512, 208),
        text(494, top + 26, "objective", **bold),
        objective(498, top + 42),
        text(494, top + 191, loss, size=15),
        *(
            text(868, top + y, line, "muted", 12)
            for y, line in (
                (70, "diagonal: joined"), (86, "patches agree"),
                (112, "the rest: the"), (128, "functions differ"),
            )
        ),
        arrow([(70, 178), (70, top - 4)], "near"),
        text(79, 205, "pixels", "near", 12),
        arrow([(340, 178), (340, top - 4)], "alike"),
        text(349, 205, f"high: {italic('F')}", "alike", 12),
        arrow([(432, top + 82), (472, top + 82)]),
        arrow([(621, 196), (621, top - 4)]),
        text(630, 214, italic("U") + ", columns of norm 1", "muted", 12),
        arrow([(494, top), (494, 194)], "glow", dashed=True),
        text(503, 214, "gradient", "glow", 12),
    ]  # fmt: skip
    return "".join(parts)


def style() -> str:
    """Both themes."""

    def rules(number: int) -> str:
        page = ("#ffffff", "#0d1117")[number]
        found = [f".line-page{{stroke:{page}}}"]
        for name, colours in THEMES.items():
            found.append(
                f".{name}{{fill:{colours[number]}}}.line-{name}{{stroke:{colours[number]}}}"
            )
        return "".join(found)

    return (
        "text{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}"
        f"{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}"
    )


def overview() -> str:
    """The whole picture as SVG."""
    described = (
        "Images pass a frozen backbone; its patch features and the pixels make a sparse graph κ; a "
        "small network ψ is trained to give the graph's eigenfunctions; their argmax are segments, "
        "which are matched to classes."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{described}"><style>{style()}</style>{upper_row()}{lower_row()}</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(overview(), "utf-8")
