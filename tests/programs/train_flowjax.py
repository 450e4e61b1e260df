"""flowjax: a masked autoregressive flow on two moons, with `fit_to_data`."""

import jax
import jax.numpy as jnp
import optax
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_data
from program_result import print_result

import soap_optax

EPOCHS = 15
angle = jax.random.uniform(jax.random.key(0), (2000,)) * jnp.pi
upper = jax.random.bernoulli(jax.random.key(1), shape=(2000,))
sign = jnp.where(upper, 1.0, -1.0)
moons = jnp.stack([sign * jnp.cos(angle) + upper, sign * jnp.sin(angle) - 0.5 * ~upper], axis=1)
moons += 0.1 * jax.random.normal(jax.random.key(2), moons.shape)


def train(optimizer: optax.GradientTransformation) -> float:
    """The best loss on the held-out tenth of the data."""
    flow = masked_autoregressive_flow(
        jax.random.key(3), base_dist=Normal(jnp.zeros(2)), flow_layers=4, nn_width=50
    )
    _, losses = fit_to_data(
        jax.random.key(4),
        flow,
        moons,
        optimizer=optimizer,
        max_epochs=EPOCHS,
        max_patience=EPOCHS,
        show_progress=False,
    )
    return min(losses["val"])


rate = optax.cosine_decay_schedule(1e-2, EPOCHS * 18)  # 18 batches of 100 an epoch.
losses = {
    "adam": train(optax.adam(rate)),
    "soap": train(soap_optax.soap(rate, weight_decay=0.0)),
    "soap_adamw": train(soap_optax.soap_adamw(rate, weight_decay=0.0)),
    "soap_adamw, Adam's betas": train(
        soap_optax.soap_adamw(rate, b1=0.9, b2=0.999, adamw_b2=0.999, weight_decay=0.0)
    ),
}
print_result("flowjax", losses, soap="soap_adamw, Adam's betas", tolerance=0.05)
