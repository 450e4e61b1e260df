"""Levanter: a tiny GPT-2 on eight devices with `Trainer`, with the code of the page on Levanter."""

import dataclasses
import tempfile
from pathlib import Path

import equinox as eqx
import haliax as hax
import jax
import numpy as np
import optax
from haliax import NamedArray
from haliax.nn import Linear
from levanter.checkpoint import CheckpointerConfig
from levanter.data.dataset import ListAsyncDataset
from levanter.models.gpt2 import Gpt2Config
from levanter.models.lm_model import LmExample
from levanter.optim.config import AdamConfig, OptimizerConfig
from levanter.optim.soap import SoapConfig
from levanter.tracker.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig
from page_code import added_file, module_text
from program_result import print_result

STEPS, PAGE = 60, "docs/how-to/levanter.md"
namespace = dict(globals())
exec(module_text(PAGE, ("is_linear", "numbers", "labels", "with_names")), namespace)
exec(added_file(PAGE, "lib/levanter/src/levanter/optim/soap_optax.py"), namespace)
model = Gpt2Config(32, hidden_dim=32, num_layers=2, num_heads=2, gradient_checkpointing=False)
Vocab = hax.Axis("vocab", 64)
mapping = {"embed": "data", "soap_block": ["replica_dcn", "replica", "data", "model"]}
tokens = np.cumsum(np.random.default_rng(0).integers(0, 4, (512, 32)), axis=1) % 64
data = [LmExample.causal(hax.named(row, model.max_Pos)) for row in tokens.astype(np.int32)]


def cross_entropy(model, example, key=None):
    return model.compute_next_token_loss(example, key=key)


def train(make, steps=STEPS, folder=None):
    """The last loss and state, of a run or of one that continues the checkpoint in `folder`."""
    checkpointer = CheckpointerConfig(base_path=folder or tempfile.mkdtemp())
    config = TrainerConfig(id="run", require_accelerator=False, checkpointer=checkpointer)
    config.tracker, config.train_batch_size, config.num_train_steps = NoopConfig(), 16, steps
    config.mesh = dataclasses.replace(config.mesh, param_mapping=mapping)
    config._validate_and_set_defaults()
    with Trainer(config, make(config), cross_entropy) as own:
        key = jax.random.PRNGKey(0)
        state = own.initial_state(key, model_init=lambda: model.build(Vocab, key=key))
        info = own.train(state, own.data_loader(ListAsyncDataset(data)).iter_from_step(state.step))
    return info.loss, info.state


def soap(config):
    return namespace["SoapOptaxConfig"](**rate).build(STEPS, config.device_mesh)


rate = {"learning_rate": 1e-2, "lr_schedule": "constant"}
losses = {"adam": train(lambda _: AdamConfig(**rate).build(STEPS))[0]}
losses["Levanter's soap"] = train(lambda _: SoapConfig(**rate).build(STEPS))[0]
losses["soap"], state = train(soap)
stacks = optax.tree.get(state.opt_state, "stacks")
for leaf in jax.tree.leaves(eqx.filter(stacks, eqx.is_array)):
    assert leaf.addressable_shards[0].data.shape[0] * 8 == leaf.shape[0]  # Each device has its own.
step = sorted(Path("compiled").glob("*train_step*after_optimizations.txt"))[-1].read_text()
assert "f32[1,128,128]" in step
assert "f32[8,128,128]" not in step
with tempfile.TemporaryDirectory() as folder:
    train(soap, STEPS // 2, folder)
    assert abs(train(soap, STEPS, folder)[0] - losses["soap"]) < 1e-3
print_result("marin-levanter", losses, tolerance=0.1, checkpoint="continues from step 30")
