"""The settings that determine a run."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from physics.network import Size
from physics.optimizers import OPTIMIZERS


class Setup(NamedTuple):
    """The settings in the compiled step. All others are its arguments.

    Attributes:
      equation: a name in `equations.EQUATIONS`.
      optimizer: a name in `optimizers.OPTIMIZERS`.
      refresh: SOAP's refresh method.
      size: the network.
      points: the number of collocation points.
      causal_tolerance: tolerance of the causal weights, or 0 for equal weights.
      dtype: float32 or float64.
    """

    equation: str
    optimizer: str
    refresh: str
    size: Size
    points: int
    causal_tolerance: float
    dtype: str


@dataclasses.dataclass(frozen=True)
class Spec:
    """The settings of one run. Two runs with equal settings are the same run.

    Attributes:
      setup: the settings that need another program.
      learning_rate: the highest of the schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      frequency: number of steps from one refresh to the next.
      steps: number of steps, over which the schedule goes once.
      seed: of the initial weights and the points.
    """

    setup: Setup
    learning_rate: float
    b1: float
    b2: float
    frequency: int
    steps: int
    seed: int

    @property
    def label(self) -> str:
        """The printed name of the optimizer."""
        return OPTIMIZERS[self.setup.optimizer].label

    @property
    def columns(self) -> dict[str, Any]:
        """All settings in one level, as in a row of the CSV."""
        setup = self.setup._asdict()
        size = setup.pop("size")._asdict()
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return setup | size | numbers

    def but(self, **changes: Any) -> Spec:
        """These settings with some changes, of the fields of `Spec` or of `Setup`."""
        setup = {name: changes.pop(name) for name in Setup._fields if name in changes}
        return dataclasses.replace(self, setup=self.setup._replace(**setup), **changes)
