"""The tables of each study, from the rows of the CSV alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from comparison import plans
from comparison.contenders import CONTENDERS
from comparison.fits import crossing
from comparison.plans import Plan, best_rate, tuned, valley
from comparison.presets import Preset
from comparison.records import Record
from comparison.specs import Spec

MISSING = "-"
Records = Mapping[Spec, Record]


class Table(NamedTuple):
    """A table of a study, in Markdown on request."""

    study: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        """The table, or a sentence if it has no rows."""
        if not self.rows:
            return f"There are no complete runs of `{self.study}`."
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Numbers ------------------------------------------------------------------------------------------


def seeds_of(records: Records, spec: Spec) -> dict[int, Record]:
    """The complete runs with these settings, by seed."""
    group = spec.group
    return {other.seed: record for other, record in records.items() if other.group == group}


def finite_losses(records: Records, spec: Spec) -> dict[int, float]:
    """The losses by seed, without diverged runs."""
    return {
        seed: record.loss
        for seed, record in seeds_of(records, spec).items()
        if math.isfinite(record.loss)
    }


def spread(values: Iterable[float], form: str = ".4f") -> str:
    """The mean, and the standard deviation if there are several values."""
    values = list(values)
    if not values:
        return MISSING
    text = f"{mean(values):{form}}"
    return f"{text} ± {stdev(values):{form}}" if len(values) > 1 else f"{text} (one seed)"


def difference(records: Records, spec: Spec, other: Spec) -> str:
    """The difference of two losses, seed by seed; marked if it is within the spread."""
    ours, theirs = finite_losses(records, spec), finite_losses(records, other)
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if spec.group == other.group or not pairs:
        return MISSING
    text = spread(pairs, "+.4f").replace("± +", "± ")
    return text if is_beyond_spread(pairs) else f"{text}, no claim"


def is_beyond_spread(differences: Sequence[float]) -> bool:
    """Whether three or more differences have one sign and a mean beyond their deviation."""
    if len(differences) < 3:
        return False
    one_sign = len({value > 0 for value in differences}) == 1
    return one_sign and abs(mean(differences)) > stdev(differences)


def megabytes(records: Records, spec: Spec) -> str:
    """The size of the optimizer's state."""
    return f"{next(iter(seeds_of(records, spec).values())).state_bytes / 1e6:.2f}"


def step_seconds(records: Records, spec: Spec) -> float:
    """The time of a step measured in turns, else the mean in the run that was disturbed least."""
    like = (spec.program, spec.frequency)
    alike = [
        record for other, record in records.items() if (other.program, other.frequency) == like
    ]
    timed = [record.timed for record in alike if record.timed]
    return timed[0] if timed else min(record.step_seconds for record in alike)


# Steps to AdamW's loss ----------------------------------------------------------------------------


class Crossing(NamedTuple):
    """Where a contender reaches AdamW's final loss.

    Attributes:
      steps: number of steps by seed, relative to AdamW's.
      lost: number of seeds without a crossing between the shortest and the longest run.
    """

    steps: Mapping[int, float]
    lost: int


def shorter_runs(records: Records, whole: Spec) -> dict[int, Spec]:
    """The runs with other numbers of steps and otherwise equal settings, by steps."""
    like = whole.group
    found = {spec.steps: spec for spec in records if spec.group.but(steps=whole.steps) == like}
    return dict(sorted(found.items()))


def crossing_of(records: Records, whole: Spec, adamw: Spec) -> Crossing:
    """The crossings by seed, each with AdamW's loss of the same seed as target."""
    targets = finite_losses(records, adamw)
    by_steps = shorter_runs(records, whole)
    found, lost = {}, 0
    for seed, target in targets.items():
        losses = {
            steps: loss[seed]
            for steps, spec in by_steps.items()
            if seed in (loss := finite_losses(records, spec))
        }
        if len(losses) < 3:
            continue
        at = crossing(list(losses), list(losses.values()), target)
        if at is None:
            lost += 1
        else:
            found[seed] = at / adamw.steps
    return Crossing(found, lost)


def percent(values: Iterable[float], lost: int) -> str:
    """Fractions as percentages, with the number of seeds that have none."""
    text = spread((100 * value for value in values), ".0f")
    text = text if text == MISSING else f"{text}%"
    if not lost:
        return text
    without = f"no crossing with {lost} seed{'s' if lost > 1 else ''}"
    return without if text == MISSING else f"{text}; {without}"


