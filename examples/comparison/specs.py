"""The settings that determine a run, and its name in the files."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

DIGITS = 3  # significant digits of a learning rate, so that equal rates are equal numbers


class Model(NamedTuple):
    """A model and the length of its windows.

    Attributes:
      kind: `byte` is the model of byte_gpt.py, and `paper` that of paper_gpt.py. `scaled` is `byte`
        with initial kernels proportional to `1 / sqrt(width)`.
      vocabulary: the number of tokens; 256 for bytes.
    """

    kind: str
    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int = 256


@dataclasses.dataclass(frozen=True)
class Spec:
    """The settings of one run. Two runs with equal settings are the same run.

    Attributes:
      contender: a name in `contenders.CONTENDERS`.
      options: further arguments of the contender, as `name=value,...`.
      learning_rate: the highest rate of the schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      weight_decay: strength of the decoupled weight decay.
      frequency: number of steps from one refresh to the next.
      model: the model.
      steps: number of steps, which is also the length of the schedule.
      batch_size: number of windows in a batch.
      seed: the seed of the initial weights and the batches.
    """

    contender: str
    options: str
    learning_rate: float
    b1: float
    b2: float
    weight_decay: float
    frequency: int
    model: Model
    steps: int
    batch_size: int
    seed: int

    @property
    def columns(self) -> dict[str, Any]:
        """All settings by column, as in a row of the CSV."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sizes = dict(zip(Model._fields[1:], self.model[1:], strict=True))
        return values | {"model": self.model.kind} | sizes

    @property
    def name(self) -> str:
        """A short name, different for different settings."""
        text = ",".join(f"{name}={value}" for name, value in self.columns.items())
        return f"{self.contender}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def program(self) -> tuple[Any, ...]:
        """The settings that the compiled step contains. All others are its arguments."""
        return self.contender, self.options, self.model, self.batch_size

    @property
    def group(self) -> Spec:
        """The settings without the seed."""
        return dataclasses.replace(self, seed=0)

    @property
    def tokens(self) -> int:
        """The number of tokens of the whole run."""
        return self.steps * self.batch_size * self.model.context

    def but(self, **changes: Any) -> Spec:
        """These settings with some changes; rates are rounded."""
        if "learning_rate" in changes:
            changes["learning_rate"] = rounded(changes["learning_rate"])
        return dataclasses.replace(self, **changes)


def rounded(rate: float) -> float:
    """A learning rate with few digits."""
    return float(f"{rate:.{DIGITS}g}")


def spec_of(row: Mapping[str, str]) -> Spec:
    """The settings in a row of the CSV.

    Raises:
      KeyError, ValueError: a column is missing or has no number.
    """
    model = Model(row["model"], *(int(row[name]) for name in Model._fields[1:]))
    return Spec(
        contender=row["contender"],
        options=row["options"],
        learning_rate=float(row["learning_rate"]),
        b1=float(row["b1"]),
        b2=float(row["b2"]),
        weight_decay=float(row["weight_decay"]),
        frequency=int(row["frequency"]),
        model=model,
        steps=int(row["steps"]),
        batch_size=int(row["batch_size"]),
        seed=int(row["seed"]),
    )


def options_of(text: str) -> dict[str, Any]:
    """The arguments in `name=value,...`. A value is a Python literal or a word."""

    def value_of(word: str) -> Any:
        try:
            return ast.literal_eval(word)
        except (SyntaxError, ValueError):
            return word

    pairs = (pair.partition("=") for pair in text.split(",") if pair)
    return {name: value_of(value) for name, _, value in pairs}
