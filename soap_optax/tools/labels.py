"""Labels of parameters for `optax.partition`, from their paths and shapes."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax

from soap_optax.tools.dimension_numbers import entries_of
from soap_optax.tools.paths import last_word, parts_of, words_of

_EMBEDDING = re.compile(
    "embs?|embed(s|ded|der|ding|dings)?|unembed(der|ding)?|wte|wpe|vocab|vocabulary"
)
_HEAD = re.compile("logits?|classifier|lmhead")
_POSITION = {"pos", "position", "positions", "positional"}
_TABLE = {"bias", "code", "codes", "enc", "encoding", "encodings", "table"}
_TOKEN = {"token", "tokens"}
_ATTENTION = {"attend", "attention", "attn", "gqa", "mha", "mqa", "multihead", "sa"}


def default_labels(params: Any) -> Any:
    """Labels each parameter ``"soap"`` or ``"adamw"``, by its path and shape.

    Matrices, and arrays of more dimensions, get SOAP. These parameters get AdamW:

    - scalars and vectors, also with more axes of length 1, as in ``(1, 1, d)``;
    - vectors with more axes: biases of attention have two, and so have all vectors of layers that
      are stacked for `jax.lax.scan`. Their own name ends in *beta, bias, biases, gamma, offset* or
      *scale*. A ``b`` next to a ``w`` is a vector too, and so is a ``weight`` in a layer of
      normalization, or next to a ``bias`` of the same shape;
    - embeddings, tables of positions or tokens, and output heads, recognized by their path.

    A path has parts: its keys, further split at ``/`` and ``.``. Each part has words, in lower
    case: ``lm_head``, ``LMHead_0`` and ``lm-head`` have the words *lm* and *head*. Numbers are not
    words. A parameter is an embedding, a table or a head if a part of its path

    - has one of the words *emb, embs, embed, embeds, embedded, embedder, embedding, embeddings,
      unembed, unembedder, unembedding, wte, wpe, vocab, vocabulary, logit, logits, classifier,
      lmhead*; but ``pre_logits`` is a hidden layer, and so is ``pre_classifier``;
    - is only the word *pos*, *position*, *positions*, *positional* or *tok*;
    - has the word *pos*, *position*, *positions* or *positional*, and ends in *bias, code, codes,
      enc, encoding, encodings* or *table*;
    - ends in *token* or *tokens*;
    - ends in *head* after other words, and does not name attention;
    - is only the word *head*, and no earlier part names attention.

    A part names attention if it has one of the words *attend, attention, attn, gqa, mha, mqa,
    multihead, sa*, or *multi* before *head* or *heads*. The parts ``heads``, ``head_dim`` and
    ``multi_head_attention`` do not end in *head*.

    So ``token_mixing/kernel``, ``attention/out/kernel`` and ``position_wise_ffn/kernel`` get SOAP.
    So does an output head with a name such as ``output``, which attention uses as well.

    Example:
      >>> import jax, jax.numpy as jnp, optax, soap_optax
      >>> params = {
      ...     "wte": {"embedding": jnp.ones((100, 8))},
      ...     "mlp": {"kernel": jnp.ones((8, 32)), "bias": jnp.zeros(32)},
      ...     "lm_head": {"kernel": jnp.ones((8, 100))},
      ... }
      >>> soap_optax.default_labels(params)["mlp"]
      {'bias': 'adamw', 'kernel': 'soap'}
      >>> optimizer = optax.partition(
      ...     {"soap": soap_optax.soap(3e-3), "adamw": optax.adamw(3e-3)},
      ...     soap_optax.default_labels,
      ... )
      >>> state = optimizer.init(params)
      >>> list(optax.tree.get(state, "stacks"))
      ['8x32']

    Args:
      params: a tree of parameters, of their shapes, or of gradients.

    Returns:
      The same tree with a label in place of every leaf. None and `optax.MaskedNode` are not leaves
      and stay.
    """
    entries = iter(entries_of(params))

    def label(path: Sequence[Any], _: Any) -> Literal["soap", "adamw"]:
        is_vector = next(entries) is None
        parts = [words_of(part) for part in parts_of(path)]
        return "adamw" if is_vector or _is_table_or_head(parts) else "soap"

    return jax.tree_util.tree_map_with_path(label, params)


def _is_table_or_head(parts: Sequence[Sequence[str]]) -> bool:
    """Whether the words of any part of a path name an embedding, a table or an output head."""
    return any(
        any(map(_EMBEDDING.fullmatch, words))
        or (any(map(_HEAD.fullmatch, words)) and "pre" not in words)
        or _is_position_table(words)
        or words == ["tok"]
        or last_word(words) in _TOKEN
        or _is_output_head(words, before=parts[:number])
        for number, words in enumerate(parts)
    )


def _is_position_table(words: Sequence[str]) -> bool:
    only_position = len(words) == 1 and words[0] in _POSITION
    return only_position or (last_word(words) in _TABLE and not _POSITION.isdisjoint(words))


def _is_output_head(words: Sequence[str], before: Sequence[Sequence[str]]) -> bool:
    suspects = [words, *before] if words == ["head"] else [words]
    return last_word(words) == "head" and not any(map(_names_attention, suspects))


def _names_attention(words: Sequence[str]) -> bool:
    multi_head = {("multi", "head"), ("multi", "heads")}
    return not (_ATTENTION.isdisjoint(words) and multi_head.isdisjoint(itertools.pairwise(words)))
