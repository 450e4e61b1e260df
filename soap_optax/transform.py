"""The transformation `scale_by_soap`: check, plan, gradients to stacks, updates, and back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from soap_optax import arguments, blocks, stacks
from soap_optax.algorithm import FactorEstimator, FirstUpdate, RefreshMethod
from soap_optax.blocks import BlockOptions, Region
from soap_optax.devices import Layout
from soap_optax.options import StepOptions, Structure
from soap_optax.schedules import Frequency
from soap_optax.stacks import RefreshOrder, StepSettings, StorageOptions
from soap_optax.state import PreconditionerState


def scale_by_soap(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
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

    Every ``precondition_frequency`` updates the bases take one step of orthogonal iteration toward
    the eigenvectors of :math:`L` and :math:`R`. The first moment is rotated into the new bases, and
    the second is permuted with their columns. An array of more dimensions has a factor for each
    axis of at most ``max_precond_dim``. Parameters without such an axis get Adam, and so do
    scalars, and vectors unless ``precondition_1d``.

    The first update is zero, unless ``first_update="apply"``: the first gradient only fills the
    factors, and the bias correction counts from the second. A gradient that is not finite, or whose
    sum of squares would overflow, is rejected and counted. Its block gets a zero update, and its
    state does not change otherwise.

    A complex parameter is optimized as two real ones, its real and its imaginary part, as
    `optax.contrib.split_real_and_imaginary` does. As for every optimizer of Optax, its gradient is
    the conjugate of the one that `jax.grad` returns.

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
      precondition_frequency: number of updates from one refresh of the bases to the next, an
        integer of at least 1, or a schedule that returns it. A schedule gets the number of calls of
        ``update`` so far, without a first call whose update is zero. It may be traced.
      max_precond_dim: longest axis that gets a factor. None means 10,000. Factor and basis of an
        axis of length `d` take :math:`2 d^2` numbers of state.
      precondition_1d: whether vectors get a factor as well.
      merge_dims: whether to merge neighbouring dimensions, from the first on, while their product
        stays within ``max_precond_dim``, as for the kernels of convolutions.
      normalize_grads: whether to divide each update by its root mean square, before the bias
        correction multiplies it.
      correct_bias: whether to apply Adam's bias correction.
      first_update: ``"zero"``, the authors': the first gradient only fills the factors.
        ``"apply"``: it also makes the first bases, and an update in them. The update of a matrix
        with two factors is then the polar factor, :math:`U V^\top` of :math:`G = U S V^\top`.
      mu_dtype: dtype in which the first moment is stored, such as bfloat16. It needs at least the
        range of float32. None, or a wider dtype, means the dtype of the statistics: float32, or
        float64 for float64 parameters.
      block_size: axes longer than this are cut into tiles of at most this length, each with its own
        preconditioner. None cuts no axis.
      dimension_numbers: the axes of each leaf that form a matrix. A tree with the structure of the
        parameters or a prefix of it, or a function of the parameters that returns one. Its entries
        have a ``reduction_axis`` and an ``output_axis``, each one axis or several, as in
        `optax.contrib.MuonDimensionNumbers`. All other axes are batch axes: each slice is a block
        with its own preconditioner. A leaf with an entry of None gets no preconditioner. An entry
        may also be a function of the leaf that returns one of these.
      stack_sharding: sharding of the state over a mesh, such as
        ``NamedSharding(mesh, P(("data", "fsdp")))``: every stack is sharded along axis 0. Each
        device refreshes its own blocks; only gradients and updates are resharded. None means one
        device.
      stack_multiple: every stack is padded to a multiple of this number of blocks. The state can
        then be restored on any number of devices that divides it. None means the number of shards
        of ``stack_sharding``.
      param_shardings: hints on how parameters and gradients are sharded on the mesh of
        ``stack_sharding``. A tree of `NamedSharding` with the structure of the parameters or a
        prefix of it, or a function of the parameters (or of traced gradients) that returns one.
        A leaf with an entry of None gets no hint, and XLA picks the communication. That costs more
        if equal shapes are sharded differently, or along the axes of layers. Explicit axes need no
        hint.
      refresh: how a basis follows its factor. ``"qr"``, the authors' method: one step of orthogonal
        iteration. ``"cholesky_qr"``: the same from a Cholesky decomposition, or a QR if that fails.
        ``"eigh"``: the factor's eigenvectors. ``"jacobi"``: up to three sweeps of simultaneous
        Jacobi rotations, from matrix products alone. ``"partial"``: rotates a quarter of the
        columns at a time, for a ``precondition_frequency`` of 1 to 3. ``"auto"``: ``"qr"`` on CPUs,
        ``"eigh"`` on TPUs for axes of up to 256, ``"jacobi"`` elsewhere.
      refresh_tolerance: off-diagonal mass (see `diagnostics`) up to which a due refresh is skipped.
        The block then keeps its bases until its next refresh is due. None skips no refresh.
      refresh_order: ``"before_gradient"`` refreshes from factors without the step's gradient, as in
        the authors' code; ``"after_gradient"`` from factors with it.
      stagger: whether to spread refreshes over the cycle, so that every step refreshes about the
        same number of blocks. First bases are still made all at once.
      one_sided: whether only the shortest axis of a block gets a factor.
      factored: whether the second moment of a block is stored as its marginals, as in Adafactor.
      preconditioner_dtype: dtype in which factors and bases are stored, such as bfloat16. None, or
        a wider dtype, means the dtype of the statistics. Refreshes are always computed in that
        dtype. A factor in bfloat16 follows decays of up to 0.99; at larger decays, new gradients
        are rounded away.
      fold_factors: whether the symmetric factors are stored as one triangle.
      factor_estimator: which matrix a gradient adds to a factor. ``"gram"``, the authors': its Gram
        matrix. ``"kl"``: its Gram matrix, whitened by estimates of the other factors' eigenvalues,
        as in KL-SOAP (Lin et al., 2025). The state then has these estimates as well.
      precision: precision of the products that rotate gradients and updates, as in `jax.lax.dot`.
        None means the default of the platform, or of ``jax.default_matmul_precision``. Factors and
        refreshes always use the highest precision, and so does a product that feeds a KL factor.

    Returns:
      A transformation whose state is a `ScaleBySoapState`.

    Raises:
      TypeError, ValueError: when built, if an argument is out of range or contradicts another; at
        ``init`` and ``update``, if a leaf is not floating point or complex, or
        ``dimension_numbers`` or ``param_shardings`` do not fit the tree; at ``update``, if the
        state belongs to other shapes, or a schedule returns an array.

    References:
      Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_, 2024, Algorithm 3; the authors' code at
      `nikhilvyas/SOAP <https://github.com/nikhilvyas/SOAP>`_

      Lin et al., `Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization
      <https://arxiv.org/abs/2509.03378>`_, 2025
    """
    arguments.check_transform(**locals())  # All arguments, and nothing else yet.
    structure = Structure(
        block_options=BlockOptions(
            max_precond_dim, precondition_1d, merge_dims, block_size, one_sided
        ),
        dimension_numbers=dimension_numbers,
        storage=StorageOptions(
            mu_dtype, preconditioner_dtype, fold_factors, factored, factor_estimator
        ),
        stack_sharding=stack_sharding,
        stack_multiple=stack_multiple,
        param_shardings=param_shardings,
    )
    options = StepOptions(
        b1=b1,
        b2=b2,
        shampoo_beta=shampoo_beta,
        eps=eps,
        normalize_grads=normalize_grads,
        correct_bias=correct_bias,
        first_update=first_update,
        precision=precision,
        frequency=precondition_frequency,
        refresh_order=refresh_order,
        stagger=stagger,
        refresh=refresh,
        refresh_tolerance=refresh_tolerance,
    )
    return transformation(structure, options)


