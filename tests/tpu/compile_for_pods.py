"""Compiles training steps for TPU pods, ahead of time and without a TPU, and tabulates them.

    pip install ".[tpu]"
    python tests/tpu/compile_for_pods.py --models 360m 660m 7b --pods v5e:16x16 v5p:8x8x8

Layers are sharded over all chips of a pod, or over groups of chips with all layers in each group.
Each split gets five tables, with a row for each pod, model and optimizer:

- compile time;
- parameters and state of a chip;
- temporaries of a chip;
- collectives of the training step, and the bytes that a chip receives in them;
- the same for the update compiled alone, which is the communication of the optimizer.

Collectives in a loop over layers count once. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no TPU to query,
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and none to share.

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import soap_optax

# Models -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only transformer with SwiGLU or plain MLPs; its layers are stacked for a scan."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int
    context: int
    batch: int  # sequences in a step
    gated: bool
    block_size: int  # of SOAP; all chips of a pod of 256 then have equally many blocks
    along_width: bool = False  # whether layers are sharded along it, and not their longest axis


# The paper's models (Vyas et al., 2024, section 5) have OLMo's architecture, the T5 tokenizer, a
# context of 1,024 and batches of two million tokens. The 7B model has the sizes of Llama 2. The
# vocabularies are padded to a multiple of 512.
MODELS = {
    "360m": Model(24, 1024, 4096, 16, 32256, 1024, 2048, gated=False, block_size=256),
    "660m": Model(24, 1408, 5632, 22, 32256, 1024, 2048, gated=False, block_size=352),
    "7b": Model(
        32, 4096, 11008, 32, 32256, 2048, 1024, gated=True, block_size=256, along_width=True
    ),
}


def shapes_of(model: Model) -> dict[str, Any]:
    """The shapes of the parameters."""
    d, h, n = model.width, model.hidden, model.layers
    names = ("query", "key", "value", "out")
    mlp = {"up": (n, d, h), "down": (n, h, d)} | ({"gate": (n, d, h)} if model.gated else {})
    shapes = {
        "embedding": (model.vocabulary, d),
        "layers": {
            "attention": dict.fromkeys(names, (n, d, d)),
            "mlp": mlp,
            "norms": {"attention": (n, d), "mlp": (n, d)},
        },
        "lm_head": (d, model.vocabulary),
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def specs_of(model: Model, params: Any, split: str, chips: int) -> Any:
    """Matrices of layers sharded over all chips or over a group; embeddings over all chips.

    A step gathers each layer when it needs it, within a group if every group has all layers.
    Matrices are sharded along one axis, or along both if the number of chips does not divide it.
    The lengths of shards and tiles divide each other.
    """

    def spec(leaf: jax.ShapeDtypeStruct) -> P:
        *layers, rows, columns = leaf.shape
        if not layers and rows == model.layers:
            return P()  # Norms.
        length = model.width if layers and model.along_width else max(rows, columns)
        before = [None] * (len(layers) + int(rows != length))
        if layers and split == "groups":
            return P(*before, AXES[-1])
        return P(*before, AXES) if length % chips == 0 else P(*[None] * len(layers), *AXES)

    return jax.tree.map(spec, params)


def loss_of(model: Model, activations: NamedSharding) -> Callable[[Any, jax.Array], jax.Array]:
    """The cross-entropy of a batch, with the sharding of activations."""
    heads, size = model.heads, model.width // model.heads

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def attention(x: jax.Array, w: Any) -> jax.Array:
        b, t, d = x.shape
        q, k, v = ((x @ w[name]).reshape(b, t, heads, size) for name in ("query", "key", "value"))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, d) @ w["out"]

    def mlp(x: jax.Array, w: Any) -> jax.Array:
        up = x @ w["up"]
        up = jax.nn.silu(x @ w["gate"]) * up if model.gated else jax.nn.gelu(up)
        return up @ w["down"]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        w = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), w)
        x = x + attention(norm(x, w["norms"]["attention"]), w["attention"])
        x = x + mlp(norm(x, w["norms"]["mlp"]), w["mlp"])
        return jax.lax.with_sharding_constraint(x, activations), None

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"].astype(jnp.bfloat16)[tokens[:, :-1]]
        x = jax.lax.with_sharding_constraint(x, activations)
        x, _ = jax.lax.scan(layer, x, params["layers"])
        logits = (x @ params["lm_head"].astype(jnp.bfloat16)).astype(jnp.float32)
        logits = jax.lax.with_sharding_constraint(logits, activations)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


# Optimizers ---------------------------------------------------------------------------------------


def matrices_of_layers(params: Any) -> Any:
    """Dimension numbers in which the first axis of stacked layers is a batch axis."""
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda leaf: numbers if len(leaf.shape) == 3 else None, params)


def make_optimizer(label: str, model: Model, sharding: NamedSharding, of_params: Any) -> Any:
    """AdamW, or SOAP for the layers' matrices with AdamW for the rest."""
    optimizer = adamw = optax.adamw(3e-3)
    if label != "AdamW":
        soap = soap_optax.soap(
            3e-3,
            block_size=model.block_size,
            dimension_numbers=matrices_of_layers,
            stack_sharding=sharding,
            param_shardings=of_params if label == "SOAP" else None,
        )
        optimizer = optax.partition({"soap": soap, "adamw": adamw}, soap_optax.default_labels)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


