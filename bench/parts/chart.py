"""A chart of grouped horizontal bars as SVG, without any library. Lengths are in CSS pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _MARGIN, _LABEL, _GAP = 920, 16, 150, 60
_BAR, _SPACE, _GROUP_SPACE, _HEAD = 13, 4, 20, 56
_FONT = "font-family='system-ui, sans-serif'"
_INK, _FAINT, _PAPER = "#1f2430", "#6b7280", "#ffffff"


@dataclass(frozen=True)
class Bar:
    """One row of a chart: a label, and a figure for each panel (None: there is none)."""

    label: str
    figures: Sequence[float | None]
    colour: str


@dataclass(frozen=True)
class Group:
    """Bars that belong together, under a title."""

    title: str
    bars: Sequence[Bar]


def chart(title: str, panels: Sequence[str], groups: Sequence[Group]) -> str:
    """An SVG document with the groups below one another and the panels, each with its own scale, side by side."""
    largest = [
        max((bar.figures[n] or 0 for group in groups for bar in group.bars), default=0) or 1 for n in range(len(panels))
    ]
    width = (_WIDTH - 2 * _MARGIN - _LABEL - _GAP * len(panels)) / len(panels)
    lefts = [_MARGIN + _LABEL + n * (width + _GAP) for n in range(len(panels))]
    body = [_text(_MARGIN, 24, title, size=15, weight="600")]
    body += [_text(left, _HEAD - 8, panel, colour=_FAINT) for left, panel in zip(lefts, panels, strict=True)]
    y = _HEAD
    for group in groups:
        y += _GROUP_SPACE
        body.append(_text(_MARGIN, y, group.title, weight="600"))
        y += _SPACE * 2
        for bar in group.bars:
            body.append(_text(_MARGIN + 10, y + _BAR - 3, bar.label))
            for left, figure, most in zip(lefts, bar.figures, largest, strict=True):
                if figure is None:
                    body.append(_text(left, y + _BAR - 3, "none", colour=_FAINT))
                    continue
                length = width * figure / most
                body.append(f"<rect x='{left:.1f}' y='{y}' width='{length:.1f}' height='{_BAR}' fill='{bar.colour}'/>")
                body.append(_text(left + length + 5, y + _BAR - 3, f"{figure:.2f}"))
            y += _BAR + _SPACE
    height = y + _MARGIN
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' height='{height}'>"
    )
    paper = f"<rect width='{_WIDTH}' height='{height}' fill='{_PAPER}'/>"
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, *body, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, *, size: int = 12, weight: str = "400", colour: str = _INK) -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' fill='{colour}'"
    return f"<text {place} {_FONT}>{escape(words)}</text>"
