"""Sizes, grids and budgets, by the name of --preset."""

from __future__ import annotations

from typing import NamedTuple

from comparison.contenders import CONTENDERS
from comparison.specs import Model, Spec

WEIGHT_DECAY = 1e-4  # the paper's
FREQUENCY = 10
ALL = tuple(CONTENDERS)


class Grid(NamedTuple):
    """The values of one study that a preset chooses.

    Attributes:
      values: frequencies, batch sizes in tokens, or widths.
      layers: number of layers.
      steps: number of steps, or of tokens for the study of batch sizes.
    """

    values: tuple[int, ...]
    layers: int
    steps: int


class Preset(NamedTuple):
    """The sizes, contenders and grids of a preset.

    Attributes:
      model: the model of all studies that do not vary it.
      batch_size: number of windows in a batch.
      steps: number of steps of a whole run.
      seeds: the seeds of every pair of numbers that is compared; searches use the first.
      contenders: names of optimizers.
      fractions: fractions of the steps for the contenders in `shortened`, in descending sequence.
        The program adds shorter ones while the loss is still below AdamW's.
      shortened: contenders that are also trained with fewer steps.
      tunes: whether b2 and weight decay are tuned besides the learning rate.
      rates: number of learning rates in a search before it is extended: 3, or 1 for the default.
      extensions: largest number of rates that a search adds.
      evaluations: number of evaluations in a run.
      held_out_batches: number of batches, and of windows in each.
      studies: the studies that run by default.
      budget_hours: hours that all of them may take.
      frequency: grid of the study `frequency`; its values are frequencies.
      batch: grid of the study `batch-size`; its values are tokens in a batch.
      tiles: grid of the study `tiles`; its values are widths.
      width: grid of the study `width`; its values are widths.
      micro_batch: largest number of windows whose gradients are computed at once.
    """

    model: Model
    batch_size: int
    steps: int
    seeds: tuple[int, ...]
    contenders: tuple[str, ...]
    fractions: tuple[float, ...]
    shortened: tuple[str, ...]
    tunes: bool
    rates: int
    extensions: int
    evaluations: int
    held_out_batches: tuple[int, int]
    studies: tuple[str, ...]
    budget_hours: float
    frequency: Grid
    batch: Grid
    tiles: Grid
    width: Grid
    micro_batch: int | None = None

    def spec(self, contender: str, options: str = "", **changes: object) -> Spec:
        """The settings of a run before anything is tuned."""
        known = CONTENDERS[contender]
        spec = Spec(
            contender=contender,
            options=options,
            learning_rate=known.learning_rate,
            b1=known.b1,
            b2=known.b2,
            weight_decay=WEIGHT_DECAY if "weight_decay" in known.tuned else 0.0,
            frequency=FREQUENCY if known.refreshes else 0,
            model=self.model,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seeds[0],
        )
        return spec.but(**changes)


PAPER_CONTENDERS = ("adamw", "soap", "shampoo")
PAPER_FRACTIONS = (0.875, 0.75, 0.625, 0.5)
T5_VOCABULARY = 32_128
FREQUENCIES = (1, 2, 5, 10, 25, 50, 100)


def paper(layers: int, width: int, steps: int) -> Preset:
    """One of the paper's two sizes with batches of two million tokens and 20 tokens a parameter."""
    model = Model("paper", layers, width, width // 64, 1024, T5_VOCABULARY)
    return Preset(
        model=model,
        batch_size=2048,
        steps=steps,
        seeds=(0,),
        contenders=PAPER_CONTENDERS,
        fractions=PAPER_FRACTIONS,
        shortened=("soap", "shampoo"),
        tunes=True,
        rates=3,
        extensions=2,
        evaluations=50,
        held_out_batches=(64, 16),
        studies=("steps-to-loss",),
        budget_hours=20_000,
        frequency=Grid(FREQUENCIES, layers, steps),
        batch=Grid((2**18, 2**21), layers, steps * 2**21),
        tiles=Grid((width,), layers, steps),
        width=Grid((width,), layers, steps),
        micro_batch=16,
    )


PRESETS = {
    "quick": Preset(
        model=Model("byte", 2, 32, 2, 32),
        batch_size=32,
        steps=240,
        seeds=(0, 1, 2),
        contenders=ALL,
        fractions=(0.75, 0.5),
        shortened=("soap", "shampoo"),
        tunes=True,
        rates=3,
        extensions=2,
        evaluations=10,
        held_out_batches=(4, 64),
        studies=("steps-to-loss",),
        budget_hours=1 / 6,
        frequency=Grid((1, 10, 100), 2, 240),
        batch=Grid((1024, 4096), 2, 240 * 1024),
        tiles=Grid((32, 64), 1, 150),
        width=Grid((16, 32, 64), 1, 150),
    ),
    "cpu": Preset(
        model=Model("byte", 2, 64, 2, 64),
        batch_size=32,
        steps=600,
        seeds=(0, 1, 2),
        contenders=ALL,
        fractions=PAPER_FRACTIONS,
        shortened=("soap", "soap-kl", "shampoo", "muon"),
        tunes=True,
        rates=3,
        extensions=2,
        evaluations=12,
        held_out_batches=(8, 64),
        studies=(
            "steps-to-loss",
            "learning-rate",
            "frequency",
            "batch-size",
            "memory",
            "tiles",
            "width",
        ),
        budget_hours=14,
        frequency=Grid(FREQUENCIES, 1, 1600),
        batch=Grid((2**10, 2**12, 2**14, 2**16), 2, 2**22),
        tiles=Grid((64, 128, 256), 1, 250),
        width=Grid((32, 64, 128, 256), 1, 250),
    ),
    "gpu": Preset(
        model=Model("paper", 10, 512, 8, 512),
        batch_size=1024,
        steps=200,
        seeds=(0,),
        contenders=("adamw", "soap", "shampoo", "muon"),
        fractions=(0.75, 0.5),
        shortened=("soap",),
        tunes=False,
        rates=3,
        extensions=1,
        evaluations=10,
        held_out_batches=(16, 64),
        studies=("steps-to-loss",),
        budget_hours=0.5,
        frequency=Grid(FREQUENCIES, 10, 200),
        batch=Grid((2**17, 2**19), 10, 200 * 2**19),
        tiles=Grid((512,), 10, 200),
        width=Grid((256, 512), 10, 200),
        micro_batch=128,
    ),
    "paper-360m": paper(24, 1024, 3_200),
    "paper-660m": paper(24, 1408, 6_400),
}
