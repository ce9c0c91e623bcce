"""Byte-level BPE against transformers' GPT2Tokenizer: the same files, the same ids, and back."""

import json
import random

import pytest

from lm_flax import tokenizers
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
    return home


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
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