# Programs -----------------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (?P<result>.*?) "
    r"(?P<kind>all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("
    r".*channel_id=(?P<channel>\d+)"
)
SHAPE = re.compile(r"(pred|s8|u8|bf16|f16|s32|u32|f32|f64)\[([\d,]*)\]")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Properties of a compiled program, for one chip."""

    seconds: float
    temporaries: int  # bytes
    collectives: dict[str, int]
    received: int  # bytes, as results of collectives
    inside: int  # collectives in the refresh or in the step of blocks


def compile_program(lowered: Any, of_optimizer: bool) -> Compiled:
    """Compiles a program and counts its collectives.

    A collective that overlaps with other work appears several times, with one channel. A collective
    is inside the optimizer's work if its name shows that. Some collectives have no name. In a
    program of the optimizer alone, these are inside if they are in a branch or a loop.
    """
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    found = [match for line in text.splitlines() if (match := COLLECTIVE.search(line))]
    matches = {(match["kind"], match["channel"]): match for match in found}.values()
    received = sum(
        BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        for match in matches
        for dtype, dims in SHAPE.findall(match["result"])
    )
    lines = {match.string for match in matches}
    inside = {line for line in lines if "/refresh/" in line or "/step/" in line}
    if of_optimizer:
        entry = text[text.index("\nENTRY ") :]
        inside |= {line for line in lines if "op_name=" not in line and line not in entry}
    kinds = Counter(match["kind"] for match in matches)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Compiled(seconds, temporaries, dict(sorted(kinds.items())), received, len(inside))


@dataclasses.dataclass(frozen=True)
class Row:
    """A training step of one model with one optimizer on one pod; bytes are per chip."""

    pod: str
    model: str
    sharded_over: int  # chips
    optimizer: str
    parameters: int
    state: int
    even_share: float
    largest_stack: int
    step: Compiled
    update: Compiled


def compile_step(pod: str, name: str, split: str, label: str, mesh: Mesh) -> Row:
    """Compiles a training step, and its update alone."""
    model, stack_sharding = MODELS[name], NamedSharding(mesh, P(mesh.axis_names))
    params = shapes_of(model)
    specs = specs_of(model, params, split, mesh.size)
    of_params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    optimizer = make_optimizer(label, model, stack_sharding, of_params)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        of_params,
    )
    state = jax.eval_shape(optimizer.init, params)
    of_state = soap_optax.state_shardings(state, stack_sharding, params)
    tokens = jax.ShapeDtypeStruct(
        (model.batch, model.context + 1), jnp.int32, sharding=NamedSharding(mesh, P(AXES))
    )
    loss = loss_of(model, NamedSharding(mesh, P(AXES)))

    def update(grads: Any, params: Any, state: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        # Without a constraint, the optimizer's use of gradients would decide how to compute them.
        grads = jax.lax.with_sharding_constraint(grads, of_params)
        return *update(grads, params, state), value

    whole_step = jax.jit(
        step,
        in_shardings=(of_params, of_state, tokens.sharding),
        out_shardings=(of_params, of_state, None),
        donate_argnums=(0, 1),
    )
    update_alone = jax.jit(
        update,
        in_shardings=(of_params, of_params, of_state),
        out_shardings=(of_params, of_state),
        donate_argnums=(0, 1, 2),
    )
    soap_states = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_soap) if is_soap(leaf)]
    stacks = [stack for one in soap_states for stack in one.stacks.values()]
    return Row(
        pod,
        name,
        mesh.size if split == "all" else mesh.shape[AXES[-1]],
        label,
        parameters=local_bytes(params, of_params),
        state=local_bytes(state, of_state),
        even_share=bytes_of(state) / mesh.size,
        largest_stack=max([bytes_of(stack) // mesh.size for stack in stacks], default=0),
        step=compile_program(whole_step.lower(params, state, tokens), of_optimizer=False),
        update=compile_program(update_alone.lower(params, params, state), of_optimizer=True),
    )


def is_soap(node: Any) -> bool:
    return hasattr(node, "stacks")


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def local_bytes(tree: Any, shardings: Any) -> int:
    """The bytes of a tree on one chip."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


