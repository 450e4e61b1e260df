"""What one gradient that is 1000 times too large does to updates, with limits and without.

    pip install ".[benchmarks]"
    python tests/benchmarks/spikes.py --image docs/images/spikes.png

A network with one hidden layer learns another one from noisy targets. Each chain trains it twice on
the same batches: as it is, and with the gradient of one step multiplied. All seeds of both runs are
one program.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# OpenBLAS's threads and XLA's fight over the cores; OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import results
from jax import Array
from matplotlib.figure import Figure
from tqdm import tqdm

import soap_optax

WIDTH = 24
BATCH = 32
BEFORE, AFTER = 500, 500  # Steps before the spike and from the spike on.
NOISE = 0.5  # Standard deviation of the targets.
WINDOW = 10  # Steps over which update norms are averaged.
NEAR = 0.1  # How far an average may be from the one without a spike.


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The number of steps before and from the spike on, its size, and the number of seeds."""

    before: int
    after: int
    factor: float
    seeds: int


# Chains -------------------------------------------------------------------------------------------


def matrices(params: Any) -> Any:
    """Muon's dimension numbers: rows and columns."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(0, 1), params)


def soap_then(
    limit: optax.GradientTransformation, learning_rate: float = 3e-3
) -> optax.GradientTransformation:
    return optax.chain(
        soap_optax.scale_by_soap(), limit, optax.scale_by_learning_rate(learning_rate)
    )


def without_refresh() -> optax.GradientTransformation:
    """SOAP whose bases stay as they are from shortly before the spike on."""

    def frequency(count: Any) -> Array:
        return jnp.where(count < BEFORE - 20, 10, 2**30)

    return optax.chain(
        soap_optax.scale_by_soap(precondition_frequency=frequency),
        optax.scale_by_learning_rate(3e-3),
    )


def chains() -> dict[str, optax.GradientTransformation]:
    """The chains by name. Limits are twice as large as usual gradients and updates."""
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=matrices)
    free = soap_optax.soap(3e-3, b1=0.0, weight_decay=0.0)
    return {
        "AdamW, for comparison": optax.adamw(3e-3, b1=0.95, b2=0.95, weight_decay=0.0),
        "SOAP": soap_then(optax.identity()),
        "SOAP, no refresh after the spike": without_refresh(),
        "`clip_by_global_norm(9)`, SOAP": optax.chain(
            optax.clip_by_global_norm(9.0), soap_then(optax.identity())
        ),
        "`clip_by_running_norm()`, SOAP": optax.chain(
            soap_optax.clip_by_running_norm(), soap_then(optax.identity())
        ),
        "`soap_adamw(max_norm_ratio=3)`": soap_optax.soap_adamw(
            3e-3, max_norm_ratio=3.0, weight_decay=0.0
        ),
        "SOAP, `clip_by_global_norm(15)`": soap_then(optax.clip_by_global_norm(15.0)),
        "SOAP, `clip_by_block_rms(0.4)`": soap_then(optax.clip_by_block_rms(0.4)),
        "SOAP, `scale_by_trust_ratio()`": soap_then(optax.scale_by_trust_ratio()),
        "SOAP, `scale_by_muon()`": soap_then(muon),
        "`schedule_free(SOAP)`": optax.contrib.schedule_free(free, learning_rate=3e-3),
    }


# One chain ----------------------------------------------------------------------------------------


def predict(params: Any, inputs: Array) -> Array:
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


def network(key: Array) -> dict[str, Array]:
    first, second = jax.random.normal(key, (2, WIDTH, WIDTH)) / WIDTH**0.5
    return {"first": first, "second": second}


def train(
    optimizer: optax.GradientTransformation, schedule: Schedule, seed: Array, factor: Array
) -> tuple[Array, Array]:
    """The norm of the update, and the loss without noise, in each step, `(steps,)`."""
    start_key, target_key, data_key = jax.random.split(jax.random.key(seed), 3)
    start, target = network(start_key), network(target_key)
    clean = jax.random.normal(data_key, (512, WIDTH))

    def step(carry: Any, number: Array) -> tuple[Any, tuple[Array, Array]]:
        params, state = carry
        inputs_key, noise_key = jax.random.split(jax.random.fold_in(data_key, number))
        inputs = jax.random.normal(inputs_key, (BATCH, WIDTH))
        noise = NOISE * jax.random.normal(noise_key, (BATCH, WIDTH))

        def loss(params: Any) -> Array:
            errors = predict(params, inputs) - predict(target, inputs) - noise
            return jnp.mean(jnp.sum(jnp.square(errors), axis=1))

        grads = jax.grad(loss)(params)
        scale = jnp.where(number == schedule.before, factor, 1.0)
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        updates, state = optimizer.update(grads, state, params)
        error = jnp.mean(jnp.sum(jnp.square(predict(params, clean) - predict(target, clean)), 1))
        new_params = optax.apply_updates(params, updates)
        return (new_params, state), (optax.tree.norm(updates), error)

    numbers = jnp.arange(schedule.before + schedule.after)
    return jax.lax.scan(step, (start, optimizer.init(start)), numbers)[1]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a chain did, without a spike and with it: `(2, seeds, steps)` each."""

    chain: str
    norms: np.ndarray
    losses: np.ndarray
    spike: int  # The number of its step.

    @property
    def before(self) -> np.ndarray:
        """The median norm of the updates in the steps before the spike, `(seeds, 1)`."""
        return np.median(self.norms[1, :, self.spike // 2 : self.spike], axis=1, keepdims=True)

    @property
    def largest(self) -> float:
        """The largest update from the spike on, in multiples of those before; median of seeds."""
        after = self.norms[1, :, self.spike :] / self.before
        return float(np.median(np.max(after, axis=1)))

    @property
    def smallest(self) -> float:
        """The smallest average of the updates, in multiples of those without a spike."""
        return float(np.median(np.min(self.ratios, axis=1)))

    @property
    def ratios(self) -> np.ndarray:
        """Averaged norms with the spike over those without it, from the spike on, `(seeds, n)`."""
        kernel = np.ones(WINDOW) / WINDOW
        plain, spiked = (
            np.stack([np.convolve(norms[self.spike :], kernel, "valid") for norms in of_run])
            for of_run in self.norms
        )
        return spiked / plain

    @property
    def steps_away(self) -> float:
        """The steps until the averaged update stays near the one without a spike, or infinity."""
        away = np.abs(self.ratios - 1) > NEAR
        last = np.where(np.any(away, axis=1), away.shape[1] - np.argmax(away[:, ::-1], axis=1), 0)
        return float(np.median(np.where(last == away.shape[1], np.inf, last)))

    @property
    def worst_loss(self) -> float:
        """The largest loss from the spike on, in multiples of the one without it at that step."""
        plain, spiked = self.losses[:, :, self.spike :]
        return float(np.median(np.max(spiked / plain, axis=1)))

    @property
    def last_loss(self) -> float:
        """The loss after the last step, in multiples of the one without a spike."""
        plain, spiked = self.losses[:, :, -1]
        return float(np.median(spiked / plain))


def run_chain(name: str, optimizer: optax.GradientTransformation, schedule: Schedule) -> Run:
    def both(seed: Array) -> tuple[Array, Array]:
        factors = jnp.asarray([1.0, schedule.factor])
        return jax.vmap(lambda factor: train(optimizer, schedule, seed, factor))(factors)

    seeds = jnp.arange(schedule.seeds)
    norms, losses = jax.jit(jax.vmap(both, out_axes=1))(seeds)
    return Run(name, np.asarray(norms), np.asarray(losses), schedule.before)


# Report -------------------------------------------------------------------------------------------


def steps_text(run: Run) -> str:
    return "more than all" if np.isinf(run.steps_away) else f"{run.steps_away:.0f}"


COLUMNS: Mapping[str, Callable[[Run], str]] = {
    "chain": lambda run: run.chain,
    "largest update": lambda run: f"{run.largest:.2f}",
    "smallest update": lambda run: f"{run.smallest:.2f}",
    "steps until within 10%": steps_text,
    "largest loss": lambda run: f"{run.worst_loss:.2f}",
    "last loss": lambda run: f"{run.last_loss:.2f}",
}


def draw(runs: Sequence[Run], path: Path) -> None:
    """Update norms and losses over the steps around the spike, in multiples of the usual ones."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        steps = np.arange(run.norms.shape[2]) - run.spike
        label = run.chain.replace("`", "")
        left.plot(steps, np.median(run.norms[1] / run.before, axis=0), label=label, linewidth=1)
        plain, spiked = run.losses
        right.plot(steps, np.median(spiked / plain, axis=0), label=label, linewidth=1)
    left.set(ylabel="norm of the update, in multiples of those before", ylim=(0.2, 20))
    right.set(ylabel="loss, in multiples of the one without a spike")
    for axes in (left, right):
        axes.set(xlabel="steps from the spike on", xlim=(-50, None), yscale="log")
        axes.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--before", type=int, default=BEFORE, help="steps before the spike")
    add("--after", type=int, default=AFTER, help="steps from the spike on")
    add("--factor", type=float, default=1000.0, help="size of the spike")
    add("--seeds", type=int, default=5)
    add("--chains", nargs="+", help="names of chains; all if not given")
    add("--image", type=Path, help="file for the picture")
    settings = parser.parse_args(arguments)
    schedule = Schedule(settings.before, settings.after, settings.factor, settings.seeds)
    print(f"{results.circumstances('spikes.py', arguments)}\n")
    known = chains()
    names = settings.chains or list(known)
    runs = [
        run_chain(name, known[name], schedule) for name in tqdm(names, "chains", file=sys.stderr)
    ]
    print(results.markdown(COLUMNS, runs))
    if settings.image:
        draw(runs, settings.image)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
