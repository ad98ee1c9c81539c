"""One SVG for each curve. A plotting library would be the largest dependency of all, for five simple pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bench.figures import Book

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 64, 48
COLOURS = ("#1f6fb4", "#d2691e", "#2e8b57", "#8b3a8b")
PAUSE, READY, NEXT = "pause, seen inside", "branch ready, first of a checkpoint", "branch ready, next of it"

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Point:
    """A median, with the p95 above it."""

    x: float
    y: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One picture. `series`: under each name the (x, case, row) of its points. Targets of the first are drawn, too."""

    file: str
    title: str
    x: str
    y: str
    series: dict[str, tuple[tuple[float, str, str], ...]]
    logarithmic: bool = True


def _by_size(row: str, *cases: tuple[float, str]) -> tuple[tuple[float, str, str], ...]:
    return tuple((x, case, row) for x, case in cases)


_MEMORY = ((100, "100mb"), (1024, "1gb"), (4096, "4gb"))
_PROCESSES = ((1, "100mb"), (10, "10-processes"), (100, "100-processes"))
_CHANGED = ((1, "100mb"), (64, "64mb-changed"))
_RATES = ((1, "1 Hz"), (10, "10 Hz"))

CURVES = (
    Curve("pause-memory.svg", "Pause by memory, 1 MB of it changed", "MB of memory", "ms",
          {"seen inside": _by_size(PAUSE, *_MEMORY), "as told": _by_size("pause, as told", *_MEMORY)}),
    Curve("ready-memory.svg", "Branch ready by memory", "MB of memory", "ms",
          {"first branch of a checkpoint": _by_size(READY, *_MEMORY), "next branch of it": _by_size(NEXT, *_MEMORY)}),
    Curve("pause-processes.svg", "Pause by processes", "processes", "ms",
          {"seen inside": _by_size(PAUSE, *_PROCESSES), "as told": _by_size("pause, as told", *_PROCESSES)}),
    Curve("pause-changed.svg", "Pause by memory changed, 100 MB in all", "MB changed", "ms",
          {"changed before": _by_size(PAUSE, *_CHANGED),
           "changing throughout": _by_size(PAUSE, (1, "100mb"), (64, "64mb-changing"))}),
    Curve("recorded.svg", "What recording costs", "checkpoints a second", "% slower",
          {what: tuple((x, f"recorded-{what}", f"slower at {rate}") for x, rate in _RATES)
           for what in ("redis", "cc", "numpy")}, logarithmic=False),
)  # fmt: skip


def draw_all(book: Book, directory: Path) -> list[Path]:
    """The curves of which something was measured."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for curve in CURVES:
        series = {name: _points(book, wanted) for name, wanted in curve.series.items()}
        targets = _targets(book, next(iter(curve.series.values())))
        drawn += _write(directory / curve.file, curve, series, targets)
    history = [f for f in book.by_case() if f.case == "history" and f.what.startswith("pause of numbers")]
    for figure in history:
        points = [Point(n, value, value) for n, value in enumerate(figure.values, 1)]
        curve = Curve("history.svg", "Pause by number of the checkpoint", "number", "ms", {}, logarithmic=False)
        drawn += _write(directory / curve.file, curve, {"as told": points}, [])
    return drawn


def _points(book: Book, wanted: Sequence[tuple[float, str, str]]) -> list[Point]:
    found = ((x, book.find(case, what)) for x, case, what in wanted)
    return [Point(x, one.median(), one.p95()) for x, one in found if one is not None]


def _targets(book: Book, wanted: Sequence[tuple[float, str, str]]) -> list[Point]:
    found = ((x, book.find(case, what)) for x, case, what in wanted)
    return [Point(x, f.target, f.target) for x, f in found if f is not None and f.target is not None]


def _write(path: Path, curve: Curve, series: dict[str, list[Point]], targets: list[Point]) -> list[Path]:
    if not any(series.values()):
        return []
    path.write_text(svg(curve, {**series, **({"target": targets} if targets else {})}))
    return [path]


def svg(curve: Curve, series: dict[str, list[Point]]) -> str:
    """The picture. A series named target is dashed."""
    points = [point for one in series.values() for point in one]
    x = _scale([p.x for p in points], LEFT, WIDTH - RIGHT, curve.logarithmic)
    y = _scale([v for p in points for v in (p.y, p.high)], HEIGHT - BOTTOM, TOP, curve.logarithmic)
    parts = [_frame(curve)]
    parts += [_text(x(v), HEIGHT - BOTTOM + 18, _label(v), "middle") for v in _ticks([p.x for p in points], curve)]
    for value in _ticks([v for p in points for v in (p.y, p.high)], curve):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y(value) + 4, _label(value), "end"))
    legend = LEFT
    for number, (name, one) in enumerate(series.items()):
        colour = "#888" if name == "target" else COLOURS[number % len(COLOURS)]
        parts += _line(one, x, y, colour, dashed=name == "target")
        parts.append(_text(legend, 50, name, "start", colour))
        legend += 24 + 7 * len(name)
    return "\n".join([*parts, "</svg>\n"])


def _line(points: list[Point], x: Scale, y: Scale, colour: str, *, dashed: bool) -> list[str]:
    path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>']
    if dashed or len(points) > 50:
        return parts
    for p in points:
        parts.append(f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="3.5" fill="{colour}"/>')
        parts.append(
            f'<line x1="{x(p.x):.1f}" x2="{x(p.x):.1f}" y1="{y(p.y):.1f}" y2="{y(p.high):.1f}" stroke="{colour}"/>'
        )
    return parts


def _frame(curve: Curve) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            _text(LEFT, 26, f"{curve.title} ({curve.y}; median, up to p95)", "start", size=15),
            _text(WIDTH - RIGHT, HEIGHT - 10, curve.x, "end"),
            f'<path d="M{LEFT},{TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="#444"/>',
        ]
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#222", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-size="{size}">{escape(text)}</text>'


def _bounds(values: list[float], logarithmic: bool) -> tuple[float, float]:
    if logarithmic:
        values = [max(value, 0.01) for value in values]
        return min(values) / 1.25, max(values) * 1.25
    low, high = min(0.0, *values), max(0.0, *values)
    return low, high if high > low else low + 1


def _scale(values: list[float], start: float, end: float, logarithmic: bool) -> Scale:
    low, high = _bounds(values, logarithmic)
    if not logarithmic:
        return lambda value: start + (value - low) / (high - low) * (end - start)
    return lambda value: start + math.log(max(value, 0.01) / low) / math.log(high / low) * (end - start)


def _ticks(values: list[float], curve: Curve) -> list[float]:
    low, high = _bounds(values, curve.logarithmic)
    if curve.logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [n * 10.0**power for power in powers for n in (1, 2, 5) if low <= n * 10.0**power <= high]
    step = 10 ** math.floor(math.log10(high - low))
    step = step / 2 if (high - low) / step < 3 else step
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _label(value: float) -> str:
    return f"{value:g}" if abs(value) < 100_000 else f"{value:.0e}"
