"""The runs of each study, as a function of the losses that are known.

A `Plan` collects the runs that a study needs. Later runs depend on the losses of earlier ones: a
search extends its grid until the best learning rate has a worse one on both sides. So a plan is
made again after every run, and it is complete when no run is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import mean
from typing import Any

from comparison.contenders import CONTENDERS
from comparison.presets import Grid, Preset
from comparison.specs import Spec

MARGIN = 0.1  # nats; the learning-rate study goes on until losses are this much above the lowest
TUNED_VALUES = {"b2": (0.9, 0.95, 0.99, 0.999), "weight_decay": (1e-4, 0.1)}
SHORTER = (0.375, 0.25, 0.125)  # fractions of the steps that are added where needed
Losses = Mapping[Spec, float]  # final held-out losses; infinite if a run diverged


class Plan:
    """The runs that are needed, in order.

    Attributes:
      losses: losses of complete runs.
      needed: all runs so far, complete or not.
    """

    def __init__(self, losses: Losses):
        self.losses = losses
        self.needed: dict[Spec, None] = {}

    @property
    def missing(self) -> list[Spec]:
        """The runs that are needed and not complete."""
        return [spec for spec in self.needed if spec not in self.losses]

    def need(self, specs: Iterable[Spec]) -> bool:
        """Adds runs, and returns whether all of them are complete."""
        specs = list(specs)
        self.needed.update(dict.fromkeys(specs))
        return all(spec in self.losses for spec in specs)

    def best(self, specs: Iterable[Spec]) -> Spec:
        """The run with the lowest loss."""
        return min(specs, key=self.losses.__getitem__)

    def mean_loss(self, spec: Spec, seeds: Iterable[int]) -> float:
        """The mean loss over seeds."""
        return mean(self.losses[spec.but(seed=seed)] for seed in seeds)

    def known_loss(self, spec: Spec, seeds: Iterable[int]) -> float:
        """The mean loss over seeds if all are complete, else the loss of the run itself."""
        runs = [spec.but(seed=seed) for seed in seeds]
        complete = runs and all(run in self.losses for run in runs)
        return mean(self.losses[run] for run in runs) if complete else self.losses[spec]


# Searches -----------------------------------------------------------------------------------------


def valley(
    plan: Plan, base: Spec, preset: Preset, margin: float = 0.0, seeds: Iterable[int] = ()
) -> list[Spec] | None:
    """Searches the learning rate by half decades around that of `base`, with its seed.

    The grid grows until the runs at both ends are worse than the best one by more than `margin`, or
    until it has `preset.extensions` more rates. A rate whose runs are complete with all `seeds`
    counts with their mean.

    Returns:
      The runs by learning rate, or None while some are missing.
    """
    reach = preset.rates // 2
    places = list(range(-reach, reach + 1))
    most = preset.rates + (preset.extensions if reach else 0)
    while True:
        grid = [base.but(learning_rate=half_decade(base.learning_rate, place)) for place in places]
        if not plan.need(grid):
            return None
        losses = [plan.known_loss(spec, seeds) for spec in grid]
        limit = min(losses) + margin
        low, high = losses[0] <= limit, losses[-1] <= limit
        if not (low or high) or len(places) >= most:
            return grid
        # One rate at a time, where the loss is lower.
        go_low = low and (not high or losses[0] <= losses[-1])
        places = [places[0] - 1, *places] if go_low else [*places, places[-1] + 1]


def half_decade(rate: float, place: int) -> float:
    """The half decade that is `place` half decades from a rate, such as 0.01, 0.0316 and 0.1."""
    return 10 ** ((round(2 * math.log10(rate)) + place) / 2)


def best_rate(plan: Plan, base: Spec, preset: Preset) -> Spec | None:
    """The run at the rate with the lowest mean loss over all seeds.

    The best rate of the first seed gets the other seeds. If their mean is above the first loss of
    another rate, as when a rate is unstable with some seeds, that rate gets all seeds too.

    Returns:
      The run, with the seed of `base`, or None while some are missing.
    """
    grid = valley(plan, base, preset, seeds=preset.seeds)
    if grid is None:
        return None
    best = min(grid, key=lambda spec: plan.known_loss(spec, preset.seeds))
    return best if with_seeds(plan, best, preset.seeds) else None


def tuned(plan: Plan, base: Spec, preset: Preset) -> Spec | None:
    """Tunes the learning rate, then b2, then weight decay, then the learning rate again.

    Each contender has the settings to tune in `Contender.tuned`. The first seed decides all but the
    last search, in which `best_rate` takes all of them.
    """
    if not preset.tunes:
        return best_rate(plan, base, preset)
    grid = valley(plan, base, preset)
    if grid is None:
        return None
    best = first = plan.best(grid)
    for name in CONTENDERS[base.contender].tuned:
        others = [best.but(**{name: value}) for value in TUNED_VALUES[name]]
        if not plan.need(others):
            return None
        best = plan.best([best, *others])
    return best_rate(plan, base if best == first else best, preset)


def with_seeds(plan: Plan, spec: Spec | None, seeds: Iterable[int]) -> bool:
    """Adds the run with every seed, if it is known; returns whether all are complete."""
    return spec is not None and plan.need(spec.but(seed=seed) for seed in seeds)


# Studies ------------------------------------------------------------------------------------------


def steps_to_loss(plan: Plan, preset: Preset) -> None:
    """Tuned contenders with every seed, some of them also with fewer steps."""
    best = {name: tuned(plan, preset.spec(name), preset) for name in preset.contenders}
    complete = {name: with_seeds(plan, spec, preset.seeds) for name, spec in best.items()}
    target = math.inf
    if complete["adamw"] and (adamw := best["adamw"]):
        target = plan.mean_loss(adamw, preset.seeds)
    for name in preset.shortened:
        whole = best.get(name)
        if whole is None:
            continue
        shorter = [at_fraction(whole, fraction) for fraction in preset.fractions]
        are_complete = [with_seeds(plan, spec, preset.seeds) for spec in shorter]
        if not all(are_complete) or math.isinf(target):
            continue
        for fraction in SHORTER:
            if plan.mean_loss(shorter[-1], preset.seeds) > target:
                break
            shorter.append(at_fraction(whole, fraction))
            if not with_seeds(plan, shorter[-1], preset.seeds):
                break


def at_fraction(spec: Spec, fraction: float) -> Spec:
    """A run with a fraction of the steps and a complete schedule."""
    return spec.but(steps=round(spec.steps * fraction))


def learning_rate(plan: Plan, preset: Preset) -> None:
    """Every contender at every rate of its valley, and with every seed near the best."""
    for name in preset.contenders:
        grid = valley(plan, preset.spec(name), preset, MARGIN)
        if grid:
            place = grid.index(plan.best(grid))
            for spec in grid[max(0, place - 1) : place + 2]:
                with_seeds(plan, spec, preset.seeds)


THINNED = (10,)  # frequencies that are also the last interval of `thinning_frequency`
DENSE = 20


def frequency(plan: Plan, preset: Preset) -> None:
    """SOAP and Shampoo at every frequency, fixed and thinned, with the learning rate tuned."""
    model = preset.model._replace(layers=preset.frequency.layers)
    changes = {"model": model, "steps": preset.frequency.steps}
    bases = [preset.spec("adamw", **changes)]
    for name in ("soap", "shampoo"):
        for interval in preset.frequency.values:
            bases.append(preset.spec(name, frequency=interval, **changes))
        for interval in set(THINNED) & set(preset.frequency.values):
            options = f"dense={DENSE},most={interval}"
            bases.append(preset.spec(name, options, frequency=interval, **changes))
    for base in bases:
        with_seeds(plan, best_rate(plan, base, preset), preset.seeds)


def batch_size(plan: Plan, preset: Preset) -> None:
    """AdamW and SOAP at equal tokens in batches of several sizes."""
    model = preset.model._replace(layers=preset.batch.layers)
    for tokens in preset.batch.values:
        size, steps = tokens // model.context, preset.batch.steps // tokens
        for name in ("adamw", "soap"):
            base = preset.spec(name, model=model, batch_size=size, steps=steps)
            with_seeds(plan, best_rate(plan, base, preset), preset.seeds)


BFLOAT16 = "mu_dtype=bfloat16,preconditioner_dtype=bfloat16"
MEMORY_OPTIONS = (
    "",
    "factored=True",
    BFLOAT16,
    "fold_factors=True",
    "one_sided=True",
    f"factored=True,fold_factors=True,{BFLOAT16}",
    f"factored=True,one_sided=True,fold_factors=True,{BFLOAT16}",
)
MORE_SEEDS = 2  # for differences of a hundredth


def memory(plan: Plan, preset: Preset) -> None:
    """SOAP with options that store less, and AdamW, with two more seeds than other studies."""
    seeds = (*preset.seeds, *(preset.seeds[-1] + 1 + more for more in range(MORE_SEEDS)))
    bases = [preset.spec("adamw"), *(preset.spec("soap", text) for text in MEMORY_OPTIONS)]
    for base in bases:
        with_seeds(plan, best_rate(plan, base, preset), seeds)


def of_width(preset: Preset, grid: Grid, width: int) -> dict[str, Any]:
    """The changes for a model of another width, with heads of the same length."""
    model, length = preset.model, preset.model.width // preset.model.heads
    heads = max(1, width // length)
    return {
        "model": model._replace(width=width, heads=heads, layers=grid.layers),
        "steps": grid.steps,
    }


def tiles(plan: Plan, preset: Preset) -> None:
    """SOAP without tiles, and with tiles of a half and a quarter of the width."""
    for width in preset.tiles.values:
        for block_size in (None, width // 2, width // 4):
            options = f"block_size={block_size}" if block_size else ""
            base = preset.spec("soap", options, **of_width(preset, preset.tiles, width))
            with_seeds(plan, best_rate(plan, base, preset), preset.seeds)


def width_arms(preset: Preset) -> dict[str, str]:
    """The options of SOAP in the study of widths, by name."""
    base = preset.width.values[0]
    return {
        "one rate": "",
        "rules": f"width_rules={base}",
        f"rules, blocks of {base}": f"block_size={base},width_rules={base}",
    }


def width(plan: Plan, preset: Preset) -> None:
    """The best learning rate of SOAP at every width, with and without rules for it."""
    for options in width_arms(preset).values():
        for value in preset.width.values:
            changes = of_width(preset, preset.width, value)
            changes["model"] = changes["model"]._replace(kind="scaled")
            base = preset.spec("soap", options, **changes)
            with_seeds(plan, best_rate(plan, base, preset), preset.seeds)


STUDIES: dict[str, Callable[[Plan, Preset], None]] = {
    "steps-to-loss": steps_to_loss,
    "frequency": frequency,
    "batch-size": batch_size,
    "learning-rate": learning_rate,
    "memory": memory,
    "tiles": tiles,
    "width": width,
}


def plan_of(studies: Iterable[str], preset: Preset, losses: Losses) -> Plan:
    """The runs of some studies as far as the known losses decide them."""
    plan = Plan(losses)
    for study in studies:
        STUDIES[study](plan, preset)
    return plan
