"""Refreshes end on any machine: see `soap_optax.linalg.decompositions` on conditionals.

A process cannot catch its own hang. A hang depends on the number of threads that the runtime and
BLAS start. The refreshes therefore run in a new process, as a user would start it: no variable
changes the number of threads.
"""

import os
import pathlib
import subprocess
import sys

import pytest
from helpers.cases import named

# Each process takes some ten seconds, most of them to compile. Only a process that hangs reaches
# the limit, on a busy machine too.
LIMIT_IN_SECONDS = 480

# These variables change the number of threads, or how programs are compiled.
VARIABLES = (
    *("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "XLA_FLAGS", "NPROC"),
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
)

PRELUDE = """
import jax
import jax.numpy as jnp
import numpy as np
import soap_optax

def draw(tree, steps):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=(steps, *shape)), jnp.float32)
        for name, shape in tree.items()
    }

def finish(state, refreshes):
    state = jax.block_until_ready(state)
    for name, stack in state.stacks.items():
        assert (stack.refreshes == refreshes).all(), (name, stack.refreshes)
        print(name, "refreshed", refreshes, "times", flush=True)

def step_by_step(tree, steps, **options):
    optimizer = soap_optax.scale_by_soap(precondition_frequency=1, **options)
    grads = draw(tree, steps)
    state = optimizer.init(jax.tree.map(lambda leaf: leaf[0], grads))
    update = jax.jit(optimizer.update)
    for step in range(steps):
        _, state = update(jax.tree.map(lambda leaf: leaf[step], grads), state)
    finish(state, steps - 1)

def scanned(tree, steps, seeds=None, **options):
    optimizer = soap_optax.scale_by_soap(precondition_frequency=1, **options)

    def train(grads):
        state = optimizer.init(jax.tree.map(lambda leaf: leaf[0], grads))
        step = lambda state, grad: (optimizer.update(grad, state)[1], None)
        return jax.lax.scan(step, state, grads)[0]

    grads = draw(tree, steps)
    if seeds is not None:
        grads = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), grads)
        train = jax.vmap(train)
    finish(jax.jit(train)(grads), steps - 1)
"""

# These are sizes that hung. With jaxlib 0.10 on two cores, refreshes that decompose eight matrices
# of 96x96 or 128x128 in one batch hung in about every second run. Smaller matrices never hung.
CASES = {
    "jitted steps": """
step_by_step({"a large matrix": (256, 256)}, steps=3)  # With threads, a second each on two cores.
step_by_step({f"matrix {index} of eight": (128, 128) for index in range(8)}, steps=8)
step_by_step(
    {"matrix in tiles": (64, 48), "three dimensions": (12, 20, 8), "vector in tiles": (64,)},
    steps=60,
    precondition_1d=True,
    block_size=32,
)
""",
    "scan and vmap": """
scanned({"first": (64, 48), "second": (64, 48)}, steps=50)
scanned({"matrix": (96, 96)}, steps=10, seeds=8)
""",
}


@pytest.mark.long
@pytest.mark.parametrize("case", named(CASES))
def test_every_refresh_ends(case: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    repository = pathlib.Path(__file__).parents[2]
    inherited = environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repository), inherited]))
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + case],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_IN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"still running after {LIMIT_IN_SECONDS} s:\n{output}")
    assert process.returncode == 0, output
