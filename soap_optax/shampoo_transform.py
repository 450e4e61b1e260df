"""The transformation `scale_by_shampoo`: its arguments; `transform` has `init` and `update`."""

from collections.abc import Callable
from typing import Any

import optax
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from soap_optax import arguments
from soap_optax.algorithm import FactorEstimator, Grafting, RefreshMethod
from soap_optax.blocks import BlockOptions
from soap_optax.options import ShampooStepOptions, Structure
from soap_optax.schedules import Frequency
from soap_optax.stacks import RefreshOrder, ShampooEquations, StorageOptions
from soap_optax.transform import transformation


def scale_by_shampoo(  # noqa: D417  # `scale_by_soap` documents the other arguments.
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-12,
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
    r"""Rescales updates by Shampoo: inverse roots of the gradients' Kronecker factors.

    For the gradient :math:`G_t` of a matrix, with the inverse roots :math:`P_L, P_R` as of the last
    refresh and the direction :math:`A_t` of the grafting method, such as Adam's,

    .. math::

      \begin{align*}
        L_t &= \beta L_{t-1} + (1 - \beta) G_t G_t^\top, \qquad
        R_t = \beta R_{t-1} + (1 - \beta) G_t^\top G_t \\
        P_L &= (L_t + \varepsilon I)^{-p}, \qquad
        P_R = (R_t + \varepsilon I)^{-p} \\
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1) G_t \\
        U_t &= P_L M_t P_R \\
        N_t &= U_t \, \frac{\|A_t\|_F}{\|U_t\|_F}
      \end{align*}

    The roots are computed every ``precondition_frequency`` updates, by an eigendecomposition in
    float32 or wider. An array of more dimensions has a factor for each axis of at most
    ``max_precond_dim``. Parameters without such an axis get Adam, and so do scalars, and vectors
    unless ``precondition_1d``.

    The first update is zero: the first gradient only fills the factors, as in `scale_by_soap` by
    default. A gradient that is not finite, or whose sum of squares would overflow, is rejected and
    counted. Its block gets a zero update, and its state does not change otherwise. A refresh is
    rejected, and counted, if a factor or its root is not finite, or a factor is not symmetric
    positive. The old roots then stay. A row or column without any gradient gets an update of
    exactly zero. A block whose gradients are zero at first is refreshed with its first nonzero one.
    An update that is too large or too small for its dtype is zero.

    Example:
      >>> import jax, jax.numpy as jnp, optax, soap_optax
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> optimizer = optax.chain(
      ...     soap_optax.scale_by_shampoo(precondition_frequency=5),
      ...     optax.scale_by_learning_rate(3e-3),
      ... )
      >>> state = optimizer.init(params)
      >>> loss = lambda p: jnp.sum((p["kernel"] @ p["bias"] - 1.0) ** 2) + jnp.sum(p["bias"] ** 2)
      >>> updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> sorted(state[0].stacks)
      ['4x3']

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment of grafting and of Adam, in [0, 1).
      eps: positive number added to every eigenvalue of a factor. Eigenvalues below the rounding
        level, 32 machine epsilons times the largest, are raised to it.
      exponent: exponent :math:`p` of each side, in (0, 1]. None means :math:`1 / (2k)` for `k`
        preconditioned axes, which is 1/4 for a matrix as in the original paper. Vyas et al. tuned
        it to 1/2.5 for language models. With 1/2, the factors approximate the covariance of the
        gradient.
      grafting: method whose update gives each block's update its Frobenius norm. ``"adam"``: Adam.
        ``"rmsprop"``: the gradient over the root of the second moment. ``"sgd"``: the gradient.
        None: the update keeps the norm of :math:`U_t`. Only the first two store a second moment.
      shampoo_beta: decay of the Kronecker factors, in [0, 1). None means ``b2``.
      precondition_frequency: number of updates from one refresh of the roots to the next, an
        integer of at least 1, or a schedule, as for `scale_by_soap`. It may be traced.
      grafting_eps: positive number added to the root of the second moment, of grafting and of
        parameters without a preconditioner, before bias correction; the ``eps`` of `scale_by_soap`.
      correct_bias: whether to correct for the start at zero of both moments and of the factors.
      preconditioner_dtype: dtype in which factors, and roots or bases, are stored, as for
        `scale_by_soap`.
      refresh: with ``factor_estimator="kl"``, how a basis follows its factor, as for
        `scale_by_soap`. Roots always come from ``"eigh"``.
      refresh_order: ``"after_gradient"`` computes roots from factors with the step's gradient, as
        in the original paper; ``"before_gradient"`` from factors without it, as SOAP does.
      factor_estimator: which matrix a gradient adds to a factor. ``"gram"``: its Gram matrix.
        ``"kl"``: its Gram matrix, whitened by estimates of the other factors' eigenvalues, as in
        KL-Shampoo (Lin et al., 2025). The state then has bases and these estimates :math:`\lambda`
        in place of roots, and :math:`P_L = Q_L (\lambda_L + \varepsilon)^{-p} Q_L^\top`. The
        paper's method has an exponent of 1/2 and a grafting of None.
      precision: precision of the products with roots or bases, as in `jax.lax.dot`. None means the
        default of the platform, or of ``jax.default_matmul_precision``. Factors and refreshes
        always use the highest precision.

    All other arguments are those of `scale_by_soap`.

    Returns:
      A transformation whose state is a `ScaleByShampooState`.

    Raises:
      TypeError, ValueError: when built, at ``init`` and at ``update``, as `scale_by_soap` does.

    References:
      Gupta et al., `Shampoo: Preconditioned Stochastic Tensor Optimization
      <https://arxiv.org/abs/1802.09568>`_, 2018, Algorithm 2

      Anil et al., `Scalable Second Order Optimization for Deep Learning
      <https://arxiv.org/abs/2002.09018>`_, 2020, for grafting

      Lin et al., `Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization
      <https://arxiv.org/abs/2509.03378>`_, 2025, for KL factors

      Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_, 2024, for the comparison with SOAP
    """
    arguments.check_shampoo(**locals())  # All arguments, and nothing else yet.
    structure = Structure(
        block_options=BlockOptions(
            max_precond_dim, precondition_1d, merge_dims, block_size, one_sided
        ),
        dimension_numbers=dimension_numbers,
        storage=StorageOptions(
            mu_dtype, preconditioner_dtype, fold_factors, False, factor_estimator
        ),
        stack_sharding=stack_sharding,
        stack_multiple=stack_multiple,
        param_shardings=param_shardings,
        equations=ShampooEquations(grafting, factor_estimator),
    )
    options = ShampooStepOptions(
        b1=b1,
        b2=b2,
        shampoo_beta=shampoo_beta,
        eps=grafting_eps,
        normalize_grads=False,
        correct_bias=correct_bias,
        first_update="zero",
        precision=precision,
        frequency=precondition_frequency,
        refresh_order=refresh_order,
        stagger=stagger,
        refresh=refresh,
        refresh_tolerance=None,
        factor_eps=eps,
        exponent=exponent,
        grafting=grafting,
        factor_estimator=factor_estimator,
    )
    return transformation(structure, options)
