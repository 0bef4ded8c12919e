"""One figure per op: time and extra memory of every contestant, ours in colour."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

_OURS, _RIVAL = ("#0b6e6e", "#8fcaca"), ("#5c6370", "#c4c8cf")  # forward+backward, forward
_INK, _FAINT = "#22262e", "#7a8190"
_BAR = 0.36


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(sample, shape, dtype) -> rows with a time."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            shape = " × ".join(map(str, row["shape"]))
            groups.setdefault((row["sample"], shape, row["dtype"]), []).append(row)
    return groups


def _text(value: float, unit: str) -> str:
    if unit == "ms" and value >= 1000:
        return f"{value / 1000:.2f} s"
    digits = 0 if value >= 100 else 1 if value >= 10 or unit == "MiB" else 2
    return f"{value:.{digits}f} {unit}"


def _value(row: dict[str, Any], unit: str) -> float | None:
    value = row["ms"]["median"] if unit == "ms" else row.get("extra_MiB")
    return None if value is None else float(value)


def _panel(axes: Axes, rows: list[dict[str, Any]], unit: str, names: bool) -> None:
    """Two bars a contestant: forward+backward on top, forward below."""
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    most = max(row["ms"]["q3"] if unit == "ms" else _value(row, unit) or 0.0 for row in rows) or 1.0
    for row in rows:
        value = _value(row, unit)
        if value is None:
            continue
        both = row["mode"] != "forward"
        y = contestants.index(row["contestant"]) + (-_BAR / 2 if both else _BAR / 2)
        axes.barh(y, value, _BAR, color=(_OURS if row["ours"] else _RIVAL)[0 if both else 1])
        if unit == "ms":
            low, high = value - row["ms"]["q1"], row["ms"]["q3"] - value
            axes.errorbar(value, y, xerr=[[low], [high]], color=_INK, lw=0.8)
            end = row["ms"]["q3"]
        else:
            end = value
        axes.text(end + 0.015 * most, y, _text(value, unit), va="center", fontsize=7, color=_INK if both else _FAINT)
    axes.set_xlim(0, 1.22 * most)
    axes.set_ylim(len(contestants) - 0.4, -0.6)
    axes.set_yticks(range(len(contestants)), contestants if names else [""] * len(contestants), fontsize=8)
    for label, name in zip(axes.get_yticklabels(), contestants, strict=True):
        ours = name.startswith("vlkern")
        label.set(color=_OURS[0] if ours else _INK, fontweight="bold" if ours else "normal")
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="x", labelsize=7, labelcolor=_FAINT)
    axes.grid(axis="x", color="#e6e8ec", lw=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes <op>.svg and <op>.png into `folder` and returns their paths; nothing when no contestant was timed."""
    groups = _groups(result["rows"])
    if not groups:
        return []
    bars = [len({row["contestant"] for row in rows}) for rows in groups.values()]
    heights = [0.42 * n + 0.55 for n in bars]
    figure = Figure(figsize=(9.6, sum(heights) + 0.95), layout=ConstrainedLayoutEngine(h_pad=0.08))
    grid = figure.subplots(len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (left, right), ((sample, shape, dtype), rows) in zip(grid, groups.items(), strict=True):
        _panel(left, rows, "ms", names=True)
        _panel(right, rows, "MiB", names=False)
        left.set_title(f"{sample}   {shape}   {dtype}", loc="left", fontsize=9, color=_INK, fontweight="bold")
        if all(row.get("extra_MiB") is None for row in rows):
            right.set_axis_off()
    hardware = result["hardware"]
    figure.suptitle(
        f"{result['op']}: time (left) and peak extra memory (right), shorter is better\n\n",
        x=0.01, ha="left", fontsize=11, color=_INK, fontweight="bold",
    )  # fmt: skip
    figure.text(
        0.01, 1 - 0.36 / figure.get_figheight(),
        f"dark: forward and backward, light: forward alone; medians with quartiles.   "
        f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cores']} cores, torch {result['versions']['torch']}",
        fontsize=7.5, color=_FAINT, va="top",
    )  # fmt: skip
    paths = [folder / f"{result['op']}.{kind}" for kind in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
