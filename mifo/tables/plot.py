"""A table as a picture, every mean with its interval, cut off where the metric's range ends."""

from collections.abc import Sequence
from itertools import compress

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mifo.metrics.evaluation import titled
from mifo.metrics.scores import RANGES
from mifo.report.palette import PALETTE, hexadecimal, instance_colour
from mifo.tables.collect import Cells, Estimate, pareto_front, partial_cells
from mifo.tables.settings import PARETO


def draw_table(cells: Cells, columns: Sequence[str], kind: str, title: str) -> Figure:
    """Draw `cells` as dots (a panel per metric), lines over the sets of scenes, or a Pareto plot."""
    with rc_context({"text.parse_math": False}):  # a label with two $ is no formula
        figure = _DRAW[kind](cells, columns)
        figure.suptitle(title, fontsize=11)
    return figure


def _dots(cells: Cells, columns: Sequence[str]) -> Figure:
    (rows, sets), lacking = _names(cells), partial_cells(cells)
    figure, panels = _panels(len(columns), 2.5, 1.0 + 0.24 * len(rows) * (1 + 0.5 * (len(sets) - 1)))
    for axes, metric in zip(panels, columns, strict=True):
        for place, scenes in enumerate(sets):
            shift = 0.6 * (place - (len(sets) - 1) / 2) / len(sets)
            at, means, halves = _found(cells, [(row, scenes) for row in rows], metric)
            hollow = [(rows[i], scenes, metric) in lacking for i in at]
            _errorbars(axes, means, [i + shift for i in at], place, scenes, x=halves, hollow=hollow)
        axes.set_yticks(range(len(rows)), rows if axes is panels[0] else [""] * len(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(titled(metric), fontsize=9)
        axes.grid(axis="y", visible=False)
    if len(sets) > 1 or lacking:
        _legend(figure, panels[-1], bool(lacking))
    return figure


def _lines(cells: Cells, columns: Sequence[str]) -> Figure:
    (rows, sets), lacking = _names(cells), partial_cells(cells)
    figure, panels = _panels(len(columns), 2.7, 2.6)
    for axes, metric in zip(panels, columns, strict=True):
        for index, row in enumerate(rows):
            at, means, halves = _found(cells, [(row, scenes) for scenes in sets], metric)
            hollow = [(row, sets[i], metric) in lacking for i in at]
            shift = 0.06 * (index - (len(rows) - 1) / 2)
            places = [i + shift for i in at]
            _errorbars(axes, places, means, index, row, y=halves, line="-", hollow=hollow)
        axes.set_xticks(range(len(sets)), sets)
        axes.set_title(titled(metric), fontsize=9)
    _legend(figure, panels[-1], bool(lacking))
    return figure


def _pareto(cells: Cells, columns: Sequence[str]) -> Figure:
    """Points with numbers, named beside the panels, since those of a sweep lie close together."""
    across, up = PARETO
    (rows, sets), lacking = _names(cells), partial_cells(cells)
    figure, panels = _panels(len(sets), 4.6, 4.2)
    figure.set_figwidth(figure.get_figwidth() + 0.06 * max(map(len, rows)))
    fronts: set[str] = set()
    for axes, scenes in zip(panels, sets, strict=True):
        found = {row: cells[row, scenes] for row in rows if {*PARETO} <= cells.get((row, scenes), {}).keys()}
        points = [(each[across].mean, each[up].mean) for each in found.values()]
        whole = [i for i, row in enumerate(found) if not {(row, scenes, each) for each in PARETO} & lacking]
        front = [whole[index] for index in pareto_front([points[index] for index in whole])]
        fronts |= {row for index, row in enumerate(found) if index in front}
        best_points = [[points[index][side] for index in front] for side in (0, 1)]
        axes.plot(*best_points, "-", color="#9ca3af", zorder=1)
        for index, (row, each) in enumerate(found.items()):
            best, partial = index in front, index not in whole
            (x, y), (wide, high) = points[index], ([_half_widths(each[key], key)] for key in PARETO)
            _errorbars(axes, [x], [y], 0 if best else 7, None, wide, high, faint=True, hollow=[partial])
            number = {
                "color": "black" if partial else "white",
                "fontsize": 6,
                "ha": "center",
                "va": "center_baseline",
            }
            axes.annotate(str(rows.index(row) + 1), points[index], zorder=5 + best, **number)
        # of sweeps over a few scenes the intervals are many times as long as the points are apart;
        # where no row has both scores there is no point
        for limit, values in zip((axes.set_xlim, axes.set_ylim), zip(*points, strict=True), strict=False):
            margin = 0.15 * (max(values) - min(values)) or 0.05
            limit(min(values) - margin, max(values) + margin)
        axes.set(xlabel=titled(across), ylabel=titled(up))
        axes.set_title(scenes, fontsize=9)
    colours = [hexadecimal(instance_colour(0 if row in fronts else 7)) for row in rows]
    told = ["blue: beaten by no row that has as many scenes", "faint: 95 % intervals, cut off at the edge"]
    told += [f"hollow: {_FEWER}"] * bool(lacking)
    figure.legend(
        [Line2D([], [], linestyle="", marker="o", color=colour) for colour in colours],
        [f"{i}  {row}" for i, row in enumerate(rows, start=1)],
        loc="outside right center",
        title="\n".join(told),
        **{"fontsize": 7, "title_fontsize": 7, "alignment": "left", "frameon": False},
    )
    return figure


_FEWER = "of fewer scenes than another row has"
_DRAW = {"dots": _dots, "lines": _lines, "pareto": _pareto}


def _found(
    cells: Cells, keys: Sequence[tuple[str, str]], metric: str
) -> tuple[list[int], list[float], list[tuple[float, float]]]:
    """Of the `keys` that have the metric: places among them, means, half-widths."""
    at = [(i, cells[key][metric]) for i, key in enumerate(keys) if metric in cells.get(key, {})]
    return [i for i, _ in at], [each.mean for _, each in at], [_half_widths(each, metric) for _, each in at]


def _names(cells: Cells) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(scenes for _, scenes in cells))


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count + 1.2, height + 0.4), dpi=160, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=2)
    return figure, panels


