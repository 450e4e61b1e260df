"""What `pretrain_lm.py` and `compare_optimizers.py` share: the text, clipping and the schedule."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax
from byte_gpt import files_in, read_text, standard_library

CLIP_NORM = 1.0
HELD_OUT_FRACTION = 0.1
HELD_OUT_BATCHES = (8, 64)  # batches, windows in each, for every --batch-size


class Text(NamedTuple):
    """The tokens for training and for evaluation. The tokens of a text are its bytes."""

    training: np.ndarray
    held_out: np.ndarray
    description: str


def load_text(parser: argparse.ArgumentParser, data: Sequence[Path] | None, context: int) -> Text:
    """Reads the text and holds out its last tenth.

    Args:
      parser: exits with an error if a file cannot be read or the text is too short.
      data: files and folders, or None for Python's standard library.
      context: the number of bytes in a window.
    """
    source = ", ".join(map(str, data or ["Python's standard library"]))
    try:
        files = [file for path in data for file in files_in(path)] if data else standard_library()
        text = read_text(files)
    except OSError as error:
        parser.error(f"argument --data: cannot read {error.filename}: {error.strerror}")
    held_out = int(len(text) * HELD_OUT_FRACTION)
    if held_out <= context:
        parser.error(
            f"argument --data: {source} has {len(text)} bytes in {len(files)} files; a tenth is "
            f"held out and must be longer than the context, {context}"
        )
    description = (
        f"{source}: {len(files)} files, {len(text):,} bytes, the last {held_out:,} held out"
    )
    return Text(text[:-held_out], text[-held_out:], description)


def warmed_up(learning_rate: float, steps: int) -> optax.Schedule:
    """Returns a schedule: linear warmup for a tenth of the steps, then cosine decay."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=steps // 10,
        decay_steps=steps,
        end_value=learning_rate / 10,
    )
