"""The transformation: `scale_by_soap`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from soap_optax import (
    arguments,
    exchange,
    execution,
    layout,
    placement,
    planning,
    ravelled,
    trees,
    views,
)
from soap_optax.basis import RefreshRule
from soap_optax.block import Hyperparameters
from soap_optax.execution import Order, RefreshTiming
from soap_optax.places import Places, places_of
from soap_optax.refreshes import Method
from soap_optax.schedules import Frequency, frequency_at
from soap_optax.shardings import place_state
from soap_optax.state import ScaleBySoapState, Storage, initial_state, opaque_state


def scale_by_soap(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    *,
    shampoo_beta: ArrayLike | None = None,
    precondition_frequency: Frequency = 10,
    max_precond_dim: int = 10000,
    precondition_1d: bool = False,
    merge_dims: bool = False,
    normalize_grads: bool = False,
    correct_bias: bool = True,
    mu_dtype: DTypeLike | None = None,
    block_size: int | None = None,
    dimension_numbers: Any | Callable[[Any], Any] | None = None,
    stack_sharding: NamedSharding | None = None,
    stack_multiple: int | None = None,
    param_shardings: Any | Callable[[Any], Any] | None = None,
    refresh: Method = "qr",
    refresh_tolerance: ArrayLike | None = None,
    refresh_order: Order = "before_gradient",
    stagger: bool = False,
    one_sided: bool = False,
    factored: bool = False,
    preconditioner_dtype: DTypeLike | None = None,
    fold_factors: bool = False,
    precision: PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

    For the gradient :math:`G_t` of a matrix, with the eigenvectors :math:`Q_L, Q_R` of its
    Kronecker factors as of the last refresh,

    .. math::

      \begin{align*}
        G'_t &= Q_L^\top G_t Q_R \\
        M'_t &= \beta_1 M'_{t-1} + (1 - \beta_1) G'_t \\
        V'_t &= \beta_2 V'_{t-1} + (1 - \beta_2) G'_t \odot G'_t \\
        N_t &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \,
               Q_L \frac{M'_t}{\sqrt{V'_t} + \varepsilon} Q_R^\top \\
        L_t &= \beta L_{t-1} + (1 - \beta) G_t G_t^\top, \qquad
        R_t = \beta R_{t-1} + (1 - \beta) G_t^\top G_t
      \end{align*}

    and every ``precondition_frequency`` updates the bases take one step of orthogonal iteration
    toward the eigenvectors of :math:`L` and :math:`R`, the moments moving along. An array of more
    dimensions has a factor for each axis of at most ``max_precond_dim``. Leaves without such an
    axis, scalars, and vectors unless ``precondition_1d``, get Adam.

    The first update is zero: the first gradient only fills the factors, and the bias correction
    counts from the second. A block whose gradient is not finite gets a zero update and keeps its
    state; the state counts it.

    With default arguments this follows the authors' code to rounding.

    Example:
      >>> import jax, jax.numpy as jnp, optax, soap_optax
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> optimizer = optax.chain(
      ...     soap_optax.scale_by_soap(precondition_frequency=5),
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
      b2: decay of the second moment, in [0, 1).
      eps: positive number added to the square root of the second moment, *before* bias correction,
        as in the authors' code; Optax's Adam adds it after.
      shampoo_beta: decay of the Kronecker factors, in [0, 1). None means ``b2``.
      precondition_frequency: updates from one refresh of the bases to the next, an integer of at
        least 1, or a schedule that maps the number of calls of ``update`` so far, not counting the
        first, to one. It may be traced.
      max_precond_dim: longest axis that gets a factor. A factor of an axis of length `d` takes
        :math:`2 d^2` numbers of state.
      precondition_1d: whether vectors get a factor as well.
      merge_dims: whether to merge neighbouring dimensions, from the first on, while their product
        stays within ``max_precond_dim``, as for the kernels of convolutions.
      normalize_grads: whether to divide each update by its root mean square, before the bias
        correction multiplies it.
      correct_bias: whether to apply Adam's bias correction.
      mu_dtype: dtype in which the first moment is stored, one with at least the range of float32,
        such as bfloat16; None, or a wider one, means that of the statistics, which is float32, or
        float64 for leaves in float64.
      block_size: None to give a leaf one preconditioner, or the largest length of the tiles into
        which its axes are cut, each with a preconditioner of its own.
      dimension_numbers: None, or which axes of each leaf form a matrix: a tree with the structure
        of the parameters or a prefix of it, or a function from parameters to one. Its leaves have a
        ``reduction_axis`` and an ``output_axis``, each an axis or several, as
        `optax.contrib.MuonDimensionNumbers`; axes in neither are batch axes, each slice a block of
        its own. A leaf of None gets no preconditioner.
      stack_sharding: None, or how the state is divided among the devices of a mesh: every stack
        along its leading axis, as in ``NamedSharding(mesh, P(("data", "fsdp")))``. Every device
        then refreshes its own blocks and exchanges only gradients and updates.
      stack_multiple: what the number of blocks in a stack is padded to a multiple of. None means
        the number of shards of ``stack_sharding``. State of one multiple can be restored on any
        number of devices that divides it.
      param_shardings: where parameters and gradients lie on the mesh of ``stack_sharding``: a tree
        of `NamedSharding` with the structure of the parameters or a prefix of it, or a function of
        them, or of traced gradients, that returns one. What is None, and everything if this is
        None, is for the compiler to find out, which exchanges more where leaves of one kind are
        split in different ways, or along axes of layers. Explicit axes tell by themselves.
      refresh: how a basis follows its factor. ``"qr"``, the authors': one step of orthogonal
        iteration. ``"cholesky_qr"``: the same from a Cholesky decomposition, with a QR where that
        fails. ``"eigh"``: all the way to the eigenvectors. ``"jacobi"``: up to three sweeps of
        simultaneous Jacobi rotations, out of matrix products alone. ``"partial"``: a quarter of the
        columns at a time, for a ``precondition_frequency`` of 1 to 3. ``"auto"``: ``"qr"`` on CPUs,
        ``"eigh"`` on TPUs for axes of up to 256, ``"jacobi"`` elsewhere.
      refresh_tolerance: None, or the off-diagonal mass (see `diagnostics`) of the factors in their
        bases up to which a block that is due keeps its bases until it is due again.
      refresh_order: whether a refresh comes ``"before_gradient"``, from factors that do not hold
        the step's gradient, as in the authors' code, or ``"after_gradient"``, from factors that do.
      stagger: whether the blocks take turns, so that each step refreshes as many as another. First
        bases are still made all at once.
      one_sided: whether only the shortest axis of a block gets a factor.
      factored: whether the second moment of a block is stored as its marginals, as in Adafactor.
      preconditioner_dtype: dtype in which factors and bases are stored, such as bfloat16; None, or
        a wider one, means that of the statistics, in which refreshes are always computed. A factor
        in bfloat16 follows decays of up to 0.99; beyond, what a gradient adds is rounded away.
      fold_factors: whether the symmetric factors are stored as one triangle.
      precision: that of the products which rotate gradients and updates, as of `jax.lax.dot`. None
        means the default of the platform, or of ``jax.default_matmul_precision``. Factors and
        refreshes always have the highest.

    Returns:
      A transformation whose state is a `ScaleBySoapState`.

    Raises:
      TypeError, ValueError: when built, where an argument is out of range; at `init`, where a leaf
        is not real floating point; at `update`, where the state belongs to other shapes, or a
        schedule gives an array.

    References:
      Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_, 2024, Algorithm 3; the authors' code at
      `nikhilvyas/SOAP <https://github.com/nikhilvyas/SOAP>`_
    """
    arguments.check_decay("b1", b1)
    arguments.check_decay("b2", b2)
    arguments.check_eps(eps)
    if shampoo_beta is not None:
        arguments.check_decay("shampoo_beta", shampoo_beta)
    arguments.check_frequency(precondition_frequency)
    arguments.check_max_precond_dim(max_precond_dim)
    arguments.check_flag("precondition_1d", precondition_1d)
    arguments.check_flag("merge_dims", merge_dims)
    arguments.check_flag("normalize_grads", normalize_grads)
    arguments.check_flag("correct_bias", correct_bias)
    arguments.check_dtype("mu_dtype", mu_dtype)
    arguments.check_block_size(block_size, max_precond_dim)
    arguments.check_dimension_numbers(dimension_numbers, merge_dims)
    arguments.check_stack_sharding(stack_sharding)
    arguments.check_choice("refresh", refresh, get_args(Method))
    arguments.check_tolerance(refresh_tolerance, refresh)
    arguments.check_choice("refresh_order", refresh_order, get_args(Order))
    arguments.check_flag("stagger", stagger)
    arguments.check_flag("one_sided", one_sided)
    arguments.check_flag("factored", factored)
    arguments.check_dtype("preconditioner_dtype", preconditioner_dtype)
    arguments.check_flag("fold_factors", fold_factors)
    arguments.check_precision(precision)

    shards = 1 if stack_sharding is None else math.prod(placement.parts_of(stack_sharding))
    arguments.check_stack_multiple(stack_multiple, shards)
    arguments.check_param_shardings(param_shardings, stack_sharding)
    cut = views.Cut(max_precond_dim, precondition_1d, merge_dims, block_size, one_sided)
    storage = Storage(mu_dtype, preconditioner_dtype, fold_factors, factored)
    multiple = stack_multiple or shards

    def hyper_in(dtype: np.dtype) -> Hyperparameters:
        return Hyperparameters(
            b1=jnp.asarray(b1, dtype),
            b2=jnp.asarray(b2, dtype),
            shampoo_beta=jnp.asarray(b2 if shampoo_beta is None else shampoo_beta, dtype),
            eps=jnp.asarray(eps, dtype),
            normalize_grads=normalize_grads,
            correct_bias=correct_bias,
            precision=precision,
        )

    def refreshing_at(count: Array) -> tuple[RefreshTiming, RefreshRule]:
        frequency = frequency_at(precondition_frequency, count)
        tolerance = None if refresh_tolerance is None else jnp.asarray(refresh_tolerance)
        return RefreshTiming(frequency, refresh_order, stagger), RefreshRule(tolerance, refresh)

    def init_fn(params: optax.Params) -> ScaleBySoapState:
        if trees.stands_for_any_params(params):
            return opaque_state()
        plan = trees.plan_of(params, cut, dimension_numbers, multiple)
        places_of(params, param_shardings, stack_sharding)  # For what it refuses.
        return place_state(lambda: initial_state(plan, storage), stack_sharding)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        del params, extra_args
        plan = trees.plan_of(updates, cut, dimension_numbers, multiple)
        state = trees.checked_state(state, jax.eval_shape(lambda: initial_state(plan, storage)))
        leaves, treedef = jax.tree.flatten(updates)
        places = places_of(updates, param_shardings, stack_sharding)
        update = partial(update_leaves, plan, places)
        if places is not None:
            update = placement.with_automatic_axes(update)
        hyper = {name: hyper_in(np.dtype(name)) for name in plan.dtypes}
        new_leaves, new_state = update((refreshing_at(state.count), hyper), leaves, state)
        return jax.tree.unflatten(treedef, new_leaves), new_state

    def update_leaves(
        plan: planning.Plan,
        places: Places | None,
        numbers: tuple[tuple[RefreshTiming, RefreshRule], dict[str, Hyperparameters]],
        leaves: list[ArrayLike],
        state: ScaleBySoapState,
    ) -> tuple[list[Array], ScaleBySoapState]:
        refreshing, hyper = numbers
        sharding = None
        if places is not None:
            sharding, leaves = places.sharding, places.hold(leaves)
        starts = execution.hide_from_cpu_compiler(layout.starts_of(plan), state.count)
        blocks: dict[planning.Region, Array] = {}
        stacks, vectors = {}, {}
        number = 0
        for name, group in plan.stacks.items():
            with jax.named_scope(f"soap/{name}"):
                grads = exchange.bring_in(leaves, plan, group, places)
                stack_updates, stacks[name] = execution.update_stack(
                    grads,
                    state.stacks[name],
                    group,
                    number,
                    hyper[group.dtype.name],
                    refreshing,
                    sharding,
                )
                number += group.blocks
                blocks |= exchange.take_out(stack_updates, plan, group, starts, places)
        for name, group in plan.ravelled.items():
            with jax.named_scope("soap/ravelled"):
                grads = layout.gather(leaves, plan, group)
                run_updates, vectors[name] = ravelled.update(
                    grads, state.ravelled[name], plan, group, hyper[group.dtype.name], places
                )
                blocks |= layout.split(run_updates, group, starts)
        new_leaves = layout.scatter(plan, blocks, leaves)
        return new_leaves if places is None else places.hold(new_leaves), ScaleBySoapState(
            layout_version=state.layout_version,
            count=jnp.asarray(optax.safe_increment(state.count)),
            stacks=stacks,
            ravelled=vectors,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