def transformation(
    structure: Structure, options: StepOptions
) -> optax.GradientTransformationExtraArgs:
    """The transformation with these arguments: its `init` and its `update`."""

    def init_fn(params: optax.Params) -> PreconditionerState:
        if blocks.is_placeholder(params):
            return structure.placeholder_state()
        layout = structure.layout_of(params)
        leaves = jax.tree.leaves(blocks.split_complex(params))
        return layout.create(lambda: structure.initial_state(layout, leaves))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PreconditionerState]:
        del extra_args
        layout = structure.layout_of(updates, blocks.statistics_of(state, updates, params))
        old_state = structure.check_state(state, layout)
        settings = options.settings_at(old_state.count, layout.plan.dtypes)
        leaves, treedef = jax.tree.flatten(blocks.split_complex(updates))
        update_leaves = partial(_update_leaves, layout)
        new_leaves, new_state = layout.run(update_leaves, settings, leaves, old_state)
        return blocks.join_complex(jax.tree.unflatten(treedef, new_leaves)), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _update_leaves(
    layout: Layout, settings: StepSettings, grads: list[ArrayLike], state: PreconditionerState
) -> tuple[list[Array], PreconditionerState]:
    """Gradients to stacks, an update of every stack and of Adam's leaves, and updates back."""
    plan = layout.plan
    leaves = layout.prepare(grads)
    # Slices at constant positions compile slowly on CPUs.
    starts = stacks.hide_from_cpu_compiler(blocks.slice_starts(plan), state.count)
    updates: dict[Region, Array] = {}
    new_stacks, new_adam, blocks_before = {}, {}, 0
    for name, group in plan.stacks.items():
        with jax.named_scope(f"soap/{name}"):
            stack = layout.to_stack(leaves, group)
            stack_updates, new_stacks[name] = stacks.update_stack(
                stack, state.stacks[name], group, blocks_before, settings, layout
            )
            updates |= layout.from_stack(stack_updates, group, starts)
            blocks_before += group.blocks
    for name, group in plan.adam.items():
        with jax.named_scope("soap/adam"):
            runs = blocks.gather(leaves, plan, group)
            hyper = settings.hyper[group.dtype.name]
            leaf_updates, new_adam[name] = stacks.update_adam(
                runs, state.adam[name], group, hyper, layout
            )
            updates |= blocks.split(leaf_updates, group, starts)
    new_leaves = layout.finish(blocks.scatter(plan, updates, leaves), like=grads)
    return new_leaves, state._replace(
        count=jnp.asarray(optax.safe_increment(state.count)),
        stacks=new_stacks,
        adam=new_adam,
    )