def _legend(figure: Figure, axes: Axes, lacking: bool) -> None:
    """`lacking`: some points are hollow."""
    handles, labels = axes.get_legend_handles_labels()
    if lacking:
        style = {"marker": "o", "markersize": 4, "color": "#6b7280", "markerfacecolor": "white"}
        handles.append(Line2D([], [], linestyle="", **style))
        labels.append(_FEWER)
    inches = 0.6 + 0.06 * max(map(len, labels))
    columns = min(len(labels), max(1, int(figure.get_figwidth() / inches)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


def _half_widths(each: Estimate, metric: str) -> tuple[float, float]:
    """Of its interval below and above the mean; 0 where it has none."""
    half, (low, high) = each.half or 0.0, RANGES[metric]
    # a few scenes give an interval that leaves the range
    return min(half, each.mean - low), min(half, high - each.mean)


def _errorbars(
    axes: Axes,
    across: Sequence[float],
    up: Sequence[float],
    colour: int,
    label: str | None,
    x: Sequence[tuple[float, float]] | None = None,
    y: Sequence[tuple[float, float]] | None = None,
    line: str = "",
    faint: bool = False,
    hollow: Sequence[bool] = (),
) -> None:
    """Points with half-widths `x`, `y`, or both, below and above each point; `faint` behind large points.

    hollow: by point, whether it is drawn so.
    """
    errors = {
        side: list(zip(*halves, strict=True))
        for side, halves in (("xerr", x), ("yerr", y))
        if halves is not None and len(halves)
    }
    style = {"color": hexadecimal(instance_colour(colour)), "linestyle": line, "label": label}
    width = {"elinewidth": 1.2, "capsize": 2}
    marker = "osD"[colour // len(PALETTE) % 3]  # colours repeat
    size = 9 if faint else 4
    drawn = axes.errorbar(across, up, fmt=marker, markersize=size, linewidth=1, **width, **style, **errors)
    for point in compress(zip(across, up, strict=True), hollow):
        axes.plot(*point, marker, markersize=size, color=style["color"], markerfacecolor="white", zorder=3)
    if faint:
        _, caps, bars = drawn
        for each in (*caps, *bars):
            each.set_alpha(0.2)
