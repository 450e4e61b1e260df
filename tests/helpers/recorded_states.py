"""States of every kind as this layout version writes them, and the updates that follow.

    python tests/helpers/recorded_states.py

writes tests/golden/states_layout_VERSION.npz. Run it only after `LAYOUT_VERSION` was raised, and
keep the older files: `tests/tools/test_compatibility.py` says what becomes of them.

For each case `c`, the file has `c/state/PATH` for each leaf of the state after `STEPS` updates, and
`c/update/PATH` for each leaf of the next update. Arrays of bfloat16 are stored as uint16 under
`PATH:bfloat16`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(Path(__file__).parents[2]))

import soap_optax
from soap_optax.state import LAYOUT_VERSION

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 5
FREQUENCY = 4  # The update after `STEPS` does not refresh, so it depends on no decomposition.

COMMON: dict[str, Any] = {"precondition_frequency": FREQUENCY}
CASES: dict[str, optax.GradientTransformation] = {
    "soap": soap_optax.soap(1e-2, **COMMON),
    "soap, tiles and one side": soap_optax.soap(1e-2, block_size=4, one_sided=True, **COMMON),
    "soap, least state": soap_optax.soap(
        1e-2,
        factored=True,
        fold_factors=True,
        mu_dtype=jnp.bfloat16,
        preconditioner_dtype=jnp.bfloat16,
        **COMMON,
    ),
    "soap, kl, staggered": soap_optax.soap(1e-2, factor_estimator="kl", stagger=True, **COMMON),
    # Without the dtype, Optax casts numbers to the complex dtype of one parameter.
    "soap, injected": optax.inject_hyperparams(soap_optax.soap, hyperparam_dtype=jnp.float32)(
        learning_rate=1e-2
    ),
    "shampoo": soap_optax.shampoo(1e-2, **COMMON),
    "shampoo, no grafting": soap_optax.shampoo(1e-2, grafting=None, **COMMON),
    "shampoo, kl": soap_optax.shampoo(1e-2, factor_estimator="kl", **COMMON),
    "soap_adamw": soap_optax.soap_adamw(1e-2, **COMMON),
    "hyperball": optax.chain(soap_optax.scale_by_soap(**COMMON), soap_optax.hyperball(1e-2)),
}


def params() -> dict[str, Any]:
    """A matrix, a stack of matrices, an embedding, a complex matrix and a vector."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "dense": {"kernel": draw(6, 4), "bias": draw(4)},
        "layers": {"kernel": draw(2, 3, 5), "bias": draw(2, 5)},
        "embed": {"embedding": draw(8, 4)},
        "phase": jax.lax.complex(draw(4, 3), draw(4, 3)),
    }


def grads(step: int) -> Any:
    """Gradients of whole numbers, which are the same on every machine."""
    rng = np.random.default_rng(step + 1)

    def draw(leaf: jax.Array) -> jax.Array:
        real, imaginary = (rng.integers(-4, 5, leaf.shape).astype(np.float32) for _ in range(2))
        return jnp.asarray(real + 1j * imaginary if jnp.iscomplexobj(leaf) else real, leaf.dtype)

    return jax.tree.map(draw, params())


def by_path(tree: Any) -> dict[str, jax.Array]:
    """The leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def stored(path: str, array: jax.Array) -> tuple[str, np.ndarray]:
    """The name and the array under which NumPy stores an array."""
    if array.dtype == jnp.bfloat16:
        return f"{path}:bfloat16", np.asarray(array).view(np.uint16)
    return path, np.asarray(array)


def restored(path: str, array: np.ndarray) -> tuple[str, jax.Array]:
    """The inverse of `stored`."""
    name, _, dtype = path.partition(":")
    return name, jnp.asarray(array.view(jnp.bfloat16) if dtype else array)


def part_of(file: Mapping[str, np.ndarray], case: str, part: str) -> dict[str, jax.Array]:
    """The recorded state or update of a case, by path."""
    start = f"{case}/{part}/"
    found = (restored(name, file[name]) for name in file if name.startswith(start))
    return {path.removeprefix(start): array for path, array in found}


def record() -> Path:
    """Writes the file of this layout version."""
    arrays: dict[str, np.ndarray] = {}
    for case, optimizer in CASES.items():
        state, update = optimizer.init(params()), jax.jit(optimizer.update)
        for step in range(STEPS):
            _, state = update(grads(step), state, params())
        updates, _ = update(grads(STEPS), state, params())
        for part, tree in (("state", state), ("update", updates)):
            leaves = by_path(tree).items()
            arrays |= dict(stored(f"{case}/{part}/{path}", leaf) for path, leaf in leaves)
    path = GOLDEN / f"states_layout_{LAYOUT_VERSION}.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]  # names are arrays'
    return path


if __name__ == "__main__":
    print(record())
