"""The programs of updates: one for all steps, real conditionals, no needless copies."""

import collections
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import soap_optax

# Only optimized programs show copies of the state, and zeros that a compiler gets wrong.
pytestmark = pytest.mark.usefixtures("optimized_programs")

Tree = dict[str, jax.Array]
State = Any  # A `ScaleBySoapState`, but Optax's signatures say any tree.
Step = Callable[[Tree, State], Any]

SHAPES = {"first": (6, 4), "second": (6, 4), "vector": (5,)}
FREQUENCY = 3
CALLS = 11
OPTIMIZER = soap_optax.scale_by_soap(precondition_frequency=FREQUENCY)

# Two programs for the same equations may round differently. They round numbers of size 1 by 6e-8,
# in each of some ten products and sums of ten steps. A missing or repeated step moves an update by
# a tenth.
TOLERANCE = 1e-4


def draw(seed: int, calls: int = CALLS) -> Tree:
    """Gradients of `calls` steps, `(calls, *shape)`, of full rank."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=(calls, *shape)), jnp.float32)
        for name, shape in SHAPES.items()
    }


def unstack(tree: Any) -> list[Any]:
    length = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, index=index: leaf[index], tree) for index in range(length)]


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def init() -> State:
    return OPTIMIZER.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})


plain_step = jax.jit(OPTIMIZER.update)


def run(step: Step, grads: list[Tree]) -> tuple[Any, State]:
    """Updates of every call, `(calls, *shape)`, and the final state."""
    state, updates = init(), []
    for grad in grads:
        update, state = step(grad, state)
        updates.append(update)
    return stack(updates), state


@functools.cache
def plain_run() -> tuple[Any, State]:
    return run(plain_step, unstack(draw(0)))


def assert_close(found: Any, wanted: Any) -> None:
    """Compares two runs, up to the signs of the columns of bases and of `mu` with them."""

    def compare(path: Any, new: jax.Array, old: jax.Array) -> None:
        name = jax.tree_util.keystr(path)
        if "bases" in name or "mu" in name:
            new, old = abs(new), abs(old)
        np.testing.assert_allclose(new, old, rtol=0, atol=TOLERANCE, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, found, wanted)


# One program.


def test_step_is_traced_once_for_first_call_plain_steps_and_refreshes() -> None:
    traces = []

    @jax.jit
    def step(grads: Tree, state: State) -> Any:
        traces.append(None)
        return OPTIMIZER.update(grads, state)

    _, state = run(step, unstack(draw(0)))
    assert state.stacks["6x4"].refreshes.tolist() == [4, 4]  # Calls 1, 4, 7 and 10.
    # The source of the first state causes no new trace either.
    first = unstack(draw(0))[0]
    step(first, jax.jit(OPTIMIZER.init)(first))
    step(first, jax.tree.map(jnp.asarray, jax.device_get(init())))
    assert len(traces) == 1


def test_one_compiled_program_takes_every_state_that_it_returns() -> None:
    grads = unstack(draw(0))
    program = plain_step.lower(grads[0], init()).compile()
    # A compiled program raises if a shape, a dtype or a sharding differs from its own.
    updates, state = run(program, grads)
    assert_close((updates, state), plain_run())


def test_state_keeps_its_types_from_call_to_call() -> None:
    def types(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)

    state = init()
    weak = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.weak_type
    ]
    assert not weak
    _, after = jax.eval_shape(OPTIMIZER.update, unstack(draw(0))[0], state)
    assert types(after) == types(state)


def test_scan_over_steps_equals_one_call_after_another() -> None:
    @jax.jit
    def scan(grads: Tree, state: State) -> tuple[State, Any]:
        def step(state: State, grad: Tree) -> tuple[State, Any]:
            updates, state = OPTIMIZER.update(grad, state)
            return state, updates

        return jax.lax.scan(step, state, grads)

    state, updates = scan(draw(0), init())
    assert_close((updates, state), plain_run())


def test_step_under_a_conditional_is_taken_or_not_as_a_whole() -> None:
    @jax.jit
    def maybe_step(take: jax.Array, grads: Tree, state: State) -> tuple[Tree, State]:
        return jax.lax.cond(
            take,
            OPTIMIZER.update,
            lambda grads, state: (jax.tree.map(jnp.zeros_like, grads), state),
            grads,
            state,
        )

    state, updates = init(), []
    for grad in unstack(draw(0)):
        before = state
        _, state = maybe_step(jnp.asarray(False), grad, state)
        jax.tree.map(np.testing.assert_array_equal, state, before)
        update, state = maybe_step(jnp.asarray(True), grad, state)
        updates.append(update)
    assert_close((stack(updates), state), plain_run())


# Donation.


@functools.cache
def donating_step() -> jax.stages.Compiled:
    step = jax.jit(OPTIMIZER.update, donate_argnums=(0, 1))
    return step.lower(unstack(draw(0))[0], init()).compile()


def test_donated_gradients_and_states_are_consumed_and_change_no_result() -> None:
    state, updates = init(), []
    for grad in unstack(draw(0)):
        donated = jax.tree.leaves((grad, state))
        # The state from `init` is donated at once: no two of its leaves may share a buffer.
        update, state = donating_step()(grad, state)
        assert all(leaf.is_deleted() for leaf in donated)
        updates.append(jax.tree.map(jnp.copy, update))
    assert_close((stack(updates), state), plain_run())


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [{}, {"factored": True}, {"refresh_order": "after_gradient"}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(512, 8), (8, 512), (600, 600)], ids=str)
def test_a_first_update_may_be_used_in_the_program_that_makes_the_state(
    shape: tuple[int, int], options: Any
) -> None:
    """The first update is zero. XLA made sums over it NaN if it knew that the state is zero.

    That happens only on some CPUs. The test therefore also checks that the program hides the zeros
    from XLA.
    """
    optimizer = soap_optax.scale_by_soap(**options)
    assert "optimization_barrier" in jax.jit(optimizer.init).lower(jnp.ones(shape)).as_text()

    @jax.jit
    def first_step(grad: jax.Array) -> Any:
        updates: Any
        updates, state = optimizer.update(grad, optimizer.init(grad))
        moved = jnp.mean(jnp.square((grad + updates) @ grad.T))
        still = jnp.mean(jnp.square(grad @ grad.T))
        return (jnp.sum(updates), jnp.sum(jnp.square(updates)), moved / still), state

    sums, state = first_step(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    # The last number is a ratio of two products, which may add in different orders.
    np.testing.assert_allclose(sums, (0, 0, 1), rtol=1e-5, atol=0)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
def test_no_two_leaves_of_the_first_state_share_a_buffer(jitted: bool) -> None:
    zeros = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    zeros["square"] = jnp.zeros((4, 4))  # Both factors are equal, and so are bases and moments.
    state = jax.jit(OPTIMIZER.init)(zeros) if jitted else OPTIMIZER.init(zeros)
    leaves = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    donate = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    donate(state)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_step_without_a_refresh_copies_no_matrix_of_the_state() -> None:
    computations = read_hlo(donating_step().as_text() or "")
    entry = computations["ENTRY"]
    (conditional,) = [
        line for line in entry if operation(line) == "conditional" and "refresh" in line
    ]
    keep, _ = conditional_branches(conditional)
    # The branch returns its operands unchanged.
    assert {operation(line) for line in computations[keep]} <= {
        "parameter",
        "get-tuple-element",
        "tuple",
    }
    # The operands are not copied for the conditional either, though the step writes some of them
    # afterwards: the factors, which a refresh reads, and the moments.
    matrices = re.compile("stacks__.*__(factors|bases|mu|nu)")
    assert not [line for line in entry if operation(line) == "copy" and matrices.search(line)]
    names = [line.split(" = ")[0] for line in entry if operation(line) == "parameter"]
    assert len(list(filter(matrices.search, names))) == 6  # The names do match.


def read_hlo(text: str) -> dict[str, list[str]]:
    """The lines of every computation of a program by name, with `ENTRY` for the entry."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = "ENTRY" if header[1] else header[2]
            computations[name] = []
        elif " = " in line and name:
            computations[name].append(line)
    return computations


