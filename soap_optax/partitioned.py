"""`soap_adamw`: SOAP for matrices, AdamW for all other parameters, and a report of both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import optax
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from soap_optax import arguments, blocks
from soap_optax.algorithm import FactorEstimator, FirstUpdate, RefreshMethod
from soap_optax.alias import STATIC_ARGS, soap
from soap_optax.chain import add_weight_decay, clip_by_running_norm, scale_by_guarded_adam
from soap_optax.schedules import Frequency, thinning_frequency
from soap_optax.stacks import RefreshOrder
from soap_optax.tools import Description, assignment_of, default_labels, describe

SOAP_ADAMW_STATIC_ARGS = (*STATIC_ARGS, "labels", "report")
"""Arguments of `soap_adamw` that must not be traced, for `optax.inject_hyperparams`.

Their defaults need no `static_args`.
"""


def soap_adamw(  # noqa: D417  # `scale_by_soap` documents the other arguments.
    learning_rate: optax.ScalarOrSchedule,
    *,
    adamw_learning_rate: optax.ScalarOrSchedule | None = None,
    adamw_b1: ArrayLike = 0.9,
    adamw_b2: ArrayLike = 0.95,
    labels: Any | Callable[[Any], Any] | None = None,
    report: Callable[[Description], Any] | None = None,
    max_norm_ratio: ArrayLike | None = None,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    shampoo_beta: ArrayLike | None = None,
    precondition_frequency: Frequency | None = None,
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
    refresh_order: RefreshOrder = "after_gradient",
    stagger: bool = False,
    one_sided: bool = False,
    factored: bool = False,
    preconditioner_dtype: DTypeLike | None = None,
    fold_factors: bool = False,
    factor_estimator: FactorEstimator = "gram",
    precision: PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP for the matrices of a model and AdamW for everything else, in one line.

    It is `optax.partition` of `soap` and AdamW, with three decisions made for language models:

    - `default_labels` gives embeddings, output heads and vectors to AdamW.
    - `default_dimension_numbers` makes attention kernels one matrix each, merges the windows of
      convolutions with their inputs, and treats layers and experts as batch axes.
    - Bases are refreshed in every update at first, and in every tenth one later, with
      `thinning_frequency(20, 10) <thinning_frequency>` and ``refresh_order="after_gradient"``.

    The last decision follows the study in *Refreshing when it pays* on the page *Performance*. It
    trained the byte-level transformer of the example at the best learning rate. These settings had
    a held-out loss of 1.4835. Refreshes in every update had 1.4892, with five times as many
    refreshes, and refreshes in every tenth update had 1.5160.

    Every decision can be overridden: ``labels``, ``dimension_numbers``, ``precondition_frequency``
    and ``refresh_order``. All other arguments have the defaults of `soap`.

    AdamW is Optax's, with two safeguards. Its statistics are at least float32. If any gradient of
    AdamW's parameters is not finite, all of them only decay in that step, and their moments do not
    change. Complex parameters count as two real ones, in either optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, soap_optax
      >>> params = {
      ...     "wte": {"embedding": jnp.ones((100, 8))},
      ...     "attention": {"query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.zeros((2, 4))}},
      ...     "lm_head": {"kernel": jnp.ones((8, 100))},
      ... }
      >>> optimizer = soap_optax.soap_adamw(3e-3, report=print)
      >>> state = optimizer.init(params)
      parameter               optimizer  shape  dtype    blocks   axes  state bytes
      attention/query/bias    adamw      2x4    float32  AdamW                   64
      attention/query/kernel  soap       8x2x4  float32  1 x 8x8  0, 1        1,556
      lm_head/kernel          adamw      8x100  float32  AdamW                6,400
      wte/embedding           adamw      100x8  float32  AdamW                6,400
      shared                                                                     12
      total                              1,672                               14,432
      >>> loss = lambda p: jnp.sum(p["attention"]["query"]["kernel"] ** 2)
      >>> updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      >>> params = optax.apply_updates(params, updates)

    Args:
      learning_rate: a number or a schedule, for SOAP, and for AdamW too unless it has its own one.
      adamw_learning_rate: the learning rate of AdamW, a number or a schedule. None means
        ``learning_rate``.
      adamw_b1: decay of AdamW's first moment, in [0, 1).
      adamw_b2: decay of AdamW's second moment, in [0, 1).
      labels: the optimizer of each parameter. A tree of ``"soap"`` and ``"adamw"`` with the
        structure of the parameters or a prefix of it, or a function of the parameters that returns
        one. None means `default_labels`.
      report: a function that ``init`` calls with the `Description` of the parameters, such as
        `print`. It also runs if ``init`` is only traced. None reports nothing. Under
        `optax.inject_hyperparams`, pass ``static_args=SOAP_ADAMW_STATIC_ARGS``. Otherwise Optax
        calls it with the number of steps, as a schedule.
      max_norm_ratio: the largest norm of all gradients relative to the mean of earlier ones, as for
        `clip_by_running_norm`, which is then first in a chain. None clips nothing.
      eps: of both optimizers. AdamW adds it after the bias correction, as in Optax.
      weight_decay: of both optimizers.
      mask: the parameters that either of them decays, as for `soap`.
      precondition_frequency: as for `soap`. None means ``thinning_frequency(20, 10)``.
      mu_dtype: of both optimizers.
      dimension_numbers: as for `soap`; entries for AdamW's parameters have no effect. None means
        `default_dimension_numbers`. For `soap`'s own treatment, pass ``lambda params: None``.
      param_shardings: as for `soap`. A function gets SOAP's parameters only.

    The remaining arguments are those of `soap`. ``merge_dims`` and ``precondition_1d`` need other
    ``dimension_numbers`` than the default, which decide about all axes.

    Returns:
      A transformation. Its `update` needs the parameters, unless ``weight_decay`` is the number 0.
      Its state is that of `optax.partition`. With ``max_norm_ratio``, it is that of `optax.chain`.

    Raises:
      TypeError, ValueError: when built, at ``init`` and at ``update``, as `soap` does; at ``init``
        and ``update`` also if ``labels`` do not fit the parameters.

    References:
      Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_, 2024

      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019
    """
    arguments.check_soap_adamw(
        adamw_learning_rate=adamw_learning_rate,
        adamw_b1=adamw_b1,
        adamw_b2=adamw_b2,
        labels=labels,
        report=report,
        max_norm_ratio=max_norm_ratio,
    )
    if dimension_numbers is None:
        arguments.check_left_to_default_dimension_numbers(
            precondition_1d=precondition_1d, merge_dims=merge_dims
        )
    if precondition_frequency is None:
        precondition_frequency = thinning_frequency(20, 10)
    make_soap = partial(
        soap,
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        precondition_frequency=precondition_frequency,
        shampoo_beta=shampoo_beta,
        max_precond_dim=max_precond_dim,
        precondition_1d=precondition_1d,
        merge_dims=merge_dims,
        normalize_grads=normalize_grads,
        correct_bias=correct_bias,
        first_update=first_update,
        mu_dtype=mu_dtype,
        block_size=block_size,
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
    )
    # Checks the arguments now. A function may return None, which `merge_dims` needs.
    make_soap(
        dimension_numbers=None if blocks.is_function(dimension_numbers) else dimension_numbers
    )
    adamw = optax.chain(
        scale_by_guarded_adam(adamw_b1, adamw_b2, eps, mu_dtype),
        add_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(
            learning_rate if adamw_learning_rate is None else adamw_learning_rate
        ),
    )

    def optimizer_of(tree: Any) -> optax.GradientTransformationExtraArgs:
        assignment = assignment_of(tree, labels, dimension_numbers)
        transforms = {"soap": make_soap(dimension_numbers=assignment.dimension_numbers)}
        # A function, because a tree with the structure of an Equinox module is callable.
        return optax.partition({**transforms, "adamw": adamw}, lambda _: assignment.labels)

    def init_fn(params: optax.Params) -> optax.OptState:
        if report is not None and not blocks.is_placeholder(params):
            own = {"dimension_numbers": dimension_numbers, "max_norm_ratio": max_norm_ratio}
            options = make_soap.keywords | own
            report(describe(params, labels=default_labels if labels is None else labels, **options))
        return optimizer_of(params).init(params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return optimizer_of(updates).update(updates, state, params, **extra_args)

    optimizer = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    if max_norm_ratio is None:
        return optimizer
    return optax.chain(clip_by_running_norm(max_norm_ratio), optimizer)
