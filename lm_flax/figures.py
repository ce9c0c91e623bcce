"""What a loss per token means: per word, per byte, beside the unigram model's. Imports no jax."""

import math
from collections.abc import Mapping

import numpy as np

from lm_flax.data import TokenStore
from lm_flax.tokenizers import Tokenizer


def unigram_loss(train: TokenStore, text: TokenStore) -> float:
    """Cross-entropy, nats a token, of predicting each token by how often it occurs in the training text.

    One is added to every count, so that what the training text lacks is not impossible.
    """
    share_V = (train.counts_V + 1) / (train.counts_V + 1).sum()
    return float(-(text.counts_V @ np.log(share_V)) / text.counts_V.sum())


def in_units(
    loss: float, train: TokenStore, text: TokenStore, tokenizer: Tokenizer
) -> Mapping[str, tuple[float, float]]:
    """What a loss per token means in other units, beside that of the unigram model: name -> (model, unigram)."""
    info, both = text.info, (loss, unigram_loss(train, text))
    per_word = "word" if tokenizer.is_words else "token"
    figures = {f"loss, nats per {per_word}": both, f"perplexity per {per_word}": tuple(map(_exp, both))}
    figures["bits per byte"] = tuple(each * info.tokens / info.bytes / math.log(2) for each in both)
    if not tokenizer.is_words:
        figures["perplexity per word"] = tuple(_exp(each * info.tokens / info.words) for each in both)
    return figures


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def print_table(
    metrics: Mapping[str, float], title: str, train: TokenStore, text: TokenStore, tokenizer: Tokenizer
) -> None:
    """What a language model makes of a text, and the unigram model of the training text."""
    print(f"{title:<28}{'model':>12}{'unigram':>14}")
    for name, (model, unigram) in in_units(metrics["loss"], train, text, tokenizer).items():
        print(f"{name:<28}{_figure(model):>12}{_figure(unigram):>14}")
    print(f"{'accuracy':<28}{metrics['accuracy']:>12.1%}")
    if unknown := share_unknown(text, tokenizer):
        print(f"({unknown:.2%} of the tokens are <unk>: no figure knows what stood there, so that bits per byte and")
        print("perplexity are lower than those of a model that spells it)")


def share_unknown(text: TokenStore, tokenizer: Tokenizer) -> float:
    """How many of a text's tokens stand for what the vocabulary does not have, as a share."""
    return 0.0 if tokenizer.unk_id is None else float(text.counts_V[tokenizer.unk_id] / max(1, text.info.tokens))


def _figure(value: float) -> str:
    return f"{value:.4f}" if value < 100 else f"{value:,.1f}" if value < 1e7 else f"{value:.2e}"
