"""A page of SVG that follows the reader's light or dark scheme."""

from __future__ import annotations

from xml.etree import ElementTree as ET

TEXT, SMALL, CHAR = 12, 11, 0.602
"""Font sizes in pixels, and the width of a character of a monospaced font as a share
of its size.
"""
STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --faint: #656d76; --rule: #d8dee4; --band: #f6f8fa; --box: #e7ebef;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #1b7c83; --c6: #9a6700 }
@media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --rule: #30363d; --band: #161b22; --box: #2d333b;
  --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #f778ba; --c5: #39c5cf; --c6: #d29922 } }
text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: var(--ink) }
.faint { fill: var(--faint) } .bold { font-weight: 600 }
"""  # noqa: E501  (style sheet)
COLOURS = 7


class Page:
    """Elements in the order in which they are put on it; lengths are in pixels."""

    def __init__(self) -> None:
        self.root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg")
        self.add("style").text = STYLE

    def size(self, width: float, height: float) -> None:
        self.root.set("viewBox", f"0 0 {width:.0f} {height:.0f}")
        self.root.set("width", f"{width:.0f}")
        self.root.set("height", f"{height:.0f}")

    def add(self, tag: str, **values: float | str) -> ET.Element:
        given = {
            k: f"{v:.1f}".removesuffix(".0") if isinstance(v, float) else str(v)
            for k, v in values.items()
        }
        return ET.SubElement(self.root, tag, given)

    def rect(self, x: float, y: float, w: float, h: float, style: str, **more: float) -> None:
        self.add("rect", x=x, y=y, width=w, height=h, **more, style=style)

    def write(
        self,
        x: float,
        y: float,
        text: str,
        kind: str = "",
        size: int = TEXT,
        lane: int | None = None,
    ) -> ET.Element:
        """A line of text; `kind` is a class of the style sheet, `lane` gives it a colour."""
        style = {} if lane is None else {"style": f"fill: {colour(lane)}"}
        element = self.add(
            "text", x=x, y=y, **{"font-size": size}, **({"class": kind} if kind else {}), **style
        )
        element.text = text
        return element

    def text(self) -> str:
        ET.indent(self.root)
        return ET.tostring(self.root, encoding="unicode") + "\n"


def colour(lane: int) -> str:
    return f"var(--c{lane % COLOURS})"
