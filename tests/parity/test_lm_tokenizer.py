"""Byte-level BPE against transformers' GPT2Tokenizer: the same files, the same ids, and back."""

import json
import random
from functools import partial

import jax
import numpy as np
import pytest

from lm_flax import tokenizers
from lm_flax.architectures import init_params, make_model
from lm_flax.huggingface import save_pretrained
from lm_flax.llama import LlamaConfig
from lm_flax.model import GPT2Config
from lm_flax.tokenizers import train_byte_pairs

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")

TEXT = (
    "The old farmer's dog didn't see: 3 bridges, 12,345 roads\n\n  and   spaces \t tabs\r\nÜber naïve café — “quoted” "
    "日本語 🙂👍🏽 e\u0301 <|endoftext|> we'll they've I'm x=y+1; \u00a0 nbsp\n"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """vocab.json and merges.txt, learned from a text with other characters as well."""
    home = tmp_path_factory.mktemp("gpt2")
    draw = random.Random(0)
    words = TEXT.split()
    made = train_byte_pairs([" ".join(draw.choices(words, k=30)) for _ in range(50)], 370)
    made.save(home / "tokenizer.json")
    model = json.loads((home / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (home / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (home / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    for name, original in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (home / original).write_bytes((home / name).read_bytes())
    return home


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.json"])
def test_ids_are_theirs(files, name):
    theirs = transformers.GPT2Tokenizer(str(files / "vocab.json"), str(files / "merges.txt"))
    ours = tokenizers.load(files / name)
    assert ours.num_tokens == len(theirs) and ours.end_id == theirs.eos_token_id
    assert ours.fingerprint == tokenizers.load(files / name).fingerprint
    draw = random.Random(1)
    pieces = [TEXT.replace("<|endoftext|>", ""), *("".join(draw.choices(TEXT[:-80] + " \n", k=60)) for _ in range(200))]
    for text in pieces:
        text = text.replace("<|", "")
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("a", ends=True).tolist() == [*theirs("a")["input_ids"], theirs.eos_token_id]
    assert ours.end_id not in ours.encode("a <|endoftext|> b")  # no text can end a document


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_what_is_exported_reads_texts_as_it_did(tmp_path, monkeypatch, model, kind):
    """Of characters that are known, with one space between words: what SentencePiece makes of others is its own."""
    # transformers reads SentencePiece files by code that wants a newer protobuf than Beam admits, but works with it.
    monkeypatch.setenv("TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK", "true")
    text = "the old dog saw the farmer's café, and it was said: the dog is old.\nIt fell so\n\nover the bridge"
    train = tokenizers.train_byte_pairs if kind == "bpe" else tokenizers.train_pieces
    made = train([text] * 20, 300 if kind == "bpe" else 60)
    sizes = {"vocab_size": made.num_tokens, "num_layers": 1, "width": 8, "num_heads": 2, "mlp_width": 8}
    config = GPT2Config(**sizes) if model == "gpt2" else LlamaConfig(**sizes, num_kv_heads=2)
    shapes = jax.eval_shape(partial(init_params, make_model(config)), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    save_pretrained(tmp_path, config, params, made.end_id, made.end_id)
    made.save(tmp_path / made.file)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizers.about(made, made.end_id)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for part in (text, "the bridge", "it was", "farmer's\nIt"):
        assert theirs(part, add_special_tokens=False)["input_ids"] == made.encode(part).tolist(), part
    assert theirs.eos_token_id == theirs.bos_token_id == made.end_id
    if kind == "sentencepiece":
        assert theirs("the")["input_ids"] == [made.end_id, *made.encode("the")]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert loaded.eos_token_id == loaded.bos_token_id == made.end_id
