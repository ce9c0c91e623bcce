"""``seq2seq-flax align``: which words of a sentence each word of its translation looks at, as a heat map."""

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from core_flax import storage
from core_flax.beam import BeamSearch
from core_flax.config import check_range
from core_flax.types import Array, UserError
from seq2seq_flax.attention import LOOKED_AT
from seq2seq_flax.translator import Translator

_WORD_BEGINS = "▁"


@dataclass(frozen=True, kw_only=True)
class AlignCommand:
    """Draws the attention between a sentence and its translation as a heat map."""

    text: tyro.conf.Positional[str]
    """The sentence to translate."""
    workdir: str
    """Folder of a run, an average of its checkpoints, a model that import-hf took in, or one of Hugging Face's."""
    output: str | None = None
    """File to write: .html, or .png, for which the package matplotlib must be installed; None: alignment.html under the
    workdir."""
    target: str | None = None
    """Its translation; None: the model's own."""
    target_lang: str | None = None
    """Language to translate into, for a model that has several."""
    layer: int | None = None
    """Layer of the decoder, from 1, whose attention is shown; None: the mean of all. Always the mean of all heads."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "layer", least=1)
        check_range("", self, "step", least=0)
        for option, text in (("the text", self.text), ("--target", self.target)):
            if text is not None and not text.strip():
                raise UserError(f"{option} is empty; give a sentence")
            if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"{option} is not UTF-8")
        if self.output is not None and Path(self.output).suffix not in (".html", ".png"):
            raise UserError(f"--output {self.output}: give a file that ends in .html or .png")


@dataclass(frozen=True)
class Alignment:
    """How much of its attention each word of a translation gives to each word of the source.

    Attributes:
      source: S words, with what the model reads beside them (``</s>``, a language piece).
      target: T words, ``</s>`` at their end.
      shares_TS: of which each row sums to 1.
      unknown: pieces of both that stand for what is not in the vocabulary.
    """

    source: list[str]
    target: list[str]
    shares_TS: np.ndarray
    unknown: int = 0


def run(command: AlignCommand) -> None:
    """Writes the heat map.

    Raises:
      UserError: there is no such model, it has no attention or not this layer, or the text is too long for it.
    """
    translator = Translator.load(command.workdir, command.step)
    found = align(translator, command.text.strip(), command.target, command.target_lang, command.layer)
    output = storage.path(command.workdir) / "alignment.html" if command.output is None else Path(command.output)
    draw = write_html if output.suffix == ".html" else write_png
    with storage.replacing(output) as partial:
        draw(found, partial)
    print(f"{output}: {' '.join(found.target[:-1])}")
    if found.unknown:
        print(f"not in the vocabulary, and shown as ⁇: {found.unknown:,}")


def align(
    translator: Translator,
    text: str,
    target: str | None = None,
    target_lang: str | None = None,
    layer: int | None = None,
) -> Alignment:
    """The attention between a sentence and a translation, the model's own if none is given.

    Args:
      translator: the model.
      text: the sentence.
      target: its translation.
      target_lang: language to translate into, if the model has several.
      layer: of the decoder, from 1; None: the mean of all.

    Raises:
      UserError: see ``run``.
    """
    tokenizer = translator.tokenizer
    (line,) = translator.encode([("the text", text)], translator.language_prefix(target_lang), "never")
    if not line.pieces:
        raise UserError("the text holds nothing that the vocabulary knows")
    own = translator.translate([line], BeamSearch())[0][0].text if target is None else target
    encode = getattr(tokenizer, "encode_targets", tokenizer.encode)
    source_ids, target_ids = list(line.pieces[0]), [*encode([own])[0], tokenizer.eos_id]
    if target is not None and len(target_ids) > translator.max_length:
        raise UserError(
            f"--target has {len(target_ids)} tokens, more than the {translator.max_length} that {translator.name} "
            "takes; shorten it"
        )
    shares_NLM = attention(translator.model, translator.params, source_ids, [tokenizer.bos_id, *target_ids[:-1]])
    if not len(shares_NLM):
        raise UserError(f"{translator.name} has no attention to the source")
    if layer is not None and layer > len(shares_NLM):
        raise UserError(f"--layer {layer}: the decoder has attention in {len(shares_NLM)} of its layers")
    shares_LM = shares_NLM.mean(0) if layer is None else shares_NLM[layer - 1]
    marks = {tokenizer.eos_id, *tokenizer.languages.values()}
    (source_words, source_spans), (target_words, target_spans) = (
        words_of(tokenizer, ids, marks) for ids in (source_ids, target_ids)
    )
    # A word is looked at as much as its pieces together, and looks as its pieces do on average.
    shares_LS = np.stack([shares_LM[:, span].sum(1) for span in source_spans], axis=1)
    shares_TS = np.stack([shares_LS[span].mean(0) for span in target_spans])
    return Alignment(source_words, target_words, shares_TS, [*source_ids, *target_ids].count(tokenizer.unk_id))


def attention(model: Any, params: Any, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """Of each layer that attends to the source, the mean of its heads: [N, L, M]; N is 0 where none does."""
    left = _looked_at(model, params, np.array([source]), np.array([target]))
    # [N, B, H, L, M] of scanned layers with heads, [B, L, M] of one layer without.
    found = [np.asarray(x, np.float32) for x in jax.tree.leaves(left)]
    layers = [x.mean(2)[:, 0] if x.ndim == 5 else x for x in found]
    return np.concatenate(layers) if layers else np.zeros((0, len(target), len(source)))


@partial(jax.jit, static_argnames="model")
def _looked_at(model: Any, params: Any, source_BM: Array, target_BL: Array) -> Any:
    sequences = {"source_sequences_BM": jnp.ones_like(source_BM), "target_sequences_BL": jnp.ones_like(target_BL)}
    return model.apply({"params": params}, source_BM, target_BL, **sequences, mutable=LOOKED_AT)[1]


def words_of(tokenizer: Any, ids: Sequence[int], marks: Collection[int]) -> tuple[list[str], list[slice]]:
    """(words, the pieces of each): a word begins where a piece says so, and with every mark (``</s>``, languages)."""
    pieces = tokenizer.pieces(ids)
    starts = [
        place
        for place, piece in enumerate(pieces)
        if place == 0 or piece.startswith(_WORD_BEGINS) or ids[place] in marks or ids[place - 1] in marks
    ]
    spans = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(pieces)], strict=True)]

    def word(span: slice) -> str:
        # Decoded, bytes are the letters that they spell; a mark, or a space alone, decodes to nothing.
        return tokenizer.decode(ids[span]).strip() or "".join(pieces[span])

    return [word(span) for span in spans], spans


_PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
th {{ font-weight: normal; padding: 2px 6px; text-align: right; }}
thead th {{ vertical-align: bottom; }}
thead span {{ writing-mode: vertical-rl; transform: rotate(180deg); }}
td {{ width: 30px; height: 24px; border: 1px solid #ddd; }}
</style></head><body>
<p>Each row: what a word of the translation looks at. The darker, the more; a cell tells its share.</p>
<table><thead><tr><th></th>{head}</tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""


def write_html(found: Alignment, path: Path) -> None:
    """A page that needs no other file."""
    head = "".join(f"<th><span>{html.escape(word)}</span></th>" for word in found.source)
    rows = []
    for word, shares_S in zip(found.target, found.shares_TS, strict=True):
        cells = "".join(
            f'<td style="background: rgba(20, 60, 160, {share:.3f})" title="{html.escape(each)}: {share:.1%}"></td>'
            for each, share in zip(found.source, shares_S.tolist(), strict=True)
        )
        rows.append(f"<tr><th>{html.escape(word)}</th>{cells}</tr>")
    title = html.escape(" ".join(found.target[:-1]))
    path.write_text(_PAGE.format(title=title, head=head, rows="\n".join(rows)), encoding="utf-8")


def write_png(found: Alignment, path: Path) -> None:
    """A picture. Raises UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "a .png needs matplotlib: pip install matplotlib, or give an --output that ends in .html"
        ) from error
    size = (2 + 0.4 * len(found.source), 2 + 0.35 * len(found.target))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(found.shares_TS, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    # Dollar signs are words like others.
    axes.set_xticks(range(len(found.source)), found.source, rotation=90, parse_math=False)
    axes.set_yticks(range(len(found.target)), found.target, parse_math=False)
    figure.savefig(path, dpi=150, format="png")
