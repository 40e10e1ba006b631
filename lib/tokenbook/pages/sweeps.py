"""A page for every committed sweep: the question, the figure with intervals, the answer, the command.

`book/sweeps/NAME.yml` says what was asked, `book/sweeps/NAME.parquet` holds what came out (a row per run,
written by `tokenbook sweep book/sweeps/NAME.yml --publish`); page and figure are made from these two. In the
file, `plot` holds `x` (a swept parameter), `y` (a column of `tokenbook results`, or a list of them), and may
hold `hue` (a second parameter), `x_label`, `y_label` (a text, or a list as long as `y`), `x_scale` and
`y_scale` (linear, log or symlog), and `kind`: line, or heat for a table of colours, x against hue.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenbook.ledger_table import number
from tokenbook.pages.contents import PageError
from tokenbook.pages.words import cell, row
from tokenbook.parameters import ParameterError
from tokenbook.runs import notebooks, sweeps

if TYPE_CHECKING:
    import pandas

FOLDER = "book/sweeps"
PLOT = {"x", "y", "hue", "x_label", "y_label", "x_scale", "y_scale", "kind"}
KINDS = ("line", "heat")
SCALES = ("linear", "log", "symlog")
KEPT = ("key", "given", "seconds", "finished", "git_commit", "device_kind")
N_FOR_INTERVAL = 3  # fewer runs are shown as they are


def generated(root: Path) -> dict[str, str]:
    """Path and text of the page and the figure of every sweep that has both its files."""
    files: dict[str, str] = {}
    for path in sorted((root / FOLDER).glob("*.yml")):
        if path.with_suffix(".parquet").is_file():
            sweep, frame = load(path, root)
            files[f"{FOLDER}/{path.stem}.md"] = page(path.stem, sweep, frame)
            files[f"book/figures/sweep-{path.stem}.svg"] = svg(path.stem, sweep, frame)
    return files


def load(path: Path, root: Path) -> tuple[sweeps.Sweep, pandas.DataFrame]:
    """A sweep and its committed results. Raises PageError if they do not belong together."""
    import pandas

    try:
        sweep = sweeps.load(path)
        spec = notebooks.find(sweep.chapter, root).spec
        frame = pandas.read_parquet(path.with_suffix(".parquet"))
        wanted = {_text(spec.resolve(given)) for given in sweep.given(spec)}
        shown = {_text(spec.resolve(json.loads(given))) for given in frame["given"]}
    except ParameterError as error:
        raise PageError(f"{FOLDER}/{path.name}: {error}") from error
    if shown != wanted:
        raise PageError(
            f"{FOLDER}/{path.stem}.parquet holds other runs than {path.name} asks for: "
            f"`tokenbook sweep {FOLDER}/{path.name} --publish` executes them and writes it"
        )
    check_plot(path.name, sweep, list(frame.columns))
    return sweep, frame


def publish(path: Path, sweep: sweeps.Sweep, frame: pandas.DataFrame) -> Path:
    """Write beside a sweep's file what its page needs of its runs; returns the path of the Parquet file.

    `frame`: rows of `tokenbook results` with the column `given`, one for each run of the sweep.
    """
    check_plot(path.name, sweep, list(frame.columns))
    measured = [name for y in _ys(sweep) for name in (y, f"{y}_low", f"{y}_high", f"{y}_control")]
    verdicts = [name for name in frame.columns if name.endswith("_verdict")]
    wanted = dict.fromkeys([*KEPT, *sweep.grid, *measured, *verdicts])
    target = path.with_suffix(".parquet")
    frame = frame[[name for name in wanted if name in frame.columns]].sort_values("given", ignore_index=True)
    frame.to_parquet(target, index=False)
    return target


def check_plot(name: str, sweep: sweeps.Sweep, columns: list[str]) -> None:
    """PageError if `plot` names what is not there."""
    plot = sweep.plot
    if unknown := sorted(set(plot) - PLOT):
        raise PageError(f"{name}: plot takes {', '.join(sorted(PLOT))}; got {unknown[0]}")
    for field in ("x", "hue"):
        if field in plot and plot[field] not in sweep.grid:
            raise PageError(f"{name}: plot.{field} must be one of the swept {', '.join(sweep.grid)}")
    if "x" not in plot or not _ys(sweep):
        raise PageError(f"{name}: plot must name x and y")
    if missing := [y for y in _ys(sweep) if y not in columns]:
        raise PageError(f"{name}: plot.y must be columns of the results; there is no {missing[0]}")
    for field in ("x_scale", "y_scale"):
        if plot.get(field, "linear") not in SCALES:
            raise PageError(f"{name}: plot.{field} must be one of {', '.join(SCALES)}; got {plot[field]!r}")
    if plot.get("kind", "line") not in KINDS:
        raise PageError(f"{name}: plot.kind must be one of {', '.join(KINDS)}; got {plot['kind']!r}")
    if plot.get("kind") == "heat" and "hue" not in plot:
        raise PageError(f"{name}: plot.kind heat needs plot.hue, the parameter of its rows")
    if len(_labels(sweep)) != len(_ys(sweep)):
        raise PageError(f"{name}: plot.y_label must be as many as plot.y")


def page(name: str, sweep: sweeps.Sweep, frame: pandas.DataFrame) -> str:
    """The page `book/sweeps/NAME.md`."""
    x, hue = sweep.plot["x"], sweep.plot.get("hue")
    shown = "; ".join(_labels(sweep))
    alt = f"{shown} against {sweep.plot.get('x_label', x)}" + (f", by {hue}" if hue else "")
    commits = ", ".join(f"`{c[:12]}`" for c in sorted({c for c in frame["git_commit"] if c})) or "unknown"
    days = sorted({stamp[:10] for stamp in frame["finished"]})
    chapter = f"[{sweep.chapter}](../../notebooks/{sweep.chapter}.ipynb)"
    heads = [x, *([hue] if hue else []), "runs", *_labels(sweep)]
    lines = [
        f"# {sweep.title}\n",
        f"A sweep of the chapter {chapter}. **{sweep.question.strip()}**\n",
        f"![{cell(alt)}; the table below holds the numbers.](../figures/sweep-{name}.svg)\n",
        f"{sweep.answer.strip()}\n",
        f"Each dot is a run. From {N_FOR_INTERVAL} runs at one place, the line is their mean and the bar a "
        "95 % bootstrap interval over runs; a lone run has its own interval.\n",
        row([cell(head) for head in heads]),
        row(["---"] * (2 + bool(hue)) + ["---:"] * len(_ys(sweep))),
    ]
    for (at, group), rows in _groups(sweep, frame):
        cells = [cell(str(at)), *([cell(str(group))] if hue else []), str(len(rows))]
        for y in _ys(sweep):
            mean, interval = summary(rows, y)
            spread = f" ({number(interval[0])} to {number(interval[1])})" if interval else ""
            cells.append(number(mean) + spread if mean == mean else "–")  # nan: not measured in these runs
        lines.append(row(cells))
    fixed = ", ".join(f"`{key} = {value!r}`" for key, value in sweep.fixed.items())
    lines += [
        "",
        f"{len(frame)} runs, {frame['seconds'].sum() / 60:.0f} minutes of run time in all, finished "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))} on {', '.join(sorted(set(frame['device_kind'])))}"
        f"{f', with {fixed}' if fixed else ''}; commit {commits}. To repeat it:\n",
        f"```bash\ntokenbook sweep {FOLDER}/{name}.yml --publish\n```",
    ]
    return "\n".join(lines) + "\n"


def summary(rows: pandas.DataFrame, y: str) -> tuple[float, tuple[float, float] | None]:
    """Mean of a column over runs of one place, and its interval where there is one."""
    from tokenbook import metrics

    values = rows[y].dropna().to_numpy(float)
    if not len(values):
        return float("nan"), None
    if len(values) >= N_FOR_INTERVAL:
        return float(values.mean()), metrics.bootstrap_interval(values)
    ends = [rows[f"{y}_{end}"].dropna().to_numpy(float) for end in ("low", "high") if f"{y}_{end}" in rows]
    if len(values) == 1 and len(ends) == 2 and all(len(end) for end in ends):
        return float(values[0]), (float(ends[0][0]), float(ends[1][0]))
    return float(values.mean()), None


def svg(name: str, sweep: sweeps.Sweep, frame: pandas.DataFrame) -> str:
    """The figure: one panel for each of `plot.y`."""
    import matplotlib.pyplot as plt

    from tokenbook import figures

    with plt.rc_context():
        figures.theme()
        plt.rcParams["svg.hashsalt"] = name
        ys, labels = _ys(sweep), _labels(sweep)
        figure, axes = plt.subplots(len(ys), 1, figsize=(6.4, 3.2 * len(ys)), squeeze=False, sharex=True)
        is_heat = sweep.plot.get("kind") == "heat"
        for axis, y, label in zip(axes[:, 0], ys, labels, strict=True):
            if is_heat:
                _heat(figure, axis, sweep, frame, y, label)
            else:
                _panel(axis, sweep, frame, y)
                axis.set(ylabel=label, yscale=sweep.plot.get("y_scale", "linear"))
        axes[-1, 0].set(xlabel=sweep.plot.get("x_label", sweep.plot["x"]))
        if "hue" in sweep.plot and not is_heat:
            axes[0, 0].legend(title=sweep.plot["hue"], fontsize="small")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _panel(axis: Any, sweep: sweeps.Sweep, frame: pandas.DataFrame, y: str) -> None:
    from tokenbook import figures

    places = list(dict.fromkeys(at for (at, _), _ in _groups(sweep, frame)))
    are_numbers = all(isinstance(at, int | float) and not isinstance(at, bool) for at in places)
    drawn: dict[Any, list[tuple[Any, float, Any, Any]]] = {}
    for (at, group), rows in _groups(sweep, frame):
        where = at if are_numbers else places.index(at)
        drawn.setdefault(group, []).append((where, *summary(rows, y), rows[y].to_numpy(float)))
    for (group, points), colour in zip(drawn.items(), figures.PALETTE * len(drawn), strict=False):
        xs, means = [p[0] for p in points], [p[1] for p in points]
        axis.plot(xs, means, color=colour, linewidth=1.6, label=None if group is None else str(group))
        for where, mean, interval, values in points:
            axis.plot([where] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.6)
            if interval:
                axis.vlines(where, *interval, color=colour, linewidth=2.5, alpha=0.7)
                axis.plot([where], [mean], "_", color=colour, markersize=12)
    if are_numbers:
        axis.set_xscale(sweep.plot.get("x_scale", "linear"))
        if len(places) <= 10:
            axis.set_xticks(places, [f"{at:g}" for at in places])
            axis.minorticks_off()
    else:
        axis.set_xticks(range(len(places)), [str(at) for at in places])


def _heat(figure: Any, axis: Any, sweep: sweeps.Sweep, frame: pandas.DataFrame, y: str, label: str) -> None:
    """Means as colours and numbers, intervals below; a column for each x and a row for each hue."""
    import matplotlib.colors
    import numpy

    found = {place: summary(rows, y) for place, rows in _groups(sweep, frame)}
    means = {place: mean for place, (mean, _) in found.items()}
    columns, lines = (list(dict.fromkeys(place[k] for place in means)) for k in (0, 1))
    table = numpy.array([[means.get((at, line), numpy.nan) for at in columns] for line in lines])
    is_log = sweep.plot.get("y_scale") == "log" and numpy.nanmin(table) > 0
    norm = matplotlib.colors.LogNorm() if is_log else matplotlib.colors.Normalize()
    image = axis.imshow(table, aspect="auto", cmap="cividis", norm=norm, origin="lower")
    axis.grid(False)
    figure.colorbar(image, ax=axis)
    for (line, column), value in numpy.ndenumerate(table):
        ink = "black" if norm(value) > 0.5 else "white"
        interval = found.get((columns[column], lines[line]), (value, None))[1]
        said = f"{value:.2g}" + (f"\n{interval[0]:.2g} to\n{interval[1]:.2g}" if interval else "")
        axis.text(column, line, said, ha="center", va="center", color=ink, fontsize="x-small")
    axis.set_xticks(range(len(columns)), [str(at) for at in columns])
    axis.set_yticks(range(len(lines)), [str(line) for line in lines])
    axis.set(title=label, ylabel=sweep.plot["hue"])


def _groups(sweep: sweeps.Sweep, frame: pandas.DataFrame) -> Iterator[tuple[tuple[Any, Any], Any]]:
    """((value of x, value of hue or None), rows), in the order of both."""
    x, hue = sweep.plot["x"], sweep.plot.get("hue")
    given = [json.loads(text) for text in frame["given"]]
    places = [(values[x], values[hue] if hue else None) for values in given]
    for place in sorted({_text(p): p for p in places}.values(), key=_order):
        yield (
            tuple(tuple(v) if isinstance(v, list) else v for v in place),
            frame[[p == place for p in places]],
        )


def _order(place: tuple[Any, Any]) -> tuple[Any, ...]:
    """Numbers by size, all else by its text; hue first, so that a table keeps its lines together."""
    keys = [(0, v, "") if isinstance(v, int | float) else (1, 0, _text(v)) for v in reversed(place)]
    return tuple(keys)


def _ys(sweep: sweeps.Sweep) -> list[str]:
    y = sweep.plot.get("y", [])
    return y if isinstance(y, list) else [y]


def _labels(sweep: sweeps.Sweep) -> list[str]:
    given = sweep.plot.get("y_label", _ys(sweep))
    return given if isinstance(given, list) else [given]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
