"""The claims of the SOAP paper beside the same numbers from our runs."""

from __future__ import annotations

from collections.abc import Callable

from comparison.plans import Plan, tuned
from comparison.presets import Preset
from comparison.specs import Spec
from comparison.tables import (
    MISSING,
    Records,
    Table,
    best_runs,
    crossing_of,
    difference,
    losses,
    percent,
    step_seconds,
    steps_to_loss,
)

COLUMNS = ("claim", "paper", "here")


def claims(preset: Preset, records: Records) -> Table:
    """The claims for which there are runs."""
    found = [[claim, paper, here(preset, records)] for claim, paper, here in CLAIMS]
    return Table("steps-to-loss", COLUMNS, [row for row in found if row[-1] != MISSING])


SUMMARY = ("AdamW", "SOAP", "Shampoo", "Muon")
SUMMARY_COLUMNS = (
    "optimizer",
    "learning rate",
    "held-out loss",
    "steps to AdamW's",
    "time to AdamW's",
)


def summary(preset: Preset, records: Records) -> Table:
    """A few rows and columns of the table of `steps-to-loss`."""
    table = steps_to_loss(preset, records)
    places = [table.columns.index(column) for column in SUMMARY_COLUMNS]
    rows = [[row[place] for place in places] for row in table.rows if row[0] in SUMMARY]
    return Table("steps-to-loss", SUMMARY_COLUMNS, rows)


def tuned_run(preset: Preset, records: Records, name: str) -> Spec | None:
    """The tuned run of a contender, if the search is complete."""
    if name not in preset.contenders:
        return None
    return tuned(Plan(losses(records)), preset.spec(name), preset)


def fewer_steps(rival: str, in_time: bool = False) -> Callable[[Preset, Records], str]:
    """The steps or the time that SOAP saves on the way to another contender's final loss."""

    def here(preset: Preset, records: Records) -> str:
        soap, other = (tuned_run(preset, records, name) for name in ("soap", rival))
        if soap is None or other is None:
            return MISSING
        found = crossing_of(records, soap, other)
        factor = step_seconds(records, soap) / step_seconds(records, other) if in_time else 1.0
        saved = [1 - factor * value for value in found.steps.values()]
        return percent(saved, found.lost).replace("%", "% less" if in_time else "% fewer")

    return here


def at_frequency(name: str, interval: int) -> Callable[[Preset, Records], str]:
    """The loss at a frequency minus AdamW's."""

    def here(preset: Preset, records: Records) -> str:
        best = best_runs("frequency", preset, records)
        adamw = [spec for spec in best if spec.contender == "adamw"]
        return difference_of(records, frequent(best, name, interval), adamw)

    return here


def frequent(best: list[Spec], name: str, interval: int) -> list[Spec]:
    """The runs of a contender at a fixed frequency."""
    return [
        spec
        for spec in best
        if (spec.contender, spec.frequency, spec.options) == (name, interval, "")
    ]


def growth(preset: Preset, records: Records) -> str:
    """How much the loss of SOAP and of Shampoo grows from the first to the last frequency."""
    best = best_runs("frequency", preset, records)
    ends = (preset.frequency.values[-1], preset.frequency.values[0])
    texts = []
    for name, label in (("soap", "SOAP"), ("shampoo", "Shampoo")):
        last, first = (frequent(best, name, interval) for interval in ends)
        texts.append(f"{label} {difference_of(records, last, first)}")
    return MISSING if all(text.endswith(MISSING) for text in texts) else "; ".join(texts)


def variant(name: str, rival: str) -> Callable[[Preset, Records], str]:
    """The loss of a contender minus that of another."""

    def here(preset: Preset, records: Records) -> str:
        specs = (tuned_run(preset, records, one) for one in (name, rival))
        ours, theirs = ([spec] if spec else [] for spec in specs)
        return difference_of(records, ours, theirs)

    return here


def difference_of(records: Records, ours: list[Spec], theirs: list[Spec]) -> str:
    """The difference of the only runs in two lists."""
    return difference(records, ours[0], theirs[0]) if ours and theirs else MISSING


def time_of_step(preset: Preset, records: Records) -> str:
    """The time of a SOAP step relative to AdamW's."""
    specs = [tuned_run(preset, records, name) for name in ("soap", "adamw")]
    soap, adamw = (step_seconds(records, spec) if spec else None for spec in specs)
    return f"{soap / adamw:.2f} times" if soap and adamw else MISSING


Here = Callable[[Preset, Records], str]
CLAIMS: tuple[tuple[str, str, Here], ...] = (
    ("SOAP's steps to AdamW's final loss", "at least 40% fewer", fewer_steps("adamw")),
    ("SOAP's time to AdamW's final loss", "at least 35% less", fewer_steps("adamw", in_time=True)),
    ("SOAP's steps to Shampoo's final loss", "about 20% fewer", fewer_steps("shampoo")),
    ("SOAP's time to Shampoo's final loss", "about 20% less", fewer_steps("shampoo", in_time=True)),
    ("SOAP minus Shampoo", "below zero", variant("soap", "shampoo")),
    ("a SOAP step, relative to AdamW's", MISSING, time_of_step),
    ("SOAP at f = 100 minus AdamW", "below zero", at_frequency("soap", 100)),
    ("Shampoo at f = 100 minus AdamW", "below zero", at_frequency("shampoo", 100)),
    ("growth of the loss from f = 1 to f = 100", "SOAP's is smaller", growth),
    ("one-sided SOAP minus AdamW", "below zero", variant("soap-one-sided", "adamw")),
    ("factored SOAP minus AdamW", "below zero", variant("soap-factored", "adamw")),
    ("factored SOAP minus SOAP", "almost zero", variant("soap-factored", "soap")),
    ("SOAP with KL factors minus SOAP", MISSING, variant("soap-kl", "soap")),
    ("SOAP minus Muon", MISSING, variant("soap", "muon")),
)
