"""Tunix: LoRA with `PeftTrainer`, gradient accumulation and checkpoints."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from program_result import print_result
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from soap_optax import soap

STEPS, VOCABULARY = 120, 32
rows = (np.arange(16) * 3 + np.arange(256)[:, None]) % VOCABULARY
batches = [rows[start : start + 32] for start in range(0, 256, 32)] * 60


class Model(nnx.Module):
    """A stand-in for a pretrained model, with LoRA in two layers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, 64, rngs=rngs)
        self.mlp = nnx.LoRALinear(64, 64, lora_rank=8, rngs=rngs)
        self.head = nnx.LoRALinear(64, VOCABULARY, lora_rank=8, rngs=rngs)

    def __call__(self, tokens, *_):
        return self.head(jax.nn.gelu(self.mlp(self.embed(tokens)))), None


def make_input(tokens):
    ones = jnp.ones(tokens.shape)
    names = ("input_tokens", "input_mask", "positions", "attention_mask")
    return dict(zip(names, (tokens, ones, ones, ones), strict=True))


def train(optimizer, folder=None, steps=STEPS):
    """The loss after a run, or after one that continues the checkpoint in `folder`."""
    model = Model()
    options = {"gradient_accumulation_steps": 2, "checkpoint_root_directory": folder}
    config = TrainingConfig(eval_every_n_steps=10_000, max_steps=steps, **options)
    trainer = PeftTrainer(model, optimizer, config).with_gen_model_input_fn(make_input)
    trainer.train(batches)
    trainer.close()
    return trainer.loss_fn(model, **make_input(rows))


def make_soap(rate: float):
    return optax.inject_hyperparams(soap)(rate, weight_decay=0.0)


losses = {
    f"{name}, {rate}": train(make(rate))
    for name, make in (("adamw", optax.adamw), ("soap", make_soap))
    for rate in (1e-2, 3e-2)
}
with tempfile.TemporaryDirectory() as folder:
    train(make_soap(3e-2), folder, STEPS // 2)
    continued = train(make_soap(3e-2), folder)
assert abs(continued - losses["soap, 0.03"]) < 1e-3, (continued, losses)
checked = {"usual": "adamw, 0.01", "soap": "soap, 0.03", "checkpoint": "continues from step 60"}
print_result("google-tunix", losses, **checked)
