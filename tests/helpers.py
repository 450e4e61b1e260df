"""What more than one test module needs."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import soap_optax
from soap_optax.linalg import triangle

_GOLDEN = pathlib.Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One recorded run of the authors' code; see ``golden/README.md``."""

    name: str
    learning_rate: float
    options: dict[str, Any]  # The keyword arguments of `scale_by_soap`.
    initial_basis_is_unique: bool
    grads: np.ndarray  # (steps, *shape)
    init: np.ndarray  # shape
    params: np.ndarray  # (steps, *shape)
    initial_bases: dict[int, np.ndarray]  # axis: (d, d)


def load_trajectories() -> list[Trajectory]:
    """All recorded cases, with options under this library's names."""
    cases = json.loads((_GOLDEN / "official_float64.json").read_text())
    with np.load(_GOLDEN / "official_float64.npz") as archive:
        arrays = dict(archive)
    return [_trajectory(name, case, arrays) for name, case in cases.items()]


def _trajectory(name: str, case: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trajectory:
    same_name = (
        "eps",
        "precondition_frequency",
        "max_precond_dim",
        "precondition_1d",
        "merge_dims",
        "normalize_grads",
        "correct_bias",
    )
    b1, b2 = case["betas"]
    shampoo_beta = None if case["shampoo_beta"] == -1 else case["shampoo_beta"]
    bases = {
        axis: arrays[f"{name}/initial_basis_{axis}"]
        for axis in range(len(case["shape"]))
        if f"{name}/initial_basis_{axis}" in arrays
    }
    return Trajectory(
        name=name,
        learning_rate=case["lr"],
        options={
            "b1": b1,
            "b2": b2,
            "shampoo_beta": shampoo_beta,
            **{key: case[key] for key in same_name},
        },
        initial_basis_is_unique=case["initial_basis_is_unique"],
        grads=arrays[f"{name}/grads"],
        init=arrays[f"{name}/init"],
        params=arrays[f"{name}/params"],
        initial_bases=bases,
    )


def put_bases(state: Any, bases: Sequence[np.ndarray]) -> Any:
    """Puts bases, one for each preconditioned axis, into the one stack of an optimizer's state."""

    def put(soap_state: soap_optax.ScaleBySoapState) -> soap_optax.ScaleBySoapState:
        ((name, stack),) = soap_state.stacks.items()
        stack = stack._replace(
            bases=tuple(
                jnp.asarray(basis, old.dtype)[None]
                for basis, old in zip(bases, stack.bases, strict=True)
            ),
            refreshes=jnp.ones_like(stack.refreshes),  # Else the next call computes a first basis.
        )
        return soap_state._replace(stacks={name: stack})

    return map_soap_state(put, state)


def map_soap_state(
    function: Callable[[soap_optax.ScaleBySoapState], soap_optax.ScaleBySoapState], state: Any
) -> Any:
    """Applies a function to every `ScaleBySoapState` inside an optimizer's state."""

    def is_soap_state(node: Any) -> bool:
        return isinstance(node, soap_optax.ScaleBySoapState)

    return jax.tree.map(
        lambda node: function(node) if is_soap_state(node) else node, state, is_leaf=is_soap_state
    )


def full_rank_factor(length: int) -> np.ndarray:
    """A factor to begin from that has no null space and no two equal eigenvalues."""
    return np.diag(np.linspace(1.0, 2.0, length))


def put_full_rank_factors(state: Any) -> Any:
    """Puts `full_rank_factor` into every stack of an optimizer's state."""

    def fill(factor: jax.Array, basis: jax.Array) -> jax.Array:
        full = jnp.asarray(full_rank_factor(basis.shape[-1]), factor.dtype)
        stored = full if factor.shape == basis.shape else triangle.fold(full)
        return jnp.broadcast_to(stored, factor.shape)

    def put(soap_state: soap_optax.ScaleBySoapState) -> soap_optax.ScaleBySoapState:
        stacks = {
            name: stack._replace(factors=tuple(map(fill, stack.factors, stack.bases)))
            for name, stack in soap_state.stacks.items()
        }
        return soap_state._replace(stacks=stacks)

    return map_soap_state(put, state)
