"""The optimizer `shampoo`: `scale_by_shampoo`, weight decay and the learning rate."""

from collections.abc import Callable
from typing import Any

import optax
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from soap_optax import arguments
from soap_optax.algorithm import FactorEstimator, Grafting, RefreshMethod
from soap_optax.chain import add_weight_decay
from soap_optax.schedules import Frequency
from soap_optax.shampoo_transform import scale_by_shampoo
from soap_optax.stacks import RefreshOrder

SHAMPOO_STATIC_ARGS = (
    "mask",
    "grafting",
    "max_precond_dim",
    "precondition_1d",
    "merge_dims",
    "correct_bias",
    "mu_dtype",
    "block_size",
    "dimension_numbers",
    "stack_sharding",
    "stack_multiple",
    "param_shardings",
    "refresh",
    "refresh_order",
    "stagger",
    "one_sided",
    "preconditioner_dtype",
    "fold_factors",
    "factor_estimator",
    "precision",
)
"""Arguments of `shampoo` that must not be traced, for `optax.inject_hyperparams(static_args=...)`.

Their defaults need no `static_args`. `scale_by_shampoo` has no `mask`, the first entry: pass
`SHAMPOO_STATIC_ARGS[1:]` there.
"""


def shampoo(  # noqa: D417  # `scale_by_shampoo` documents the other arguments.
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    exponent: ArrayLike | None = None,
    grafting: Grafting | None = "adam",
    shampoo_beta: ArrayLike | None = None,
    precondition_frequency: Frequency = 10,
    grafting_eps: ArrayLike = 1e-8,
    max_precond_dim: int | None = None,
    precondition_1d: bool = False,
    merge_dims: bool = False,
    correct_bias: bool = True,
    mu_dtype: DTypeLike | None = None,
    block_size: int | None = None,
    dimension_numbers: Any | Callable[[Any], Any] | None = None,
    stack_sharding: NamedSharding | None = None,
    stack_multiple: int | None = None,
    param_shardings: Any | Callable[[Any], Any] | None = None,
    refresh: RefreshMethod = "eigh",
    refresh_order: RefreshOrder = "after_gradient",
    stagger: bool = False,
    one_sided: bool = False,
    preconditioner_dtype: DTypeLike | None = None,
    fold_factors: bool = False,
    factor_estimator: FactorEstimator = "gram",
    precision: PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo with decoupled weight decay: inverse roots of the gradients' Kronecker factors.

    `scale_by_shampoo`, then weight decay as in `optax.adamw`, then the learning rate:

    .. math::

      \theta_t = \theta_{t-1} - \alpha_t (N_t + \lambda \theta_{t-1})

    With ``grafting="adam"``, learning rates of AdamW are a good start.

    Example:
      >>> import jax, jax.numpy as jnp, optax, soap_optax
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     soap_optax.shampoo(optax.cosine_decay_schedule(3e-3, 1000), exponent=1 / 2.5),
      ... )
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> state = optimizer.init(params)
      >>> loss = lambda p: jnp.sum((jnp.ones(4) @ p["kernel"] + p["bias"]) ** 2)
      >>> for _ in range(5):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 48.0)
      True

    Args:
      learning_rate: a number or a schedule.
      weight_decay: strength of the decoupled weight decay, a number, or a schedule if the installed
        Optax takes one.
      mask: the parameters to decay: a tree of booleans with the structure of the parameters or a
        prefix of it, or a function of the parameters that returns one. None decays all.

    All other arguments are those of `scale_by_shampoo`.

    Returns:
      A transformation. Its `update` needs the parameters, unless ``weight_decay`` is the number 0.

    Raises:
      TypeError, ValueError: when built, at ``init`` and at ``update``, as `scale_by_shampoo` does;
        at ``update`` also if the parameters are missing.

    References:
      Gupta et al., `Shampoo: Preconditioned Stochastic Tensor Optimization
      <https://arxiv.org/abs/1802.09568>`_, 2018
    """
    arguments.check_alias(learning_rate=learning_rate, weight_decay=weight_decay, mask=mask)
    return optax.chain(
        scale_by_shampoo(
            b1,
            b2,
            eps,
            exponent=exponent,
            grafting=grafting,
            shampoo_beta=shampoo_beta,
            precondition_frequency=precondition_frequency,
            grafting_eps=grafting_eps,
            max_precond_dim=max_precond_dim,
            precondition_1d=precondition_1d,
            merge_dims=merge_dims,
            correct_bias=correct_bias,
            mu_dtype=mu_dtype,
            block_size=block_size,
            dimension_numbers=dimension_numbers,
            stack_sharding=stack_sharding,
            stack_multiple=stack_multiple,
            param_shardings=param_shardings,
            refresh=refresh,
            refresh_order=refresh_order,
            stagger=stagger,
            one_sided=one_sided,
            preconditioner_dtype=preconditioner_dtype,
            fold_factors=fold_factors,
            factor_estimator=factor_estimator,
            precision=precision,
        ),
        add_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
