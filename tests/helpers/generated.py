"""Random trees, options and gradient histories for all optimizers, drawn by Hypothesis.

A case is a tree of parameters and an optimizer. Compiling its program takes seconds, running it
takes milliseconds. So each case runs many histories.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import soap_optax

STEPS = 12

Tree = Any
KINDS = (
    "normal",
    "zeros",
    "constant",
    "rank one",
    "sparse rows",
    "scale 1e-30",
    "scale 1e18",
    "all scales",
    "spike",
    "nan",
    "infinity",
    "asleep",
)
# In these, no gradient is so large beside the others that the others are rounding.
OF_ONE_SIZE = ("normal", "zeros", "constant", "sparse rows", "nan", "infinity", "asleep")

# Trees --------------------------------------------------------------------------------------------

LENGTHS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 13])
DTYPES = ["float32", "float32", "float32", "bfloat16", "float16", "complex64"]


@st.composite
def leaves(draw: st.DrawFn) -> jax.ShapeDtypeStruct:
    ndim = draw(st.sampled_from([0, 1, 2, 2, 2, 2, 3, 4]))
    shape = draw(st.tuples(*[LENGTHS if ndim < 3 else st.integers(1, 5)] * ndim))
    if ndim and draw(st.integers(0, 19)) == 0:
        shape = (0, *shape[1:])
    return jax.ShapeDtypeStruct(shape, jnp.dtype(draw(st.sampled_from(DTYPES))))


def containers(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.one_of(
        st.dictionaries(st.sampled_from(["a", "kernel", "embed"]), children, max_size=3),
        st.lists(children, max_size=3),
        st.tuples(children, children),
    )


def trees() -> st.SearchStrategy[Tree]:
    """Nested containers of one to eight leaves, some of equal shape."""
    some = st.recursive(leaves(), containers, max_leaves=5)
    matrix = leaves().filter(lambda leaf: leaf.ndim == 2 and min(leaf.shape) > 1)
    return st.builds(
        lambda tree, leaf, copies: {"tree": tree, "equal": [leaf] * copies},
        some,
        matrix,
        st.integers(1, 3),
    )


# Optimizers ---------------------------------------------------------------------------------------

BOTH = {
    "b1": st.sampled_from([0.0, 0.9, 0.95]),
    "b2": st.sampled_from([0.9, 0.95, 0.999]),
    "eps": st.sampled_from([1e-12, 1e-8, 1e-2]),
    "shampoo_beta": st.sampled_from([None, 0.0, 0.9]),
    "precondition_frequency": st.integers(1, 5),
    "max_precond_dim": st.sampled_from([None, 4, 8]),
    "precondition_1d": st.booleans(),
    "mu_dtype": st.sampled_from([None, "bfloat16"]),
    "block_size": st.sampled_from([None, None, 2, 4]),
    "refresh_order": st.sampled_from(["before_gradient", "after_gradient"]),
    "stagger": st.booleans(),
    "one_sided": st.booleans(),
    "preconditioner_dtype": st.sampled_from([None, None, "bfloat16"]),
    "fold_factors": st.booleans(),
    "factor_estimator": st.sampled_from(["gram", "kl"]),
    "correct_bias": st.booleans(),
    "stack_multiple": st.sampled_from([None, 3]),
}
MERGING = {"merge_dims": st.booleans()}
REFRESHES = ["qr", "cholesky_qr", "eigh", "jacobi", "partial", "auto"]
ONLY_SOAP = {
    "normalize_grads": st.booleans(),
    "first_update": st.sampled_from(["zero", "apply"]),
    "refresh": st.sampled_from(REFRESHES),
    "refresh_tolerance": st.sampled_from([None, None, 0.1]),
    "factored": st.booleans(),
}
ONLY_SHAMPOO = {
    "exponent": st.sampled_from([None, 0.25, 0.4, 1.0]),
    "grafting": st.sampled_from(["adam", "rmsprop", "sgd", None]),
    "grafting_eps": st.sampled_from([1e-12, 1e-8]),
}


def soap(options: dict[str, Any]) -> optax.GradientTransformation:
    return soap_optax.scale_by_soap(**options)


def shampoo(options: dict[str, Any]) -> optax.GradientTransformation:
    return soap_optax.scale_by_shampoo(**options)


def soap_adamw(options: dict[str, Any]) -> optax.GradientTransformation:
    return soap_optax.soap_adamw(3e-3, **options)


def soap_hyperball(options: dict[str, Any]) -> optax.GradientTransformation:
    return optax.chain(soap_optax.scale_by_soap(**options), soap_optax.hyperball(3e-3))


MAKERS: dict[Callable[..., optax.GradientTransformation], dict[str, st.SearchStrategy[Any]]] = {
    soap: BOTH | MERGING | ONLY_SOAP,
    shampoo: BOTH | MERGING | ONLY_SHAMPOO,
    soap_adamw: {name: BOTH[name] for name in BOTH if name not in ("precondition_1d", "b1", "b2")}
    | ONLY_SOAP
    | {"max_norm_ratio": st.sampled_from([None, 3.0])},
    soap_hyperball: BOTH | MERGING | ONLY_SOAP,
}


class Case(NamedTuple):
    """Shapes of parameters and an optimizer."""

    make: Callable[[dict[str, Any]], optax.GradientTransformation]
    options: dict[str, Any]
    shapes: Tree

    @property
    def params(self) -> Tree:
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), self.shapes)

    def optimizer(self) -> optax.GradientTransformation:
        return self.make(self.options)


def in_float64(case: Case) -> Case:
    """A case in which rounding decides nothing, if its first factors have full rank.

    Its leaves are of 64 bits, its statistics are not narrowed, and no factor is that of single
    gradients, as KL factors are at first.
    """
    options = dict(case.options)
    plain = {"mu_dtype": None, "preconditioner_dtype": None, "factor_estimator": "gram"}
    options |= {name: value for name, value in plain.items() if name in options}
    if options.get("shampoo_beta") == 0:
        options["shampoo_beta"] = None

    def widen(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        return jax.ShapeDtypeStruct(leaf.shape, np.dtype("complex128" if is_complex else "float64"))

    return Case(case.make, options, jax.tree.map(widen, case.shapes))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases whose options do not contradict each other: those raise an explanation."""
    make = draw(st.sampled_from([soap, soap, soap, shampoo, shampoo, soap_adamw, soap_hyperball]))
    options = {name: draw(values) for name, values in MAKERS[make].items()}
    if draw(st.booleans()):  # Half the cases have only three options that are not the default.
        kept = draw(st.lists(st.sampled_from(sorted(options)), min_size=3, max_size=3))
        options = {name: options[name] for name in kept}
    case = Case(make, options, draw(trees()))
    try:
        case.optimizer().init(case.params)
    except ValueError:
        hypothesis.reject()
    return case


