"""Elements of HTML and SVG as text, everything in them escaped, and the frame of a chart: its scales and axes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MOST_TICKS = 6
_CHARACTER = 0.56  # of a font's size: the usual width of a character


def tag(name: str, content: str | Iterable[str] = "", **attributes: object) -> str:
    """An element.

    Args:
        name: of the element.
        content: markup, not escaped again; ``text`` makes some of a string.
        attributes: ``class_`` for ``class``, underscores for dashes; None leaves one out, True gives it no value.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key_ = key.rstrip("_").replace("_", "-")
        parts.append(key_ if value is True else f'{key_}="{html.escape(_shown(value))}"')
    inner = content if isinstance(content, str) else "".join(content)
    return f"<{' '.join(parts)}>{inner}</{name}>"


def text(value: object) -> str:
    """A value as markup that shows it."""
    return html.escape(_shown(value))


def _shown(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def wide(value: str, size: float) -> float:
    """About how wide a text is at a font size."""
    return _CHARACTER * size * len(value)


def ticks(low: float, high: float, most: int = _MOST_TICKS) -> list[float]:
    """Round numbers within an interval, at most so many."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 5, 10) if one * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    found = []
    while first * step <= high + 1e-9 * step:
        found.append(first * step)
        first += 1
    return found


def powers(low: float, high: float) -> list[float]:
    """Powers of ten within an interval; where there is none, its ends."""
    found = [10.0**one for one in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]
    step = max(1, math.ceil(len(found) / _MOST_TICKS))
    return found[::step] or [low, high]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A chart's area in SVG units, and its two scales.

    Attributes:
        width: of the picture.
        height: of the picture.
        x: lowest and highest value across.
        y: the same upwards.
        log: whether both scales are logarithmic.
        left: room for the labels of y.
        bottom: room for those of x.
    """

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    left: float = 52.0
    bottom: float = 44.0
    top: float = 10.0
    right: float = 12.0

    @property
    def area(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the plotting area."""
        return self.left, self.top, self.width - self.right, self.height - self.bottom

    def across(self, value: float) -> float:
        """Where a value of x lies."""
        left, _, right, _ = self.area
        return left + self._share(value, self.x) * (right - left)

    def up(self, value: float) -> float:
        """Where a value of y lies."""
        _, top, _, bottom = self.area
        return bottom - self._share(value, self.y) * (bottom - top)

    def _share(self, value: float, ends: tuple[float, float]) -> float:
        low, high = ends
        if self.log:
            value, low, high = (math.log(one) for one in (value, low, high))
        return (value - low) / (high - low)

    def axes(self, x_label: str, y_label: str) -> str:
        """Grid, ticks and labels of both axes."""
        left, top, right, bottom = self.area
        of = powers if self.log else ticks
        parts = []
        for value in of(*self.x):
            at = self.across(value)
            parts.append(tag("line", x1=at, x2=at, y1=top, y2=bottom, class_="grid"))
            parts.append(tag("text", text(number(value)), x=at, y=bottom + 14, text_anchor="middle"))
        for value in of(*self.y):
            at = self.up(value)
            parts.append(tag("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
            parts.append(tag("text", text(number(value)), x=left - 5, y=at + 4, text_anchor="end"))
        parts.append(tag("rect", x=left, y=top, width=right - left, height=bottom - top, class_="frame"))
        middle = (top + bottom) / 2
        parts.append(
            tag("text", text(x_label), x=(left + right) / 2, y=self.height - 10, text_anchor="middle", class_="label")
        )
        turned = f"rotate(-90 12 {middle:.1f})"
        parts.append(tag("text", text(y_label), x=12, y=middle, text_anchor="middle", transform=turned, class_="label"))
        return "".join(parts)


def number(value: float) -> str:
    """A tick's number: short, without a trailing zero."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        digits = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{digits}" if mantissa == "1" else f"{mantissa}·10{digits}"
    return f"{value:.4g}"


def picture(width: float, height: float, content: Iterable[str], label: str, class_: str = "chart") -> str:
    """An SVG picture that scales to the room there is."""
    return tag(
        "svg",
        content,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
        class_=class_,
    )


def figure(pictures: Sequence[str], caption: str) -> str:
    """Pictures with one caption, of which the screen's width shows one."""
    return tag("figure", [*pictures, tag("figcaption", text(caption))])
