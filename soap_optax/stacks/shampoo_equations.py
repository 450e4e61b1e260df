"""The equations of Shampoo, as the code of stacks runs them."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from soap_optax import algorithm
from soap_optax.algorithm import (
    WITH_SECOND_MOMENT,
    Grafting,
    RefreshRule,
    RootRule,
    RootState,
    ShampooHyperparameters,
)
from soap_optax.blocks import Group
from soap_optax.stacks import factors
from soap_optax.stacks.equations import identities, initial_factors
from soap_optax.stacks.storage import StorageOptions, narrower
from soap_optax.state import ScaleByShampooState, ShampooStackState


@dataclass(frozen=True)
class ShampooEquations:
    """The equations of Shampoo; see `Equations`.

    Attributes:
      grafting: the method that gives an update its norm.
    """

    grafting: Grafting | None

    @property
    def state_type(self) -> type[ScaleByShampooState]:
        """See `Equations`."""
        return ScaleByShampooState

    def initial_stack(self, group: Group, storage: StorageOptions) -> ShampooStackState:
        """Zero statistics, and the identity as every root."""
        length, dtype, shape = group.length, group.dtype, (group.length, *group.block)
        return ShampooStackState(
            accepted_gradients=jnp.zeros(length, jnp.int32),
            rejected_gradients=jnp.zeros(length, jnp.int32),
            factors=initial_factors(group, storage),
            mu=jnp.zeros(shape, narrower(storage.mu_dtype, dtype)),
            nu=jnp.zeros(shape, dtype) if self.grafting in WITH_SECOND_MOMENT else (),
            roots=identities(group, storage),
            age=jnp.zeros(length, jnp.int32),
            refreshes=jnp.zeros(length, jnp.int32),
            rejected_refreshes=jnp.zeros(length, jnp.int32),
        )

    def rule(self, hyper: ShampooHyperparameters, rule: RefreshRule) -> RootRule:
        """See `Equations`."""
        del rule
        return RootRule(hyper.factor_eps, hyper.exponent, hyper.shampoo_beta, hyper.correct_bias)

    def fields_of(self, state: ShampooStackState, averaged_gradients: Array) -> RootState:
        """See `Equations`."""
        return RootState(
            state.roots, state.age, state.refreshes, state.rejected_refreshes, averaged_gradients
        )

    def with_fields(self, state: ShampooStackState, fields: RootState) -> ShampooStackState:
        """See `Equations`."""
        changed = fields._asdict()
        del changed["averaged_gradients"]
        return state._replace(**changed)

    def refresh(
        self, fields: RootState, factors: Sequence[Array], axes: Sequence[int], rule: RootRule
    ) -> RootState:
        """See `Equations`."""
        return algorithm.refresh_roots(fields, factors, axes, rule)

    def step(
        self,
        grad: Array,
        accepted: Array,
        state: ShampooStackState,
        axes: Sequence[int],
        hyper: ShampooHyperparameters,
        averages_factors: bool,
    ) -> tuple[Array, ShampooStackState]:
        """See `Equations`."""
        update, new = algorithm.shampoo_step_block(grad, accepted, state, axes, hyper)
        if averages_factors:
            beta = hyper.shampoo_beta
            averages = factors.average_factors(grad, accepted, state, None, axes, beta)
            new = new._replace(factors=averages)
        return update, new
