"""The precision that products request, and the dtype in which they are computed."""

import collections
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.lax import DotAlgorithmPreset, Precision

import soap_optax
from soap_optax.algorithm import RefreshMethod as Method

HIGHEST = (Precision.HIGHEST, Precision.HIGHEST)
SHAPE = (6, 4)


def equations(jaxpr: Jaxpr, outside: tuple[str, ...] = ()) -> Iterator[tuple[Any, bool]]:
    """Every equation of a program, nested ones included, and whether it belongs to a refresh."""
    for equation in jaxpr.eqns:
        names = (*outside, str(equation.params.get("name", "")))
        yield equation, "refresh_if_due" in names
        parameters = jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr),
        )
        for inner in parameters:
            if isinstance(inner, ClosedJaxpr):
                yield from equations(inner.jaxpr, names)
            elif isinstance(inner, Jaxpr):
                yield from equations(inner, names)


def jaxpr_of(shape: tuple[int, ...] = SHAPE, **options: Any) -> Jaxpr:
    optimizer = soap_optax.scale_by_soap(**options)
    params = {"first": jnp.zeros(shape), "second": jnp.zeros(shape)}
    return jax.make_jaxpr(optimizer.update)(params, optimizer.init(params)).jaxpr


def precisions(jaxpr: Jaxpr) -> tuple[list[Any], list[Any], list[Any]]:
    """The precisions of the rotations, of the Gram matrices, and of the products of a refresh."""
    rotations, gram_matrices, refresh = [], [], []
    for equation, is_of_refresh in equations(jaxpr):
        if equation.primitive.name != "dot_general":
            continue
        *_, m, n = equation.outvars[0].aval.shape
        # A rotation of a step returns 6x4 or 4x6. A Gram matrix is square.
        products = refresh if is_of_refresh else gram_matrices if m == n else rotations
        products.append(equation.params["precision"])
    return rotations, gram_matrices, refresh


@pytest.mark.parametrize("refresh", get_args(Method))
@pytest.mark.parametrize(
    ("precision", "asked"),
    [
        (None, None),
        ("highest", HIGHEST),
        ("high", (Precision.HIGH, Precision.HIGH)),
        (Precision.DEFAULT, (Precision.DEFAULT, Precision.DEFAULT)),
        ("BF16_BF16_F32", DotAlgorithmPreset.BF16_BF16_F32),
    ],
    ids=str,
)
def test_products_that_rotate_have_the_precision_asked_for_and_all_others_the_highest(
    precision: Any, asked: Any, refresh: Method
) -> None:
    found = precisions(jaxpr_of(precision=precision, refresh=refresh))
    rotations, gram_matrices, of_refresh = found
    assert rotations == [asked] * 4  # Two rotate into the eigenbasis, and two rotate back.
    assert gram_matrices == [HIGHEST] * 2
    assert set(of_refresh) == {HIGHEST}


@pytest.mark.parametrize(
    "options",
    [
        {"refresh_order": "after_gradient", "refresh_tolerance": 0.1},
        {"factored": True, "fold_factors": True, "preconditioner_dtype": jnp.bfloat16},
    ],
    ids=lambda options: " ".join(options),
)
def test_other_options_change_no_precision(options: dict[str, Any]) -> None:
    rotations, gram_matrices, of_refresh = precisions(jaxpr_of(precision="high", **options))
    assert rotations == [(Precision.HIGH, Precision.HIGH)] * 4
    assert gram_matrices == [HIGHEST] * 2
    assert set(of_refresh) == {HIGHEST}


def test_one_sided_rotates_half_as_often() -> None:
    rotations, gram_matrices, of_refresh = precisions(jaxpr_of(precision="high", one_sided=True))
    assert rotations == [(Precision.HIGH, Precision.HIGH)] * 2
    assert gram_matrices == [HIGHEST]
    assert set(of_refresh) == {HIGHEST}


@pytest.mark.parametrize("order", ["before_gradient", "after_gradient"])
def test_kl_factors_take_one_more_product_and_feed_on_none_below_the_highest_precision(
    order: str,
) -> None:
    options: dict[str, Any] = {"factor_estimator": "kl", "refresh_order": order}
    rotations, gram_matrices, of_refresh = precisions(jaxpr_of(precision="high", **options))
    # A factor uses the gradient rotated along the other axis. It uses neither the product that
    # completes the rotation nor the two that rotate back. A refresh after the gradient needs the
    # gradient rotated again.
    halves = 2 if order == "before_gradient" else 4
    assert collections.Counter(rotations) == {HIGHEST: halves, (Precision.HIGH,) * 2: 3}
    assert gram_matrices == [HIGHEST] * 2
    assert set(of_refresh) == {HIGHEST}


def test_none_is_what_jax_is_configured_to() -> None:
    with jax.default_matmul_precision("high"):
        rotations, gram_matrices, of_refresh = precisions(jaxpr_of())
    assert rotations == [(Precision.HIGH, Precision.HIGH)] * 4
    assert gram_matrices == [HIGHEST] * 2
    assert set(of_refresh) == {HIGHEST}


@pytest.mark.parametrize("refresh", get_args(Method))
def test_narrow_storage_is_widened_before_any_product_or_decomposition(refresh: Method) -> None:
    narrow = {"preconditioner_dtype": jnp.bfloat16, "mu_dtype": jnp.bfloat16}
    heavy = {
        "dot_general",
        "eigenvectors",
        "qr",
        "cholesky",
        "triangular_solve",
        "householder_product",
    }
    seen = set()
    for equation, _ in equations(jaxpr_of(refresh=refresh, fold_factors=True, **narrow)):
        if equation.primitive.name in heavy:
            seen.add(equation.primitive.name)
            floats = {v.aval.dtype for v in equation.invars if v.aval.dtype.kind in "fV"}
            assert floats == {jnp.dtype("float32")}, equation
    assert {"dot_general", "eigenvectors"} <= seen