SEEDS = st.integers(0, 2**32 - 1)

# Histories ----------------------------------------------------------------------------------------


def history(rng: np.random.Generator, kind: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """The gradients of all steps of one leaf, `(STEPS, *shape)`, in the leaf's dtype."""
    shape = (STEPS, *leaf.shape)
    normal = rng.standard_normal(shape)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        normal = normal + 1j * rng.standard_normal(shape)
    at = rng.integers(STEPS)
    one = np.zeros(shape)
    if leaf.size:
        one.reshape(STEPS, -1)[at, rng.integers(leaf.size)] = 1
    rows = (rng.random((STEPS, *leaf.shape[:1])) < 0.3).reshape(
        (STEPS, *leaf.shape[:1], *[1] * (leaf.ndim - 1))
    )
    edge = [1] * (leaf.ndim - 1)
    grads = {
        "normal": lambda: normal,
        "zeros": lambda: np.zeros(shape),
        "constant": lambda: np.broadcast_to(normal[:1], shape),
        "rank one": lambda: (
            rng.standard_normal((STEPS, *leaf.shape[:1], *edge)) * rng.standard_normal(shape[-1:])
            if leaf.ndim
            else normal
        ),
        "sparse rows": lambda: normal * rows,
        "scale 1e-30": lambda: normal * 1e-30,
        "scale 1e18": lambda: normal * 1e18,
        "all scales": lambda: normal * 10.0 ** rng.uniform(-30, 18, (STEPS, *[1] * leaf.ndim)),
        "spike": lambda: (
            np.where(one.any(tuple(range(1, one.ndim)), keepdims=True), 1e6, 1) * normal
        ),
        "nan": lambda: np.where(one == 1, np.nan, normal),
        "infinity": lambda: np.where(one == 1, -np.inf, normal),
        "asleep": lambda: normal * (np.arange(STEPS) >= at).reshape(STEPS, *[1] * leaf.ndim),
    }[kind]()
    with np.errstate(over="ignore"):
        return np.broadcast_to(grads, shape).astype(leaf.dtype)


def histories(shapes: Tree, *seed: int, kinds: Sequence[str] = KINDS) -> Tree:
    """The gradients of all steps: each leaf has a kind of its own."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: history(rng, rng.choice(kinds), leaf), shapes)


def compile_run(case: Case) -> Callable[[Tree, Tree], tuple[Tree, Tree]]:
    """A function of a state and of the gradients of some steps: the updates, and the last state."""
    optimizer, params = case.optimizer(), case.params

    @jax.jit
    def run(state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        def step(state: Tree, grad: Tree) -> tuple[Tree, Tree]:
            updates, state = optimizer.update(grad, state, params)
            return state, updates

        state, updates = jax.lax.scan(step, state, grads)
        return updates, state

    return run
