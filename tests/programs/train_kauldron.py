"""Kauldron: an autoencoder of small images with `Trainer`, a Grain pipeline and checkpoints."""

import tempfile

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from kauldron import kd, kontext
from program_result import print_result

from soap_optax import soap

STEPS = 200
grid = np.linspace(-1, 1, 8)
options = {optax.adam: {}, soap: {"weight_decay": 0.0}}
phase = np.random.default_rng(0).uniform(0, np.pi, (256, 2, 1, 1))
waves = np.cos(phase[:, 0] + 3 * grid[:, None]) * np.sin(phase[:, 1] + 3 * grid)
images = waves[..., None].astype(np.float32)
examples = [{"image": image} for image in images]


class Autoencoder(nn.Module):
    """A convolution and dense layers, with four numbers in the middle."""

    image: kontext.Key = "batch.image"

    @nn.compact
    def __call__(self, image):
        x = nn.gelu(nn.Conv(16, (3, 3), strides=2)(image))
        x = nn.Dense(4)(x.reshape(len(x), -1))
        return nn.Dense(64)(nn.gelu(nn.Dense(64)(x))).reshape(image.shape)


def train(make, rate, folder=None, steps=STEPS):
    """The loss on all images after a run, or after one that continues the checkpoint."""
    trainer = kd.train.Trainer(
        workdir=folder or tempfile.mkdtemp(),
        train_ds=kd.data.py.DataSource(examples, shuffle=True, batch_size=32, num_workers=0),
        model=Autoencoder(),
        optimizer=make(optax.cosine_decay_schedule(rate, STEPS), **options[make]),
        num_train_steps=steps,
        train_losses={"square": kd.losses.L2(preds="preds", targets="batch.image")},
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=STEPS // 2) if folder else None,
        writer=None,
        profiler=None,
    )
    params = trainer.train()[0].params
    found = trainer.model.apply({"params": params}, images)
    return jnp.mean((found - images) ** 2)


losses = {
    f"{make.__name__}, {rate}": train(make, rate)
    for make in (optax.adam, soap)
    for rate in (1e-2, 3e-2)
}
with tempfile.TemporaryDirectory() as folder:
    train(soap, 3e-2, folder, STEPS // 2)
    continued = train(soap, 3e-2, folder)
assert continued == losses["soap, 0.03"], (continued, losses)
checked = {"usual": "adam, 0.03", "soap": "soap, 0.03", "checkpoint": "continues from step 100"}
print_result("kauldron", losses, **checked)
