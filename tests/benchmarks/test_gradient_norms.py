"""The benchmark of gradient norms: what it counts."""

import gradient_norms
import jax
import numpy as np
import pytest
from training import make_model


def test_a_norm_counts_relative_to_the_mean_of_earlier_ones() -> None:
    norms = np.ones(100)
    assert gradient_norms.beyond(norms, 3.0) == (1.0, 0)
    norms[50], norms[70] = 8.0, 2.9
    largest, clipped = gradient_norms.beyond(norms, 3.0)
    assert largest == pytest.approx(8, rel=1e-6)
    assert clipped == 1
    # The first gradient has no mean before it.
    assert gradient_norms.beyond(np.r_[100.0, norms[:50]], 3.0).clipped == 0


@pytest.mark.usefixtures("implicit_promotion")
def test_embedding_and_head_get_adamw() -> None:
    params = jax.eval_shape(lambda: make_model(gradient_norms.SIZE, 0)[0])
    labels = gradient_norms.labels_of_leaves(jax.tree.leaves(params))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    by_shape = dict(zip(shapes, labels, strict=True))
    assert by_shape[256, 32] == by_shape[32, 256] == by_shape[32,] == "adamw"
    assert by_shape[32, 128] == by_shape[128, 32] == "soap"


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion", "optimized_programs")
def test_every_optimizer_has_the_norms_of_all_steps() -> None:
    task = gradient_norms.Task(gradient_norms.SIZE, 10, 4, np.arange(4000) % 200)
    for make in (gradient_norms.soap_adamw, gradient_norms.adamw):
        optimizer = make(gradient_norms.warmed_up(0.01, task.steps))
        first, second = gradient_norms.norms_of(optimizer, task, seeds=(0, 1))
        assert first.shape == second.shape == (task.steps,)
        assert np.all(first > 0)
        assert np.isfinite(first).all()
        assert not np.array_equal(first, second)