def steps_to_loss(preset: Preset, records: Records) -> Table:
    """The tuned settings of each contender, its loss, and steps and time to AdamW's loss."""
    plan = Plan(losses(records))
    best = {name: tuned(plan, preset.spec(name), preset) for name in preset.contenders}
    columns = ["optimizer", "learning rate", "b2, decay", "held-out loss", "minus AdamW's"]
    columns += ["steps to AdamW's", "time to AdamW's", "state MB"]
    adamw, rows = best["adamw"], []
    for name, spec in best.items():
        if spec is None:
            continue
        steps, time = MISSING, MISSING
        if adamw and name in preset.shortened:
            ratio = step_seconds(records, spec) / step_seconds(records, adamw)
            found = crossing_of(records, spec, adamw)
            steps = percent(found.steps.values(), found.lost)
            time = percent((ratio * value for value in found.steps.values()), found.lost)
        row = [CONTENDERS[name].label, f"{spec.learning_rate:g}"]
        row += [f"{spec.b2:g}, {spec.weight_decay:g}"]
        row += [spread(finite_losses(records, spec).values())]
        row += [difference(records, spec, adamw) if adamw else MISSING]
        rows.append([*row, steps, time, megabytes(records, spec)])
    return Table("steps-to-loss", columns, rows)


def losses(records: Records) -> dict[Spec, float]:
    """The losses of all runs, infinite where a run diverged."""
    return {spec: record.loss for spec, record in records.items()}


# Other studies ------------------------------------------------------------------------------------


def best_runs(study: str, preset: Preset, records: Records) -> list[Spec]:
    """The best learning rate for every other setting of a study, in the sequence of its plan."""
    plan = Plan(losses(records))
    groups: dict[Spec, None] = {}
    for spec in plans.plan_of([study], preset, plan.losses).needed:
        default = CONTENDERS[spec.contender].learning_rate
        groups[spec.group.but(learning_rate=default, seed=preset.seeds[0])] = None
    return [best for base in groups if (best := best_rate(plan, base, preset))]


def schedule_of(spec: Spec) -> str:
    """The refresh frequency in words."""
    if not spec.frequency:
        return MISSING
    return f"thinned to {spec.frequency}" if "dense" in spec.options else f"{spec.frequency}"


def frequency(preset: Preset, records: Records) -> Table:
    """The loss at each frequency."""
    best = best_runs("frequency", preset, records)
    adamw = next((spec for spec in best if spec.contender == "adamw"), None)
    rows = [
        [
            CONTENDERS[spec.contender].label,
            schedule_of(spec),
            f"{spec.learning_rate:g}",
            spread(finite_losses(records, spec).values()),
            difference(records, spec, adamw) if adamw else MISSING,
            f"{1000 * step_seconds(records, spec):.1f}",
        ]
        for spec in best
    ]
    columns = ["optimizer", "frequency", "learning rate", "held-out loss", "minus AdamW's"]
    return Table("frequency", [*columns, "ms a step"], rows)


def batch_size(preset: Preset, records: Records) -> Table:
    """AdamW and SOAP at each batch size."""
    best = best_runs("batch-size", preset, records)
    sizes = {(spec.contender, spec.batch_size): spec for spec in best}
    rows = []
    for size in sorted({spec.batch_size for spec in best}):
        adamw, soap = sizes.get(("adamw", size)), sizes.get(("soap", size))
        if adamw and soap:
            cells = [f"{size * adamw.model.context:,}", f"{adamw.steps:,}"]
            for spec in (adamw, soap):
                cells += [f"{spec.learning_rate:g}", spread(finite_losses(records, spec).values())]
            rows.append([*cells, difference(records, soap, adamw)])
    columns = ["tokens in a batch", "steps", "AdamW's rate", "AdamW's loss"]
    return Table("batch-size", [*columns, "SOAP's rate", "SOAP's loss", "difference"], rows)


