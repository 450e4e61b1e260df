"""Optax's own tests for contributed optimizers, run against SOAP.

Optax ships its test files with the package. At import, the file for contributed optimizers expands
its cases from lists of optimizers, and finds each by name in ``optax.contrib``. This module imports
that file again, with this library's cases instead of the lists.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from unittest import mock

import optax
import optax.contrib
import pytest
from absl.testing import parameterized

import soap_optax

# The file is the installed Optax's. It may call functions that a newer JAX deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def implicit_promotion_in_multi_steps(request: pytest.FixtureRequest) -> None:
    """`optax.MultiSteps` promotes dtypes implicitly."""
    if "gradient_accumulation" in request.node.name:
        request.getfixturevalue("implicit_promotion")


def clipped_soap(
    learning_rate: optax.ScalarOrSchedule, precondition_1d: bool = True
) -> optax.GradientTransformationExtraArgs:
    """A chain around `scale_by_soap`, without weight decay."""
    return optax.chain(
        optax.clip_by_global_norm(10.0),
        soap_optax.scale_by_soap(precondition_1d=precondition_1d),
        optax.scale_by_learning_rate(learning_rate),
    )


FACTORIES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "soap": soap_optax.soap,
    "soap_adamw": soap_optax.soap_adamw,
    "clipped_soap": clipped_soap,
    "shampoo": soap_optax.shampoo,
}


def case(
    name: str, wrapper: tuple[str, dict[str, Any]] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """One entry of the lists in Optax's file."""
    wrapper_name, wrapper_kwargs = wrapper or (None, None)
    return {
        "opt_name": name,
        "opt_kwargs": kwargs,
        "wrapper_name": wrapper_name,
        "wrapper_kwargs": wrapper_kwargs,
    }


CASES = [
    # Normalized updates never get smaller: the learning rate decides the distance to a minimum.
    case(
        "soap",
        learning_rate=1e-3,
        shampoo_beta=0.8,
        precondition_1d=True,
        merge_dims=True,
        normalize_grads=True,
        mu_dtype="bfloat16",
        block_size=2,
    ),
]
OTHER_CASES = [
    case("soap", learning_rate=1e-2),
    # Half of the targets are vectors. With factors for vectors, the options affect these, too.
    case(
        "soap",
        learning_rate=1e-2,
        weight_decay=0.0,
        precondition_1d=True,
        precondition_frequency=1,
        correct_bias=False,
    ),
    case("clipped_soap", learning_rate=1e-2),
    case("soap_adamw", learning_rate=1e-2),
    case("shampoo", learning_rate=1e-2, exponent=0.4, precondition_1d=True, block_size=2),
    case("shampoo", learning_rate=1e-2, factor_estimator="kl", refresh="qr"),
    # AdamW's decay. At this learning rate, 1e-2 would move the minimum beyond the tolerance.
    case("soap", ("mechanize", {"weight_decay": 0.0}), learning_rate=1.0, weight_decay=1e-4),
    case("soap", ("schedule_free", {"learning_rate": 1e-2}), learning_rate=1e-2, b1=0.0),
]


def contract_of_the_installed_optax(cases: Sequence[dict[str, Any]]) -> type[Any]:
    """The test class in Optax's file for contributed optimizers, expanded over these cases."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    product = parameterized.product

    def product_over_our_cases(theirs: Sequence[dict[str, Any]], **grid: Any) -> Any:
        assert all(set(case) == set(cases[0]) for case in theirs), "Optax's lists look different"
        return product(cases, **grid)

    with mock.patch.object(parameterized, "product", product_over_our_cases):
        spec.loader.exec_module(module)
    return module.ContribTest


_inject_hyperparams = optax.inject_hyperparams


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation], static_args: Sequence[str]
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Optax's function, with this library's static arguments added to the list in its file."""
    parameters = inspect.signature(factory).parameters
    every = {*soap_optax.STATIC_ARGS, *soap_optax.SHAMPOO_STATIC_ARGS}
    ours = [name for name in parameters if name in every]
    return _inject_hyperparams(factory, static_args=(*static_args, *ours))


class WithOurOptimizers:
    """Lets Optax's tests find this library's optimizers, and skip none."""

    def setUp(self) -> None:  # The name in `unittest`.
        super().setUp()  # pyright: ignore[reportAttributeAccessIssue]  # Mixed into a `TestCase`.
        patches = [
            *(
                mock.patch.object(optax.contrib, name, factory, create=True)
                for name, factory in FACTORIES.items()
            ),
            mock.patch("optax.schedules._inject.inject_hyperparams", inject_hyperparams),
        ]
        for patch in patches:
            self.enterContext(patch)  # pyright: ignore[reportAttributeAccessIssue]  # As above.

    def skipTest(self, reason: Any) -> NoReturn:  # noqa: N802  # The name in `unittest`.
        raise AssertionError(f"would skip: {reason}")


class TestContract(WithOurOptimizers, contract_of_the_installed_optax(CASES)):
    """Optax's tests of a contributed optimizer."""


@pytest.mark.long
class TestContractOfOtherCases(WithOurOptimizers, contract_of_the_installed_optax(OTHER_CASES)):
    """The same tests with other options and wrappers."""
