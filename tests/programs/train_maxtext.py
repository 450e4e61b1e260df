"""MaxText: a tiny Llama on eight devices with `train_loop`, patched as the page on MaxText says."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import numpy as np
import optax
from page_code import fences, module_text
from program_result import print_result

STEPS, PAGE = 60, "docs/how-to/maxtext.md"
own = tempfile.TemporaryDirectory()  # A copy of the package, which the page's diffs change.
folder = pathlib.Path(own.name)
package = folder / "maxtext"
shutil.copytree(pathlib.Path(importlib.util.find_spec("maxtext").origin).parent, package)
functions = module_text(PAGE, ("numbers", "soap_optimizer", "shard_soap"))
(package / "optimizers" / "soap.py").write_text(functions)
patch = ["patch", "--strip=2", f"--directory={folder}"]
subprocess.run(patch, input="".join(fences(PAGE, "diff")), text=True, check=True)
sys.path.insert(0, str(folder))
from maxtext.trainers.pre_train import train  # noqa: E402

sizes = """base_emb_dim=32 base_mlp_dim=64 base_num_decoder_layers=2 base_num_query_heads=2
base_num_kv_heads=2 head_dim=16 vocab_size=64 max_target_length=32 per_device_batch_size=2
dataset_type=synthetic hardware=cpu dtype=float32 attention=dot_product scan_layers=true
skip_jax_distributed_system=true save_checkpoint_on_start=false async_checkpointing=false"""
compiled_texts, compile_step = [], jax.stages.Lowered.compile


def compile_and_keep(lowered, *arguments, **options):
    compiled = compile_step(lowered, *arguments, **options)
    compiled_texts.append(compiled.as_text())
    return compiled


def run(name, rate, steps=STEPS, checkpoints=False):
    """The losses and the last state. Continues a checkpoint of the same name."""
    metrics = folder / f"{name}-{rate}-{steps}-{checkpoints}"
    arguments = f"run_name={name} opt_type={name} learning_rate={rate} steps={steps}"
    arguments += f" learning_rate_schedule_steps={STEPS} enable_checkpointing={checkpoints}"
    arguments += f" base_output_directory={folder} metrics_file={metrics}"
    config = ["", str(package / "configs" / "base.yml"), *sizes.split(), *arguments.split()]
    state = train.train_loop(*train.initialize(config))
    return [json.loads(line)["learning/loss"] for line in metrics.read_text().splitlines()], state


losses = {f"adamw, {rate}": run("adamw", rate)[0][-1] for rate in (1e-2, 3e-2)}
jax.stages.Lowered.compile = compile_and_keep
losses["soap, 0.01"] = run("soap", 1e-2)[0][-1]
kept, state = run("soap", 3e-2)
losses["soap, 0.03"] = kept[-1]
# Stacks have 8 blocks here. Each device has the factors of one, and no others.
train_step = next(text for text in compiled_texts if "train_step" in text.partition("\n")[0])
assert "f32[1,64,64]" in train_step
assert "f32[8,64,64]" not in train_step
for leaf in jax.tree.leaves(optax.tree.get(state.optimizer.opt_state, "stacks")):
    assert leaf.addressable_shards[0].data.shape[0] * 8 == leaf.shape[0]
run("soap", 3e-2, STEPS // 2, checkpoints=True)
continued, _ = run("soap", 3e-2, checkpoints=True)
np.testing.assert_allclose(continued, kept[STEPS // 2 :], rtol=1e-3)
checked = {"usual": "adamw, 0.03", "soap": "soap, 0.03", "checkpoint": "continues from step 30"}
print_result("maxtext", losses, tolerance=0.002, **checked)
