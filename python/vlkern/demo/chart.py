"""Charts as inline SVG. Colours come from the page's style sheet, so they follow its light or dark scheme."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 24, 16, 48


@dataclass(frozen=True)
class Line:
    """One curve; `kind` is its class in the style sheet, and only curves with a name are in the legend."""

    name: str
    kind: str
    xs: Sequence[float]
    ys: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """A title, and how values are written; `log` needs positive values."""

    title: str
    log: bool = False
    write: Callable[[float], str] = "{:g}".format

    def place(self, value: float) -> float:
        """The value on the scale that is drawn."""
        return math.log10(value) if self.log else value


def _nice_step(span: float, parts: int) -> float:
    raw = span / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw)


def _ticks(axis: Axis, low: float, high: float) -> list[float]:
    """Round values within the range; on a log axis powers of ten."""
    if axis.log:
        return [10.0**e for e in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
    step = _nice_step(high - low, 5)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(axis: Axis, values: list[float]) -> tuple[float, float]:
    low, high = min(map(axis.place, values)), max(map(axis.place, values))
    if axis.log:
        return math.floor(low), math.ceil(high) if math.ceil(high) > math.floor(low) else math.floor(low) + 1
    return min(low, 0.0), high * 1.05 if high > 0 else 1.0


def draw(lines: Sequence[Line], x: Axis, y: Axis, *, x_ticks: Sequence[float] = ()) -> str:
    """The chart as one <svg> element; `x_ticks` replaces the automatic ones."""
    x_low, x_high = _range(x, [v for line in lines for v in line.xs])
    y_low, y_high = _range(y, [v for line in lines for v in line.ys])
    if x_ticks:
        x_low, x_high = x.place(min(x_ticks)), x.place(max(x_ticks))

    def px(value: float) -> float:
        return _LEFT + (x.place(value) - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def py(value: float) -> float:
        return _HEIGHT - _BOTTOM - (y.place(value) - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{y.title} over {x.title}")}">']
    for value in _ticks(y, y_low, y_high):
        parts.append(f'<path class="grid" d="M{_LEFT} {py(value):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{py(value) + 4:.1f}">{escape(y.write(value))}</text>')
    for value in x_ticks or _ticks(x, x_low, x_high):
        label = escape(x.write(value))
        parts.append(f'<text class="middle" x="{px(value):.1f}" y="{_HEIGHT - _BOTTOM + 20}">{label}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="title middle" x="{middle}" y="{_HEIGHT - 6}">{escape(x.title)}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f'transform="translate(14 {middle}) rotate(-90)"'
    parts.append(f'<text class="title middle" {turned}>{escape(y.title)}</text>')
    for line in lines:
        points = [f"{px(a):.1f} {py(b):.1f}" for a, b in zip(line.xs, line.ys, strict=True)]
        parts.append(f'<path class="line {line.kind}" d="M{"L".join(points)}"/>')
        if line.dots:
            parts += [f'<circle class="{line.kind}" r="4" cx="{p.split()[0]}" cy="{p.split()[1]}"/>' for p in points]
    for i, line in enumerate(line for line in lines if line.name):
        at = _LEFT + 14, _TOP + 10 + 20 * i
        parts.append(f'<path class="line {line.kind}" d="M{at[0]} {at[1]}h22"/>')
        parts.append(f'<text x="{at[0] + 30}" y="{at[1] + 4}">{escape(line.name)}</text>')
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; `kind` is its class in the style sheet, and the part beyond `full` is faint."""

    name: str
    kind: str
    value: float
    label: str
    full: float = math.inf


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Bars from zero, one below the other, as one <svg> element."""
    left, step = 76, 48
    top, height = 36, 40 + step * len(rows)
    scale = (_WIDTH - left - _RIGHT) / max(row.value for row in rows)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{_RIGHT}" y="22">{escape(title)}</text>')
    for i, row in enumerate(rows):
        y, full = top + step * i, min(row.value, row.full)
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 17}">{escape(row.name)}</text>')
        for kind, start, stop in ((row.kind, 0.0, full), (f"{row.kind} pale", full, row.value)):
            if stop > start:
                place = f'x="{left + scale * start:.1f}" y="{y}" width="{scale * (stop - start):.1f}" height="24"'
                parts.append(f'<rect class="{kind}" {place}/>')
        parts.append(f'<text class="small" x="{left}" y="{y + 39}">{escape(row.label)}</text>')
    return "".join([*parts, "</svg>"])
