"""The contenders: the six-product floor, Adam, AdamW, Muon, a textbook SOAP, `soap`, `shampoo`.

All of them get the same gradients of the same parameters. Each has two functions: one makes its
state, and a jitted one takes a step and donates the state. The refresh frequency is an operand of
the step, so that one program takes plain steps and steps that refresh everything.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from shapes import Model
from textbook import TextbookState, gram_matrix, rotate, rotate_back, scale_by_textbook_soap

import soap_optax

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
NEVER = 2**30  # A frequency at which only the first refresh becomes due.
ALWAYS = 1

Step = Callable[[Any, Any, Any, Array], tuple[Any, Any]]


def unchanged(grads: Any) -> Any:
    return grads


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer, or the floor, whose steps are timed.

    Attributes:
      init: the state, from the parameters.
      update: `(grads, state, params, frequency)` to updates and state; jitted, donates the state.
      prepare: brings gradients into the form that `update` takes; it is not timed.
      refreshes: the number of refreshes of each part of a state; None if nothing is refreshed.
    """

    init: Callable[[Any], Any]
    update: Any
    prepare: Callable[[Any], Any] = unchanged
    refreshes: Callable[[Any], np.ndarray] | None = None


def contenders_of(
    model: Model, names: list[str], variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, Contender]:
    """The named contenders, and a variant of `soap_optax.soap` for each set of options."""
    known: dict[str, Callable[[], Contender]] = {
        "floor": lambda: floor(model),
        "adam": lambda: plain(optax.adam(LEARNING_RATE)),
        "adamw": lambda: plain(optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)),
        "muon": lambda: plain(muon(model)),
        "textbook": lambda: textbook(model),
        "soap": lambda: soap(model),
        "shampoo": lambda: preconditioned(soap_optax.shampoo, model),
        "kl_shampoo": lambda: preconditioned(soap_optax.shampoo, model, **KL_SHAMPOO),
    }
    chosen = {name: known[name]() for name in names}
    return chosen | {name: soap(model, **options) for name, options in variants.items()}


USUAL = ("floor", "adamw", "muon", "textbook", "soap")
NAMES = (*USUAL, "adam", "shampoo", "kl_shampoo")
# The options of the paper (Lin et al., 2025).
KL_SHAMPOO = {"factor_estimator": "kl", "refresh": "qr", "exponent": 0.5, "grafting": None}


def jitted(step: Step) -> Any:
    return jax.jit(step, donate_argnums=1)


# Optimizers ---------------------------------------------------------------------------------------


def plain(optimizer: optax.GradientTransformation) -> Contender:
    """An optimizer whose steps all do the same work."""

    def update(grads: Any, state: Any, params: Any, frequency: Array) -> tuple[Any, Any]:
        del frequency
        return optimizer.update(grads, state, params)

    return Contender(optimizer.init, jitted(update))


def muon(model: Model) -> optax.GradientTransformation:
    def numbers(params: Any) -> Any:
        return jax.tree.map(lambda leaf: model.numbers(np.shape(leaf)), params)

    return optax.contrib.muon(
        LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adam_weight_decay=WEIGHT_DECAY,
        muon_weight_dimension_numbers=numbers,
    )


def soap(model: Model, **options: Any) -> Contender:
    """`soap_optax.soap` with the options of the model, which `options` override."""
    return preconditioned(soap_optax.soap, model, **options)


def preconditioned(alias: Callable[..., Any], model: Model, **options: Any) -> Contender:
    """`soap` or `shampoo`, with the options of the model, which `options` override."""

    def optimizer(frequency: Any) -> optax.GradientTransformationExtraArgs:
        return alias(
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            precondition_frequency=frequency,
            **{**model.soap_options, **options},
        )

    def update(grads: Any, state: Any, params: Any, frequency: Array) -> tuple[Any, Any]:
        return optimizer(frequency).update(grads, state, params)

    def refreshes(state: Any) -> np.ndarray:
        stacks = jax.device_get(soap_stacks(state)).values()
        # A block without an accepted gradient is padding.
        return np.concatenate([s.refreshes[s.accepted_gradients > 0] for s in stacks])

    return Contender(optimizer(NEVER).init, jitted(update), refreshes=refreshes)


