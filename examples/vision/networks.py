"""Small convolutional networks in Flax Linen, for images and for signals."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn

from vision.datasets import CLASSES

GROUPS = 8  # of channels, which `GroupNorm` normalizes together


class Block(nn.Module):
    """A residual block of two convolutions.

    Attributes:
      channels: of the output.
      stride: of the first convolution.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `(n, height, width, c)` to `(n, height / stride, width / stride, channels)`."""
        strides = (self.stride, self.stride)
        x = nn.Conv(self.channels, (3, 3), strides, use_bias=False, name="conv_1")(inputs)
        x = nn.relu(nn.GroupNorm(GROUPS, name="norm_1")(x))
        x = nn.Conv(self.channels, (3, 3), use_bias=False, name="conv_2")(x)
        x = nn.GroupNorm(GROUPS, name="norm_2")(x)
        if x.shape != inputs.shape:
            inputs = nn.Conv(self.channels, (1, 1), strides, use_bias=False, name="conv_skip")(
                inputs
            )
        return nn.relu(x + inputs)


class ResNet(nn.Module):
    """A residual network for small images. It has no state besides its parameters."""

    channels: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images, `(n, height, width, 1)`, to logits, `(n, 10)`."""
        x = nn.Conv(self.channels[0], (3, 3), (2, 2), use_bias=False, name="conv_in")(images)
        x = nn.relu(nn.GroupNorm(GROUPS, name="norm_in")(x))
        for number, channels in enumerate(self.channels):
            x = Block(channels, 1 if number == 0 else 2, name=f"block_{number}")(x)
        return nn.Dense(CLASSES, name="head")(x.mean(axis=(1, 2)))


class SignalNet(nn.Module):
    """Three convolutions along a signal."""

    channels: int = 32

    @nn.compact
    def __call__(self, signals: jax.Array) -> jax.Array:
        """Maps signals, `(n, length, 1)`, to logits, `(n, 10)`."""
        x = signals
        for number, size in enumerate((5, 3, 3)):
            x = nn.relu(nn.Conv(self.channels, (size,), (2,), name=f"conv_{number}")(x))
        return nn.Dense(CLASSES, name="head")(x.reshape(len(x), -1))


NETWORKS: dict[str, nn.Module] = {"digits": ResNet(), "signals": SignalNet()}
