"""The line that each script prints, and `run.py` reads."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping

MARK = "PROGRAM "


def print_result(
    package: str,
    losses: Mapping[str, float],
    *,
    tolerance: float = 0.0,
    checkpoint: str = "none",
    usual: str = "adam",
    soap: str = "soap",
) -> None:
    """Prints one line of JSON, and raises unless SOAP's loss is finite and low enough.

    Args:
      package: name of the program on the package index, for its version.
      losses: the last loss of each run, by the name of the run.
      tolerance: how much higher SOAP's loss may be, in units of the loss.
      checkpoint: what was saved, restored and compared; "none" if the program saves nothing.
      usual: the run with the program's usual optimizer.
      soap: the run that is compared to it.
    """
    losses = {name: float(loss) for name, loss in losses.items()}
    versions = {name: importlib.metadata.version(name) for name in (package, "jax", "optax")}
    line = {
        "package": package,
        "versions": versions,
        "python": platform.python_version(),
        "losses": losses,
        "usual": usual,
        "soap": soap,
        "tolerance": tolerance,
        "checkpoint": checkpoint,
    }
    print(MARK + json.dumps(line), flush=True)
    assert all(map(math.isfinite, losses.values())), losses
    assert losses[soap] <= losses[usual] + tolerance, losses