def soap_stacks(state: Any) -> Mapping[str, Any]:
    """The stacks of blocks in the state of `soap` or `shampoo` of `soap_optax`."""
    return optax.tree_utils.tree_get(state, "stacks")


def textbook(model: Model) -> Contender:
    """The textbook's SOAP, followed by weight decay and learning rate as in `soap_optax.soap`.

    Every block becomes a separate leaf in the block's shape: kernels are merged, and experts are
    unstacked.
    """

    def optimizer(frequency: Any) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_textbook_soap(precondition_frequency=frequency),
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.scale_by_learning_rate(LEARNING_RATE),
        )

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: split_leaf(leaf, model.blocks(leaf.shape)), tree)

    def init(params: Any) -> Any:
        return optimizer(NEVER).init(split(params))

    def update(grads: Any, state: Any, params: Any, frequency: Array) -> tuple[Any, Any]:
        updates, state = optimizer(frequency).update(split(grads), state, split(params))
        return jax.tree.map(join_leaf, params, updates), state

    def refreshes(state: Any) -> np.ndarray:
        (inner,) = (part for part in state if isinstance(part, TextbookState))
        return np.asarray(inner.refreshes)

    return Contender(init, jitted(update), refreshes=refreshes)


def split_leaf(leaf: Array, blocks: tuple[int, ...] | None) -> list[Array]:
    return [leaf] if blocks is None else list(leaf.reshape(blocks))


def join_leaf(like: Array, blocks: list[Array]) -> Array:
    return blocks[0].reshape(like.shape) if len(blocks) == 1 else jnp.stack(blocks)


# The floor ----------------------------------------------------------------------------------------


def floor(model: Model) -> Contender:
    """Only the products that a step of SOAP needs, with equal blocks batched.

    Its gradients come stacked, so that no copy is timed. Any matrices serve as bases, because the
    time of a product does not depend on them. It returns updates and Gram matrices, so that XLA
    leaves no product out.
    """

    def init(params: Any) -> dict[str, tuple[Array, ...]]:
        return {
            name: tuple(bases_like(stack, axis) for axis in range(1, stack.ndim))
            for name, stack in jax.eval_shape(prepare, params).items()
        }

    def prepare(grads: Any) -> dict[str, Array]:
        return stacked(grads, model)

    def update(grads: Any, bases: Any, params: Any, frequency: Array) -> tuple[Any, Any]:
        del params, frequency
        return {name: jax.vmap(six_products)(grads[name], bases[name]) for name in grads}, bases

    return Contender(init, jitted(update), jax.jit(prepare))


def bases_like(stack: jax.ShapeDtypeStruct, axis: int) -> Array:
    blocks, length = stack.shape[0], stack.shape[axis]
    entries = jax.random.normal(jax.random.key(axis), (blocks, length, length), stack.dtype)
    return entries / jnp.sqrt(jnp.asarray(length, stack.dtype))


def six_products(grad: Array, bases: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    """Rotates one block and rotates it back along every axis, and computes its Gram matrices."""
    with jax.default_matmul_precision("highest"):
        update = rotate_back(rotate(grad, bases), bases)
    return update, tuple(gram_matrix(grad, axis) for axis in range(grad.ndim))


def stacked(tree: Any, model: Model) -> dict[str, Array]:
    """The blocks of all leaves; equal shapes are stacked, under names such as `512x2048`."""
    shaped = [(leaf, model.blocks(leaf.shape)) for leaf in jax.tree.leaves(tree)]
    blocks = [leaf.reshape(shape) for leaf, shape in shaped if shape is not None]
    blocks.sort(key=lambda block: block.shape[1:])
    return {
        "x".join(map(str, shape)): jnp.concatenate(list(group))
        for shape, group in itertools.groupby(blocks, lambda block: block.shape[1:])
    }


def floor_operations(model: Model, params: Any) -> int:
    """Floating-point operations of the floor: `6 m n (m + n)` for each matrix."""
    stacks = jax.eval_shape(partial(stacked, model=model), params)
    return sum(6 * stack.size * sum(stack.shape[1:]) for stack in stacks.values())
