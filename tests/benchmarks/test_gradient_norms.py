"""The benchmark of gradient norms: what it counts."""

import gradient_norms
import numpy as np
import pytest


def test_a_norm_counts_relative_to_the_mean_of_earlier_ones() -> None:
    norms = np.ones(100)
    assert gradient_norms.beyond(norms, 3.0) == (1.0, 0)
    norms[50], norms[70] = 8.0, 2.9
    largest, clipped = gradient_norms.beyond(norms, 3.0)
    assert largest == pytest.approx(8, rel=1e-6)
    assert clipped == 1
    # The first gradient has no mean before it.
    assert gradient_norms.beyond(np.r_[100.0, norms[:50]], 3.0).clipped == 0


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion", "optimized_programs")
def test_it_counts_for_every_optimizer() -> None:
    task = gradient_norms.Task(gradient_norms.Size(1, 16, 2, 16), 20, 4, np.arange(4000) % 200)
    rows = gradient_norms.table_of(task, seeds=(0,)).splitlines()[2:]
    assert len(rows) == len(gradient_norms.RUNS)
    for row in rows:
        largest, clipped = (float(cell) for cell in row.strip("| ").split(" | ")[2:])
        assert largest > 0.5
        assert clipped == 0 or largest > gradient_norms.LIMIT
