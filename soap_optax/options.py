"""The arguments of `scale_by_soap` and `scale_by_shampoo`, grouped for the wings."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from soap_optax import blocks, devices, stacks
from soap_optax.algorithm import (
    FactorEstimator,
    FirstUpdate,
    Grafting,
    Hyperparameters,
    RefreshMethod,
    RefreshRule,
    ShampooHyperparameters,
)
from soap_optax.blocks import BlockOptions
from soap_optax.devices import Layout
from soap_optax.schedules import Frequency, frequency_at
from soap_optax.stacks import (
    SOAP,
    Equations,
    RefreshOrder,
    RefreshTiming,
    ShampooEquations,
    StepSettings,
    StorageOptions,
)
from soap_optax.state import PreconditionerState


@dataclass(frozen=True)
class Structure:
    """Static arguments of a transformation that decide shapes, dtypes and shardings of the state.

    Its methods plan a tree, make its first state, and check a later state against that.
    """

    block_options: BlockOptions
    dimension_numbers: Any
    storage: StorageOptions
    stack_sharding: NamedSharding | None
    stack_multiple: int | None
    param_shardings: Any
    equations: Equations = SOAP

    def layout_of(self, tree: Any, statistics: Sequence[DTypeLike] | None = None) -> Layout:
        """The plan of parameters or gradients and their layout on devices, checked.

        `statistics` are the dtypes of the leaves' statistics; None means that their own decide.
        """
        multiple = self.stack_multiple or devices.shard_count(self.stack_sharding)
        plan = blocks.plan_of(
            tree, self.block_options, self.dimension_numbers, multiple, statistics
        )
        return devices.layout_of(tree, plan, self.stack_sharding, self.param_shardings)

    def initial_state(
        self, layout: Layout, leaves: Sequence[ArrayLike] = ()
    ) -> PreconditionerState:
        """The state before the first gradient."""
        return stacks.initial_state(layout.plan, self.equations, self.storage, leaves)

    def placeholder_state(self) -> PreconditionerState:
        """See `stacks.placeholder_state`."""
        return stacks.placeholder_state(self.equations)

    def check_state(self, state: Any, layout: Layout) -> PreconditionerState:
        """Returns the state, or raises if `init` would make another one for this layout."""
        return blocks.check_state(state, jax.eval_shape(lambda: self.initial_state(layout)))


@dataclass(frozen=True)
class StepOptions:
    """Arguments of `scale_by_soap` that decide a step; the numbers may be traced."""

    b1: ArrayLike
    b2: ArrayLike
    shampoo_beta: ArrayLike | None
    eps: ArrayLike
    normalize_grads: bool
    correct_bias: bool
    first_update: FirstUpdate
    precision: PrecisionLike
    frequency: Frequency
    refresh_order: RefreshOrder
    stagger: bool
    refresh: RefreshMethod
    refresh_tolerance: ArrayLike | None

    def settings_at(self, count: Array, dtypes: set[str]) -> StepSettings:
        """The numbers of the step after `count` calls of `update`, for these dtypes."""
        hyper = {dtype: self._hyper_in(dtype) for dtype in dtypes}
        # With "zero", the first call applies no update.
        updates = count if self.first_update == "apply" else jnp.maximum(count - 1, 0)
        frequency = frequency_at(self.frequency, updates)
        tolerance = self.refresh_tolerance
        tolerance = None if tolerance is None else jnp.asarray(tolerance)
        timing = RefreshTiming(frequency, self.refresh_order, self.stagger)
        return StepSettings(timing, RefreshRule(tolerance, self.refresh), hyper, self.equations)

    @property
    def equations(self) -> Equations:
        """The equations of the blocks."""
        return SOAP

    def _hyper_in(self, dtype: str) -> Hyperparameters:
        shampoo_beta = self.b2 if self.shampoo_beta is None else self.shampoo_beta
        return Hyperparameters(
            b1=jnp.asarray(self.b1, dtype),
            b2=jnp.asarray(self.b2, dtype),
            shampoo_beta=jnp.asarray(shampoo_beta, dtype),
            eps=jnp.asarray(self.eps, dtype),
            normalize_grads=self.normalize_grads,
            correct_bias=self.correct_bias,
            first_update=self.first_update,
            precision=self.precision,
        )


@dataclass(frozen=True)
class ShampooStepOptions(StepOptions):
    """Arguments of `scale_by_shampoo` that decide a step; `eps` is its `grafting_eps`."""

    factor_eps: ArrayLike
    exponent: ArrayLike | None
    grafting: Grafting | None
    factor_estimator: FactorEstimator

    @property
    def equations(self) -> Equations:
        """The equations of the blocks."""
        return ShampooEquations(self.grafting, self.factor_estimator)

    def _hyper_in(self, dtype: str) -> ShampooHyperparameters:
        shared = super()._hyper_in(dtype)
        return ShampooHyperparameters(
            **{field.name: getattr(shared, field.name) for field in fields(shared)},
            factor_eps=jnp.asarray(self.factor_eps, dtype),
            exponent=None if self.exponent is None else jnp.asarray(self.exponent, dtype),
            grafting=self.grafting,
        )
