"""Pictures of the tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from compiling import CompileTime
from matplotlib.figure import Figure
from measure import FLOOR, Spread, Summary


def draw_steps(by_model: Mapping[str, Sequence[Summary]], path: Path) -> None:
    """Bars of plain steps and of refresh steps for each model, in floors, with quartiles."""
    names = dict.fromkeys(one.contender for summaries in by_model.values() for one in summaries)
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, kind in zip(figure.subplots(2, 1), ("plain", "refresh"), strict=True):
        series = ratios_by_contender(by_model, kind)
        for number, (contender, spreads) in enumerate(series.items()):
            width = 0.8 / len(series)
            positions = [list(by_model).index(model) + (number + 0.5) * width for model in spreads]
            medians = [spread.median for spread in spreads.values()]
            errors = [
                [spread.median - spread.lower for spread in spreads.values()],
                [spread.upper - spread.median for spread in spreads.values()],
            ]
            look = {"color": colours[contender], "capsize": 2, "label": contender}
            axes.bar(positions, medians, width, yerr=errors, **look)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(ylabel="times the floor", title=f"{kind} steps")
        axes.set_xticks([position + 0.4 for position in range(len(by_model))], list(by_model))
        axes.grid(axis="y", alpha=0.3)
        if series:
            axes.legend()
    figure.savefig(path, dpi=120)


def ratios_by_contender(
    by_model: Mapping[str, Sequence[Summary]], kind: str
) -> dict[str, dict[str, Spread]]:
    """The ratio of each contender except the floor, on each model for which it has one."""
    series: dict[str, dict[str, Spread]] = {}
    for model, summaries in by_model.items():
        for summary in summaries:
            spread = summary.plain_ratio if kind == "plain" else summary.refresh_ratio
            if spread is not None and summary.contender != FLOOR:
                series.setdefault(summary.contender, {})[model] = spread
    return series


def draw_compile_times(by_model: Mapping[str, Sequence[CompileTime]], path: Path) -> None:
    """Trace and compile times over depth, with a panel for each model."""
    figure = Figure(figsize=(5.5 * len(by_model), 4.5), layout="constrained")
    panels = figure.subplots(1, len(by_model), squeeze=False)[0]
    for axes, (model, rows) in zip(panels, by_model.items(), strict=True):
        for contender in dict.fromkeys(row.contender for row in rows):
            own = [row for row in rows if row.contender == contender]
            seconds = [row.trace_seconds + row.compile_seconds for row in own]
            axes.plot([row.layers for row in own], seconds, "o-", label=contender)
        axes.set(title=model, xlabel="layers", ylabel="to trace and compile, s", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