def operation(line: str) -> str:
    """The operation of one line of HLO: the word before the first operand list."""
    found = re.search(r"[\])}] ([a-z][\w-]*)\(", line)
    assert found, line
    return found[1]


def conditional_branches(line: str) -> list[str]:
    """The names of the branches; the branch for 0 or false comes first."""
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
        return [name.strip().lstrip("%") for name in branches[1].split(",")]
    found = [re.search(rf"{which}_computation=%?([\w.-]+)", line) for which in ("false", "true")]
    return [match[1] for match in found if match]


# `vmap`.


@pytest.mark.long
def test_vmap_over_seeds_equals_separate_runs() -> None:
    seeds = [0, 1, 2]
    grads = [draw(seed) for seed in seeds]
    # Members of a batch may refresh at different times: the second one misses two gradients.
    for call in (1, 5):
        grads[1] = {name: leaf.at[call].set(jnp.nan) for name, leaf in grads[1].items()}
    batched_step = jax.jit(jax.vmap(OPTIMIZER.update))
    state, updates = stack([init()] * 3), []
    for call in range(CALLS):
        update, state = batched_step(stack([unstack(grad)[call] for grad in grads]), state)
        updates.append(update)
    for index in range(3):
        wanted, wanted_state = run(plain_step, unstack(grads[index]))
        found = jax.tree.map(lambda leaf, index=index: leaf[:, index], stack(updates))
        found_state = jax.tree.map(lambda leaf, index=index: leaf[index], state)
        assert_close(found, wanted)
        assert_close(found_state, wanted_state)
    assert state.stacks["6x4"].refreshes.tolist() == [[4, 4], [3, 3], [4, 4]]


