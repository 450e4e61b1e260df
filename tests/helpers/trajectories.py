"""The recorded trajectories of the authors' code, with options under this library's names."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One recorded run of the authors' code; see ``golden/README.md``."""

    name: str
    learning_rate: float
    options: dict[str, Any]  # The keyword arguments of `scale_by_soap`.
    initial_basis_is_unique: bool
    grads: np.ndarray  # (steps, *shape)
    init: np.ndarray  # shape
    params: np.ndarray  # (steps, *shape)
    initial_bases: dict[int, np.ndarray]  # axis: (d, d)


def load_trajectories() -> list[Trajectory]:
    """All recorded cases, with options under this library's names."""
    cases = json.loads((_GOLDEN / "official_float64.json").read_text())
    with np.load(_GOLDEN / "official_float64.npz") as archive:
        arrays = dict(archive)
    return [_trajectory(name, case, arrays) for name, case in cases.items()]


def _trajectory(name: str, case: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trajectory:
    same_name = (
        "eps",
        "precondition_frequency",
        "max_precond_dim",
        "precondition_1d",
        "merge_dims",
        "normalize_grads",
        "correct_bias",
    )
    b1, b2 = case["betas"]
    shampoo_beta = None if case["shampoo_beta"] == -1 else case["shampoo_beta"]
    bases = {
        axis: arrays[f"{name}/initial_basis_{axis}"]
        for axis in range(len(case["shape"]))
        if f"{name}/initial_basis_{axis}" in arrays
    }
    return Trajectory(
        name=name,
        learning_rate=case["lr"],
        options={
            "b1": b1,
            "b2": b2,
            "shampoo_beta": shampoo_beta,
            **{key: case[key] for key in same_name},
        },
        initial_basis_is_unique=case["initial_basis_is_unique"],
        grads=arrays[f"{name}/grads"],
        init=arrays[f"{name}/init"],
        params=arrays[f"{name}/params"],
        initial_bases=bases,
    )
