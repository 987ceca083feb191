"""The drawing itself: rows and lanes placed from top to bottom of a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple
from xml.etree import ElementTree as ET

from prunekit.inventory.facts import Part
from prunekit.inventory.fold import Alike
from prunekit.inventory.rule import in_words
from prunekit.inventory.svg import CHAR, SMALL, TEXT, Page, colour

LARGEST, SMALLEST, THIN = 76, 16, 8
"""Sides of boxes in pixels: of the largest axis, of the smallest, and across a vector."""
MARGIN, HEAD, GAP = 20, 92, 10
CELL = 38
"""Characters of a line beside a dot."""


@dataclass(frozen=True)
class Row:
    """One tensor (or several alike), and for each lane that it is on its axes with their rules."""

    name: str
    part: Part
    lanes: dict[int, list[Part]]


class Band(NamedTuple):
    """A module's rows, each with its top and height, under the module's name where there are
    several.
    """

    module: str
    top: float
    rows: list[tuple[Row, float, float]]


def unit_shown(units: int) -> int:
    """A unit inside, so that what it owns does not lie at the edge of the box."""
    return units // 3


class Drawing:
    """Places everything from top to bottom and writes it."""

    def __init__(self, title: str, path: str, lanes: Sequence[Alike], rows: Sequence[Row]):
        self.lanes, self.rows, self.path = lanes, rows, path
        self.title = f"{path} of {title}: what goes together"
        self.largest = max(n for r in rows for n in r.part.shape)
        bands, _ = self.bands()
        texts = [
            r.name.removeprefix(b.module + ".") if b.module else r.name
            for b in bands
            for r, _, _ in b.rows
        ]
        longest = max(map(len, [*texts, *(" x ".join(map(str, r.part.shape)) for r in rows)]))
        self.box_x = MARGIN + 4 + longest * TEXT * CHAR + 22
        self.lane_x = [self.box_x + LARGEST + 46]
        for i in range(len(lanes)):
            self.lane_x.append(self.lane_x[-1] + self.lane_width(i))
        self.width = max(self.lane_x[-1], MARGIN * 2 + len(self.title) * 15 * CHAR, 560)
        self.page = Page()

    def lane_width(self, i: int) -> float:
        texts = [cell for r in self.rows for cell in self.cells(r, i)]
        return max(
            max(map(len, [*texts, *self.heading(i)[1:]])) * SMALL * CHAR + 44,
            len(self.heading(i)[0]) * TEXT * CHAR + 44,
        )

    def heading(self, i: int) -> tuple[str, str, str]:
        e = self.lanes[i].first
        each = (
            f"{e.each[0]:,}" if len(e.each) == 1 else f"about {round(sum(e.each) / len(e.each)):,}"
        )
        whole = ", whole modules" if e.group.modules else ""
        return self.lanes[i].name, f"{e.group.units} units{whole}", f"{each} parameters each"

    def cells(self, row: Row, i: int) -> list[str]:
        return [
            line
            for p in row.lanes.get(i, [])
            for line in textwrap.wrap(f"axis {p.axis}: {in_words(p.rule)}", CELL)
        ]

    def legend(self) -> list[str]:
        """What dots, lines and boxes mean, in lines that fit."""
        shown = ", ".join(f"{unit_shown(a.first.group.units)} of {a.name}" for a in self.lanes)
        texts = (
            "A dot: unit u of the group owns these indices of that axis. Removing a unit takes "
            "its slices away at all dots of the line.",
            "Boxes: axis 0 downwards, axis 1 to the right, not to scale; the colour of an edge "
            f"is that of its group. Filled in: unit {shown}.",
        )
        wide = int((self.width - 2 * MARGIN) / (SMALL * CHAR))
        return [line for sentence in texts for line in textwrap.wrap(sentence, wide)]

    # ---- the whole

    def text(self) -> str:
        bands, y = self.bands()
        bottom, legend = y + GAP, self.legend()
        height = bottom + 34 + 18 * len(legend)
        self.page.size(self.width, height)
        self.page.add("title").text = self.title
        self.page.add("rect", width=self.width, height=height, rx=8, style="fill: var(--paper)")
        self.page.write(MARGIN, MARGIN + 14, self.title, "bold", size=15)
        for band in bands:
            self.band(band.module, band.top, band.rows[-1][1] + band.rows[-1][2] + 4)
        self.lines(
            [(row, top + high / 2) for band in bands for row, top, high in band.rows], bottom
        )
        for band in bands:
            for row, top, high in band.rows:
                self.row(
                    row,
                    row.name.removeprefix(band.module + ".") if band.module else row.name,
                    top,
                    high,
                )
        for k, line in enumerate(legend):
            self.page.write(MARGIN, bottom + 34 + 18 * k, line, "faint", size=SMALL)
        return self.page.text()

    def bands(self) -> tuple[list[Band], float]:
        """The rows by the module that they lie in, from top to bottom, and where they end. A module
        of one tensor needs no heading.
        """
        modules = [row.name.partition(".")[0] if "." in row.name else "" for row in self.rows]
        out: list[Band] = []
        y = float(HEAD + MARGIN)
        for module, of in groupby(zip(modules, self.rows, strict=True), key=lambda pair: pair[0]):
            inside = [row for _, row in of]
            headed = module if len(inside) > 1 else ""
            y += GAP
            out.append(Band(headed, y, []))
            y += 24 if headed else 4
            for row in inside:
                lines = max(2, *(len(self.cells(row, i)) for i in range(len(self.lanes))))
                high = max(self.box(row.part)[1] + 16, 15 * lines + 8)
                out[-1].rows.append((row, y, high))
                y += high
            y += 4
        return out, y

    def band(self, module: str, top: float, bottom: float) -> None:
        wide = self.width - 2 * MARGIN + 16
        self.page.rect(MARGIN - 8, top, wide, bottom - top, "fill: var(--band)", rx=6)
        if module:
            self.page.write(MARGIN, top + 16, module, "bold")

    def lines(self, middles: Sequence[tuple[Row, float]], bottom: float) -> None:
        """Each group's line from its first dot to its last; a group of the whole network comes from
        above and goes on below.
        """
        for i, x in enumerate(self.lane_x[:-1]):
            name, units, each = self.heading(i)
            top = MARGIN + 44
            self.page.write(x - 6, top, name, "bold", lane=i)
            self.page.write(x - 6, top + 16, units, "faint", size=SMALL)
            self.page.write(x - 6, top + 31, each, "faint", size=SMALL)
            at = [y for row, y in middles if i in row.lanes]
            stroke = f"stroke: {colour(i)}; stroke-width: 2.5; stroke-linecap: round"
            self.page.add("line", x1=x, x2=x, y1=at[0], y2=at[-1], style=stroke)
            if self.lanes[i].first.block is None:
                for y1, y2 in ((HEAD + MARGIN - 8, at[0]), (at[-1], bottom)):
                    self.page.add(
                        "line", x1=x, x2=x, y1=y1, y2=y2, style=stroke + "; stroke-dasharray: 2 5"
                    )
                elsewhere = sum(
                    not p.names[0].startswith(self.path + ".") for p in self.lanes[i].first.parts
                )
                self.page.write(
                    x + 10, bottom + 4, f"+ {elsewhere} axes elsewhere", "faint", size=SMALL
                )

    def row(self, row: Row, name: str, top: float, high: float) -> None:
        middle = top + high / 2
        self.page.write(MARGIN + 4, middle - 3, name)
        owners = {
            axis: [i for i, parts in row.lanes.items() for p in parts if p.axis == axis]
            for axis in range(len(row.part.shape))
        }
        line = self.page.write(MARGIN + 4, middle + 12, "", "faint", size=SMALL)
        for axis, n in enumerate(row.part.shape):
            if axis:
                line[-1].tail = " x "
            shade = colour(owners[axis][0]) if len(owners[axis]) == 1 else "var(--ink)"
            span = ET.SubElement(
                line, "tspan", {"style": f"fill: {shade}; font-weight: 600"} if owners[axis] else {}
            )
            span.text = str(n)
        self.draw_box(row, middle)
        for i in row.lanes:
            x, cells = self.lane_x[i], self.cells(row, i)
            self.page.add(
                "circle",
                cx=x,
                cy=middle,
                r=5,
                style=f"fill: {colour(i)}; stroke: var(--band); stroke-width: 1.5",
            )
            for k, cell in enumerate(cells):
                self.page.write(
                    x + 11, middle + 4 + 15 * (k - (len(cells) - 1) / 2), cell, size=SMALL
                )

    # ---- boxes

    def side(self, n: int) -> float:
        return max(SMALLEST, LARGEST * math.sqrt(n / self.largest))

    def faces(self, part: Part) -> tuple[int, int | None, int | None]:
        """Which axes run down, to the right and into the page: a stack of matrices has its first
        axis in depth, a kernel is a matrix.
        """
        if len(part.shape) == 1:
            return 0, None, None
        return (1, 2, 0) if len(part.shape) == 3 and part.shape[2] > 8 else (0, 1, None)

    def box(self, part: Part) -> tuple[float, float]:
        """Width and height."""
        down, right, depth = self.faces(part)
        back = 12 if depth is not None else 0
        return (THIN if right is None else self.side(part.shape[right])) + back, self.side(
            part.shape[down]
        ) + back

    def draw_box(self, row: Row, middle: float) -> None:
        part = row.part
        down, right, depth = self.faces(part)
        width, height = self.box(part)
        back = 12 if depth is not None else 0
        x, y, w, h = self.box_x, middle - height / 2 + back, width - back, height - back
        here = [
            (p.axis, i, p.rule, self.lanes[i].first.group.units)
            for i, parts in row.lanes.items()
            for p in parts
        ]
        lit = next((i for axis, i, _, _ in here if axis == depth), None)
        for k in range(3, 0, -1) if back else ():
            fill = colour(lit) if lit is not None and k == 2 else "var(--box)"
            edge = f"fill: {fill}; stroke: var(--paper)"
            self.page.rect(x + 4 * k, y - 4 * k, w, h, edge)
        plain = "fill: var(--box); stroke: var(--paper)" if back else "fill: var(--box)"
        self.page.rect(x, y, w, h, plain)
        for axis, i, rule, units in here:
            if axis not in (down, right):
                continue
            long = (h if axis == down else w) / part.shape[axis]
            for first, count in stretches(rule.of(unit_shown(units))):
                a, b = first * long, max(2.0, count * long)
                place = (x, y + a, w, b) if axis == down else (x + a, y, b, h)
                self.page.rect(*place, f"fill: {colour(i)}; fill-opacity: 0.55")
            for first, count in stretches(sorted({n for u in range(units) for n in rule.of(u)})):
                a, b = first * long, count * long
                along = (x - 4, y + a, 3.0, b) if axis == down else (x + a, y - 4, b, 3.0)
                self.page.rect(*along, f"fill: {colour(i)}")


def stretches(indices: Sequence[int]) -> list[tuple[int, int]]:
    """(first, how many) of each run of neighbours."""
    out: list[tuple[int, int]] = []
    for i in indices:
        if out and i == sum(out[-1]):
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((i, 1))
    return out