# Command line -------------------------------------------------------------------------------------

AXES = ("data", "fsdp")
SPLITS = ("all", "groups")
OPTIMIZERS = ("AdamW", "SOAP")
NO_HINTS = "SOAP without param_shardings"


def mesh_of(pod: str, split: str) -> Mesh:
    """All chips of a pod such as `v5p:8x8x8`: 8 times 64 of them, or 64 groups of 8."""
    topology = topologies.get_topology_desc(pod, "tpu")
    lengths = [int(length) for length in pod.split(":")[1].split("x")]
    at = 1 if split == "all" else len(lengths) - 1
    shape = math.prod(lengths[:at]), math.prod(lengths[at:])
    mesh = topologies.make_mesh(topology, shape, AXES)
    return Mesh(mesh.devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count else "-"


def collectives_of(program: Compiled) -> dict[str, str]:
    counts = ", ".join(f"{count} {kind}" for kind, count in program.collectives.items())
    return {"collectives": counts, "received MB": f"{program.received / 1e6:,.1f}"}


# The columns of each table, after the ones that identify a row.
TABLES: dict[str, Callable[[Row], dict[str, str]]] = {
    "compile time": lambda row: {
        "training step s": f"{row.step.seconds:.0f}",
        "update alone s": f"{row.update.seconds:.0f}",
    },
    "parameters and state": lambda row: {
        "parameters MB": megabytes(row.parameters),
        "state MB": megabytes(row.state),
        "even share MB": megabytes(row.even_share),
    },
    "temporaries": lambda row: {
        "training step MB": megabytes(row.step.temporaries),
        "update alone MB": megabytes(row.update.temporaries),
        "largest stack MB": megabytes(row.largest_stack),
    },
    "collectives of the training step": lambda row: collectives_of(row.step),
    "collectives of the update alone": lambda row: {
        **collectives_of(row.update),
        "inside": str(row.step.inside + row.update.inside),
    },
}


def table_of(rows: Sequence[Row], columns: Callable[[Row], dict[str, str]]) -> str:
    """A Markdown table."""
    cells = [
        {
            "pod": row.pod,
            "model": row.model,
            "sharded over": str(row.sharded_over),
            "optimizer": row.optimizer,
            **columns(row),
        }
        for row in rows
    ]
    lines = [cells[0].keys(), ["---"] * len(cells[0]), *(row.values() for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pods", nargs="+", default=["v5e:16x16", "v5p:8x8x8"])
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument(
        "--optimizers", nargs="+", choices=(*OPTIMIZERS, NO_HINTS), default=OPTIMIZERS
    )
    arguments = parser.parse_args()
    print(f"JAX {jax.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    of_table = (arguments.pods, arguments.models, arguments.optimizers)
    for split in arguments.splits:
        rows = []
        for pod, name, label in itertools.product(*of_table):
            rows.append(compile_step(pod, name, split, label, mesh_of(pod, split)))
            seconds = rows[-1].step.seconds + rows[-1].update.seconds
            print(f"{split}, {pod}, {name}, {label}: {seconds:.0f} s", file=sys.stderr, flush=True)
        for title, columns in TABLES.items():
            print(f"\n{split}: {title}\n\n{table_of(rows, columns)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
