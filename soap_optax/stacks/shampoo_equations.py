"""The equations of Shampoo, as the code of stacks runs them."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from soap_optax import algorithm
from soap_optax.algorithm import (
    WITH_SECOND_MOMENT,
    EigenbasisState,
    FactorEstimator,
    FirstGradient,
    Grafting,
    RefreshRule,
    RootRule,
    RootState,
    ShampooHyperparameters,
)
from soap_optax.blocks import Group
from soap_optax.stacks import factors
from soap_optax.stacks.equations import identities, initial_eigenvalues, initial_factors
from soap_optax.stacks.storage import StorageOptions, narrower
from soap_optax.state import ScaleByShampooState, ShampooStackState


@dataclass(frozen=True)
class ShampooEquations:
    """The equations of Shampoo; see `Equations`.

    Attributes:
      grafting: the method that gives an update its norm.
      factor_estimator: which matrix a gradient adds to a factor. KL factors have eigenvectors and
        estimates of eigenvalues in place of roots.
    """

    grafting: Grafting | None
    factor_estimator: FactorEstimator

    @property
    def state_type(self) -> type[ScaleByShampooState]:
        """See `Equations`."""
        return ScaleByShampooState

    def initial_stack(self, group: Group, storage: StorageOptions) -> ShampooStackState:
        """Zero statistics, and the identity as every root or basis."""
        length, dtype, shape = group.length, group.dtype, (group.length, *group.block)
        return ShampooStackState(
            accepted_gradients=jnp.zeros(length, jnp.int32),
            rejected_gradients=jnp.zeros(length, jnp.int32),
            factors=initial_factors(group, storage),
            mu=jnp.zeros(shape, narrower(storage.mu_dtype, dtype)),
            nu=jnp.zeros(shape, dtype) if self.grafting in WITH_SECOND_MOMENT else (),
            roots=() if self._has_bases else identities(group, storage),
            age=jnp.zeros(length, jnp.int32),
            refreshes=jnp.zeros(length, jnp.int32),
            rejected_refreshes=jnp.zeros(length, jnp.int32),
            bases=identities(group, storage) if self._has_bases else (),
            eigenvalues=initial_eigenvalues(group, storage),
        )

    @property
    def _has_bases(self) -> bool:
        return self.factor_estimator == "kl"

    def first_gradients(
        self, grads: Array, state: ShampooStackState, hyper: ShampooHyperparameters
    ) -> None:
        """See `Equations`: the first update is zero."""
        del grads, state, hyper

    def rule(self, hyper: ShampooHyperparameters, rule: RefreshRule) -> RefreshRule | RootRule:
        """See `Equations`."""
        if self._has_bases:
            return rule
        return RootRule(hyper.factor_eps, hyper.exponent, hyper.shampoo_beta, hyper.correct_bias)

    def fields_of(
        self, state: ShampooStackState, averaged_gradients: Array
    ) -> EigenbasisState | RootState:
        """See `Equations`."""
        if self._has_bases:
            # No moment is in the bases' coordinates: a refresh gets moments of size zero.
            nothing = state.mu[..., None][..., :0]
            return EigenbasisState(
                state.bases,
                nothing,
                nothing,
                state.age,
                state.refreshes,
                state.rejected_refreshes,
                state.eigenvalues,
            )
        return RootState(
            state.roots, state.age, state.refreshes, state.rejected_refreshes, averaged_gradients
        )

    def with_fields(
        self, state: ShampooStackState, fields: EigenbasisState | RootState
    ) -> ShampooStackState:
        """See `Equations`."""
        not_in_state = {"mu", "nu", "averaged_gradients"}
        changed = {
            name: value for name, value in fields._asdict().items() if name not in not_in_state
        }
        return state._replace(**changed)

    def refresh(
        self,
        fields: EigenbasisState | RootState,
        factors: Sequence[Array],
        axes: Sequence[int],
        rule: RefreshRule | RootRule,
        first: FirstGradient | None,
    ) -> EigenbasisState | RootState:
        """See `Equations`. A block with a factor of zeros stays as it is, and stays due.

        Roots of zeros would be huge: `eps` to the power of `-p`. The block may be behind a matrix
        of zeros, so that its first gradients are zero.
        """
        del first

        def refresh(
            fields: EigenbasisState | RootState, factors: Sequence[Array]
        ) -> EigenbasisState | RootState:
            if isinstance(rule, RefreshRule):
                assert isinstance(fields, EigenbasisState)
                return algorithm.refresh(fields, factors, axes, rule)
            assert isinstance(fields, RootState)
            return algorithm.refresh_roots(fields, factors, axes, rule)

        has_zeros = algorithm.any_of_zeros(factors)
        return lax.cond(has_zeros, lambda fields, _factors: fields, refresh, fields, factors)

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
        beta = hyper.shampoo_beta
        rotated = factors.rotations(grad, state, axes, hyper.precision)
        applied = accepted & (state.refreshes > 0)  # The first refresh needs an earlier gradient.
        eigenvalues = factors.average_eigenvalues(applied, state, rotated, axes, beta)
        updated = state._replace(eigenvalues=eigenvalues)
        update, new = algorithm.shampoo_step_block(grad, accepted, updated, axes, hyper)
        if averages_factors:
            by_others = None if rotated is None else rotated.by_others
            averages = factors.average_factors(grad, accepted, state, by_others, axes, beta)
            new = new._replace(factors=averages)
        return update, new
