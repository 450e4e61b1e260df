"""The optimizer `soap`: `scale_by_soap`, weight decay and the learning rate."""

from collections.abc import Callable
from typing import Any

import optax
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from soap_optax import arguments
from soap_optax.algorithm import FactorEstimator, FirstUpdate, RefreshMethod
from soap_optax.chain import add_weight_decay
from soap_optax.schedules import Frequency
from soap_optax.stacks import RefreshOrder
from soap_optax.transform import scale_by_soap

STATIC_ARGS = (
    "mask",
    "max_precond_dim",
    "precondition_1d",
    "merge_dims",
    "normalize_grads",
    "correct_bias",
    "first_update",
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
    "factored",
    "preconditioner_dtype",
    "fold_factors",
    "factor_estimator",
    "precision",
)
"""Arguments of `soap` that must not be traced, for `optax.inject_hyperparams(static_args=...)`.

Their defaults need no `static_args`. `scale_by_soap` has no `mask`, the first entry: pass
`STATIC_ARGS[1:]` there.
"""


def soap(  # noqa: D417  # `scale_by_soap` documents the other arguments.
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    shampoo_beta: ArrayLike | None = None,
    precondition_frequency: Frequency = 10,
    max_precond_dim: int | None = None,
    precondition_1d: bool = False,
    merge_dims: bool = False,
    normalize_grads: bool = False,
    correct_bias: bool = True,
    first_update: FirstUpdate = "zero",
    mu_dtype: DTypeLike | None = None,
    block_size: int | None = None,
    dimension_numbers: Any | Callable[[Any], Any] | None = None,
    stack_sharding: NamedSharding | None = None,
    stack_multiple: int | None = None,
    param_shardings: Any | Callable[[Any], Any] | None = None,
    refresh: RefreshMethod = "qr",
    refresh_tolerance: ArrayLike | None = None,
    refresh_order: RefreshOrder = "before_gradient",
    stagger: bool = False,
    one_sided: bool = False,
    factored: bool = False,
    preconditioner_dtype: DTypeLike | None = None,
    fold_factors: bool = False,
    factor_estimator: FactorEstimator = "gram",
    precision: PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP with decoupled weight decay: Adam in the eigenbasis of Shampoo's preconditioner.

    `scale_by_soap`, then weight decay as in `optax.adamw`, then the learning rate:

    .. math::

      \theta_t = \theta_{t-1} - \alpha_t (N_t + \lambda \theta_{t-1})

    Example:
      >>> import jax, jax.numpy as jnp, optax, soap_optax
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     soap_optax.soap(optax.cosine_decay_schedule(3e-3, 1000), precondition_frequency=10),
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
      learning_rate: a number or a schedule. 3e-3 is the authors' default for language models.
      weight_decay: strength of the decoupled weight decay, a number, or a schedule if the installed
        Optax takes one.
      mask: the parameters to decay: a tree of booleans with the structure of the parameters or a
        prefix of it, or a function of the parameters that returns one. None decays all.

    All other arguments are those of `scale_by_soap`.

    Returns:
      A transformation. Its `update` needs the parameters, unless ``weight_decay`` is the number 0.

    Raises:
      TypeError, ValueError: when built, at ``init`` and at ``update``, as `scale_by_soap` does; at
        ``update`` also if the parameters are missing.

    References:
      Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_, 2024
    """
    arguments.check_alias(learning_rate=learning_rate, weight_decay=weight_decay, mask=mask)
    return optax.chain(
        scale_by_soap(
            b1,
            b2,
            eps,
            shampoo_beta=shampoo_beta,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            precondition_1d=precondition_1d,
            merge_dims=merge_dims,
            normalize_grads=normalize_grads,
            correct_bias=correct_bias,
            first_update=first_update,
            mu_dtype=mu_dtype,
            block_size=block_size,
            dimension_numbers=dimension_numbers,
            stack_sharding=stack_sharding,
            stack_multiple=stack_multiple,
            param_shardings=param_shardings,
            refresh=refresh,
            refresh_tolerance=refresh_tolerance,
            refresh_order=refresh_order,
            stagger=stagger,
            one_sided=one_sided,
            factored=factored,
            preconditioner_dtype=preconditioner_dtype,
            fold_factors=fold_factors,
            factor_estimator=factor_estimator,
            precision=precision,
        ),
        add_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
