"""Checkpoints of the examples: the arrays and the record of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from soap_optax import check_checkpoint

MAX_TO_KEEP = 2  # the newest checkpoints


class Checkpoints:
    """Saves and restores the checkpoints of one run, in a folder of their own."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=MAX_TO_KEEP, cleanup_tmp_directories=True
        )
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        )

    @property
    def step(self) -> int:
        """The training step of the newest checkpoint, or 0 without a checkpoint."""
        return self.manager.latest_step() or 0

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Copies the arrays, then writes them while training continues."""
        run = ocp.args.JsonSave(record)
        self.manager.save(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), run=run)
        )

    def record(self) -> dict[str, Any]:
        """Returns the record of the newest checkpoint."""
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        return dict(self.manager.restore(self.step, args=args)["run"])

    def arrays(self, like: Any) -> Any:
        """Returns the arrays of the newest checkpoint, with the shapes and shardings of `like`.

        Raises:
          ValueError: the arrays of the checkpoint and of `like` differ.
        """
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        metadata = self.manager.item_metadata(self.step)["arrays"]
        check_checkpoint(metadata.tree, target)
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        return self.manager.restore(self.step, args=args)["arrays"]

    def close(self) -> None:
        """Waits until the last checkpoint is written."""
        self.manager.close()
