"""Asking a pretrained model for the words behind [MASK]."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bert_flax.model import BertForPreTraining
from bert_flax.runs import load_run
from core_flax.types import UserError


def fill_mask(workdir: str, texts: Sequence[str], top: int, step: int | None = None) -> None:
    """Print the ``top`` most probable tokens with their probabilities, for each [MASK] of each text."""
    run, vocabulary = load_run(workdir)
    config = run.config.model
    if not texts:
        raise UserError('give a text with [MASK] in it, such as "The [MASK] statement is used for debugging."')
    if not 1 <= top <= vocabulary.num_tokens:
        raise UserError(f"--top {top}: must be between 1 and the vocabulary's {vocabulary.num_tokens} tokens")
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"the text {text!r} is not UTF-8")
    encoded = vocabulary.encode(list(texts), specials=True)
    for text, ids in zip(texts, encoded, strict=True):
        if vocabulary.mask_id not in ids:
            raise UserError(f"there is no [MASK] in {text!r}")
        if len(ids) + 2 > config.max_length:
            raise UserError(f"a text of {len(ids)} tokens is longer than the {config.max_length - 2} the model takes")
    params, _ = run.params(step)
    model = BertForPreTraining(config)
    for text, ids in zip(texts, encoded, strict=True):
        print(text)
        tokens_BL = np.array([[vocabulary.cls_id, *ids, vocabulary.sep_id]])
        positions_BP = np.flatnonzero(tokens_BL[0] == vocabulary.mask_id)[None]
        segments_BL, valid_BL = np.zeros_like(tokens_BL), np.ones_like(tokens_BL, bool)
        logits_BPV, _ = jax.jit(model.apply)({"params": params}, tokens_BL, segments_BL, valid_BL, positions_BP)
        probs_PV = jax.nn.softmax(logits_BPV[0, :, : vocabulary.num_tokens].astype(jnp.float32))
        for probs_V in np.asarray(probs_PV):
            best = np.argsort(-probs_V)[:top]
            print("   " + "   ".join(f"{vocabulary.pieces[token]} {probs_V[token]:.1%}" for token in best))
