"""Checkpoints of `pretrain_lm.py`: the arrays of a run, and what it has recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from reports import Row, Run

from soap_optax import check_checkpoint

KEPT = 2  # the newest ones


class Checkpoints:
    """The checkpoints of one run, in a folder of their own."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        )

    @property
    def step(self) -> int:
        """How many steps the newest one has behind it; 0 where there is none."""
        return self.manager.latest_step() or 0

    def save(self, step: int, arrays: Any, run: Run) -> None:
        """Copies the arrays and writes them while training goes on."""
        record = ocp.args.JsonSave(dataclasses.asdict(run))
        self.manager.save(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), run=record)
        )

    def run(self) -> Run:
        """What the newest one has recorded."""
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        record: dict[str, Any] = dict(self.manager.restore(self.step, args=args)["run"])
        record["rows"] = [Row(*row) for row in record["rows"]]
        return Run(**record)

    def arrays(self, like: Any) -> Any:
        """The arrays of the newest one, in the shapes of others and where those lie.

        Raises:
          ValueError: the newest one has other arrays.
        """
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        metadata = self.manager.item_metadata(self.step)["arrays"]
        check_checkpoint(metadata.tree, target)
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        return self.manager.restore(self.step, args=args)["arrays"]

    def close(self) -> None:
        """Waits for what is being written."""
        self.manager.close()