def valley_width(grid: Sequence[Spec], records: Records, margin: float) -> str:
    """The decades of learning rates whose loss is within the margin of the lowest."""
    rates = [math.log10(spec.learning_rate) for spec in grid]
    values = [min(records[spec].loss, 1e3) for spec in grid]
    limit = min(values) + margin
    lowest = values.index(min(values))

    def edge(step: int) -> tuple[float, bool]:
        place = lowest
        while 0 <= place + step < len(grid) and values[place + step] <= limit:
            place += step
        if not 0 <= place + step < len(grid):
            return rates[place], False
        share = (limit - values[place]) / (values[place + step] - values[place])
        return rates[place] + share * (rates[place + step] - rates[place]), True

    (low, low_is_seen), (high, high_is_seen) = edge(-1), edge(+1)
    text = f"{high - low:.2f}"
    return text if low_is_seen and high_is_seen else f"at least {text}"


def learning_rate(preset: Preset, records: Records) -> Table:
    """The valley of each contender."""
    plan, rows = Plan(losses(records)), []
    for name in preset.contenders:
        grid = valley(plan, preset.spec(name), preset, plans.MARGIN)
        if grid is None:
            continue
        best = plan.best(grid)
        place = grid.index(best)
        near = [grid[place + step] if 0 <= place + step < len(grid) else None for step in (-1, 1)]
        cells = [
            spread(finite_losses(records, spec).values()) if spec else MISSING for spec in near
        ]
        loss = spread(finite_losses(records, best).values())
        row = [CONTENDERS[name].label, f"{best.learning_rate:g}", cells[0], loss, cells[1]]
        rows.append([*row, valley_width(grid, records, plans.MARGIN)])
    columns = ["optimizer", "best rate", "half a decade lower", "held-out loss"]
    columns += ["half a decade higher", f"decades within {plans.MARGIN:g} nats"]
    return Table("learning-rate", columns, rows)


def memory(preset: Preset, records: Records) -> Table:
    """SOAP's options that store less."""
    best = best_runs("memory", preset, records)
    soap = next((spec for spec in best if spec.contender == "soap" and not spec.options), None)
    rows = [
        [
            f"`{spec.options}`" if spec.options else CONTENDERS[spec.contender].label,
            megabytes(records, spec),
            f"{spec.learning_rate:g}",
            spread(finite_losses(records, spec).values()),
            difference(records, spec, soap) if soap else MISSING,
        ]
        for spec in best
    ]
    columns = ["options of SOAP", "state MB", "learning rate", "held-out loss", "minus SOAP's"]
    return Table("memory", columns, rows)


def tiles(preset: Preset, records: Records) -> Table:
    """SOAP's blocks at each width."""
    best = best_runs("tiles", preset, records)
    whole = {spec.model.width: spec for spec in best if not spec.options}
    rows = [
        [
            f"{spec.model.width}",
            spec.options.removeprefix("block_size=") or "none",
            f"{spec.learning_rate:g}",
            spread(finite_losses(records, spec).values()),
            difference(records, spec, other) if (other := whole.get(spec.model.width)) else MISSING,
            megabytes(records, spec),
        ]
        for spec in best
    ]
    columns = ["width", "`block_size`", "learning rate", "held-out loss", "minus that without"]
    return Table("tiles", [*columns, "state MB"], rows)


def width(preset: Preset, records: Records) -> Table:
    """The best learning rate at each width, with and without rules."""
    best = best_runs("width", preset, records)
    arms = plans.width_arms(preset)
    rows = []
    for value in preset.width.values:
        cells = [f"{value}"]
        for options in arms.values():
            spec = next((s for s in best if (s.options, s.model.width) == (options, value)), None)
            cells.append(f"{spec.learning_rate:g}" if spec else MISSING)
            loss = spread(finite_losses(records, spec).values()) if spec else MISSING
            cells.append(loss)
        if set(cells[1:]) != {MISSING}:
            rows.append(cells)
    heads = [head for arm in arms for head in (f"{arm}: best", "loss")]
    return Table("width", ["width", *heads], rows)


TABLES: dict[str, Callable[[Preset, Records], Table]] = {
    "steps-to-loss": steps_to_loss,
    "frequency": frequency,
    "batch-size": batch_size,
    "learning-rate": learning_rate,
    "memory": memory,
    "tiles": tiles,
    "width": width,
}


def tables_of(studies: Iterable[str], preset: Preset, records: Records) -> list[Table]:
    """The tables of some studies."""
    return [TABLES[study](preset, records) for study in studies]