def _update(grads: Tree, state: State, frequency: int) -> Any:
    return soap_optax.scale_by_soap(precondition_frequency=frequency).update(grads, state)


@pytest.mark.parametrize(
    "axes",
    [[], [(0, 0, None)], [(0, 0, 0)], [(None, 0, None)], [(0, 0, None), (0, 0, None)]],
    ids=["no vmap", "seeds", "seeds and frequencies", "states", "nested"],
)
def test_decompositions_stay_behind_a_real_conditional(
    axes: list[tuple[int | None, int, int | None]],
) -> None:
    arguments: tuple[Any, Any, Any] = (unstack(draw(0))[0], init(), jnp.asarray(FREQUENCY))
    function = _update
    for in_axes in axes:
        function = jax.vmap(function, in_axes)
        arguments = tuple(
            argument if axis is None else stack([argument] * 2)
            for argument, axis in zip(arguments, in_axes, strict=True)
        )
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    chains = list(decompositions(jaxpr))
    assert {chain[-1] for chain in chains} == {"eigenvectors", "qr"}
    for chain in chains:
        # A `cond` with a batched predicate becomes a `select`, and the decomposition always runs.
        assert "cond" in chain
    for equation in equations(jaxpr):
        if equation.primitive.name in ("eigenvectors", "qr"):
            # Each decomposition takes one matrix: a batch of matrices hangs some runtimes.
            assert equation.invars[0].aval.ndim == 2
        if equation.primitive.name == "cond":
            assert equation.invars[0].aval.shape == ()


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation of a program, nested ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)


def decompositions(jaxpr: Jaxpr, outside: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """For every decomposition, the names of the equations around it, and its own name."""
    for equation in jaxpr.eqns:
        chain = (*outside, equation.primitive.name)
        if chain[-1] in ("eigenvectors", "qr"):
            yield chain
        for inner in inner_jaxprs(equation):
            yield from decompositions(inner, chain)


def inner_jaxprs(equation: Any) -> Iterator[Jaxpr]:
    parameters = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr)
    )
    for parameter in parameters:
        if isinstance(parameter, ClosedJaxpr):
            yield parameter.jaxpr
        elif isinstance(parameter, Jaxpr):
            yield parameter


# Size of the program.


def operations_of(optimizer: optax.GradientTransformation, layers: int) -> collections.Counter[str]:
    """The number of operations of each kind in the update of a model with `layers` layers.

    Every operation on only integer scalars counts as "index arithmetic".
    """
    layer = {"q": (8, 8), "up": (8, 16), "down": (16, 8), "bias": (8,), "scale": (8,)}
    shapes = {"embedding": (32, 8), "layers": [layer] * layers}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda node: isinstance(node, tuple))
    lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text()
    kinds = collections.Counter(re.findall(r"@(lapack_\w+)", lowered))
    for line in lowered.splitlines():
        if kind := re.search(r"stablehlo\.(\w+)", line):
            types = set(re.findall(r"tensor<([^>]*)>", line))
            kinds["index arithmetic" if types and types <= {"i1", "i32"} else kind[1]] += 1
    return kinds


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_more_layers_add_nothing_to_the_program_but_the_way_to_their_blocks() -> None:
    few, many = (operations_of(soap_optax.scale_by_soap(), layers) for layers in (5, 48))
    # These take a compiler's time: loops, conditionals, sorts, decompositions, products.
    for kind in ("while", "case", "sort", "custom_call", "dot_general", "lapack_sgeqrf_ffi"):
        assert few[kind] == many[kind] > 0
    moving = {"concatenate", "dynamic_slice", "index arithmetic", "reshape", "slice", "transpose"}
    assert {kind for kind in few | many if few[kind] != many[kind]} <= moving
    adam_few, adam_many = (operations_of(optax.scale_by_adam(), layers) for layers in (5, 48))
    assert many.total() - few.total() < adam_many.total() - adam_few.total()
