"""Which equations the blocks of a stack follow: an interface, and its implementation for SOAP.

SOAP and Shampoo share everything else: the timing of refreshes, the loop over blocks, the checks of
gradients, and meshes. `soap_optax.stacks.shampoo_equations` has Shampoo's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

from soap_optax import algorithm
from soap_optax.algorithm import (
    INITIAL_EIGENVALUE,
    EigenbasisState,
    FirstGradient,
    Hyperparameters,
    RefreshRule,
)
from soap_optax.blocks import Group
from soap_optax.linalg import folded_shape
from soap_optax.stacks import factors
from soap_optax.stacks.storage import StorageOptions, narrower
from soap_optax.state import ScaleBySoapState, StackState


class Equations(Protocol):
    """The equations of a block, and the fields of the state that they read and change.

    Objects are hashable, so that `jax.jit` can take them as static arguments.
    """

    @property
    def state_type(self) -> Any:
        """The NamedTuple of the optimizer's state."""
        ...

    def initial_stack(self, group: Group, storage: StorageOptions) -> Any:
        """The state of a stack before the first gradient."""
        ...

    def first_gradients(self, grads: Array, state: Any, hyper: Any) -> FirstGradient | None:
        """The gradients of a stack if the first ones make an update, otherwise None."""
        ...

    def rule(self, hyper: Any, rule: RefreshRule) -> Any:
        """How a block is refreshed, as `refresh` takes it."""
        ...

    def fields_of(self, state: Any, averaged_gradients: Array) -> Any:
        """The fields of a stack that a refresh reads and changes, as a NamedTuple.

        Args:
          state: the state of the stack.
          averaged_gradients: the number of gradients in the factors of each block, `(blocks,)`.
        """
        ...

    def with_fields(self, state: Any, fields: Any) -> Any:
        """The state of a stack with the fields after a refresh."""
        ...

    def refresh(
        self,
        fields: Any,
        factors: Sequence[Array],
        axes: Sequence[int],
        rule: Any,
        first: FirstGradient | None,
    ) -> Any:
        """Refreshes one block from its factors, `(d, d)`, in the dtype of the statistics."""
        ...

    def step(
        self,
        grad: Array,
        accepted: Array,
        state: Any,
        axes: Sequence[int],
        hyper: Any,
        averages_factors: bool,
    ) -> tuple[Array, Any]:
        """Takes a step with one block; also averages its factors if `averages_factors`."""
        ...


@dataclass(frozen=True)
class SoapEquations:
    """The equations of SOAP; see `Equations`."""

    @property
    def state_type(self) -> type[ScaleBySoapState]:
        """See `Equations`."""
        return ScaleBySoapState

    def initial_stack(self, group: Group, storage: StorageOptions) -> StackState:
        """Zero statistics, and the identity as every basis."""
        length, dtype = group.length, group.dtype
        if storage.factored:
            nu = tuple(jnp.zeros((length, d), dtype) for d in group.block)
        else:
            nu = jnp.zeros((length, *group.block), dtype)
        return StackState(
            accepted_gradients=jnp.zeros(length, jnp.int32),
            rejected_gradients=jnp.zeros(length, jnp.int32),
            factors=initial_factors(group, storage),
            mu=jnp.zeros((length, *group.block), narrower(storage.mu_dtype, dtype)),
            nu=nu,
            bases=identities(group, storage),
            age=jnp.zeros(length, jnp.int32),
            refreshes=jnp.zeros(length, jnp.int32),
            rejected_refreshes=jnp.zeros(length, jnp.int32),
            eigenvalues=initial_eigenvalues(group, storage),
        )

    def first_gradients(
        self, grads: Array, state: StackState, hyper: Hyperparameters
    ) -> FirstGradient | None:
        """See `Equations`."""
        if hyper.first_update == "zero":
            return None
        return FirstGradient(grads, state.accepted_gradients == 0, hyper)

    def rule(self, hyper: Hyperparameters, rule: RefreshRule) -> RefreshRule:
        """See `Equations`."""
        del hyper
        return rule

    def fields_of(self, state: StackState, averaged_gradients: Array) -> EigenbasisState:
        """See `Equations`."""
        del averaged_gradients
        return EigenbasisState(**{name: getattr(state, name) for name in EigenbasisState._fields})

    def with_fields(self, state: StackState, fields: EigenbasisState) -> StackState:
        """See `Equations`."""
        return state._replace(**fields._asdict())

    def refresh(
        self,
        fields: EigenbasisState,
        factors: Sequence[Array],
        axes: Sequence[int],
        rule: RefreshRule,
        first: FirstGradient | None,
    ) -> EigenbasisState:
        """See `Equations`."""
        return algorithm.refresh(fields, factors, axes, rule, first)

    def step(
        self,
        grad: Array,
        accepted: Array,
        state: StackState,
        axes: Sequence[int],
        hyper: Hyperparameters,
        averages_factors: bool,
    ) -> tuple[Array, StackState]:
        """See `Equations`."""
        beta = hyper.shampoo_beta
        rotated = factors.rotations(grad, state, axes, hyper.precision)
        by_others, whole = rotated or (None, None)
        update, new = algorithm.step_block(grad, accepted, state, axes, hyper, whole)
        if averages_factors:
            entering = accepted
            if hyper.first_update == "apply":  # The first gradient is in the factors already.
                entering &= state.accepted_gradients > 0
            averages = factors.average_factors(grad, entering, state, by_others, axes, beta)
            new = new._replace(factors=averages)
        applied = accepted & (algorithm.update_number(state.accepted_gradients, hyper) > 0)
        eigenvalues = factors.average_eigenvalues(applied, state, rotated, axes, beta)
        return update, new._replace(eigenvalues=eigenvalues)


SOAP = SoapEquations()


def initial_factors(group: Group, storage: StorageOptions) -> tuple[Array, ...]:
    """Factors of zeros, folded or not."""
    narrow = narrower(storage.preconditioner_dtype, group.dtype)
    lengths = [group.block[axis] for axis in group.axes]
    shapes = [folded_shape(d) if storage.fold_factors else (d, d) for d in lengths]
    return tuple(jnp.zeros((group.length, *shape), narrow) for shape in shapes)


def identities(group: Group, storage: StorageOptions) -> tuple[Array, ...]:
    """The identity for each preconditioned axis."""
    narrow = narrower(storage.preconditioner_dtype, group.dtype)
    lengths = [group.block[axis] for axis in group.axes]
    return tuple(jnp.tile(jnp.eye(d, dtype=narrow), (group.length, 1, 1)) for d in lengths)


def initial_eigenvalues(group: Group, storage: StorageOptions) -> tuple[Array, ...]:
    """The estimates of KL factors before the first gradient; none without KL factors."""
    if storage.factor_estimator != "kl":
        return ()
    lengths = [group.block[axis] for axis in group.axes]
    return tuple(jnp.full((group.length, d), INITIAL_EIGENVALUE, group.dtype) for d in lengths)
