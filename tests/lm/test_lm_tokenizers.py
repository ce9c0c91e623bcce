"""Tokenizers of published models: which of their tokens are words, and what stands before a text."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import CONFIGS, random_params
from tokenizers import Tokenizer, decoders, models, processors

from core_flax.types import UserError
from lm_flax import tokenizers
from lm_flax.generate import Generator
from lm_flax.huggingface import CONFIG, save_pretrained
from lm_flax.pretrained import _cut_tables, export_hf, import_hf
from lm_flax.runs import load_run
from lm_flax.tokenizers import BytePairs

VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁dog": 4, "dog": 5, "s": 6, "\n": 7}


def llamas(starts: bool) -> BytePairs:
    """A tokenizer laid out as Llama 2's, which puts <s> before a text, or not."""
    made = Tokenizer(models.BPE(VOCABULARY, [], unk_token="<unk>"))
    made.add_special_tokens(["<s>", "</s>"])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if starts:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return BytePairs(made)


def test_a_word_has_a_space_before_it():
    assert llamas(True).words() == ["", "", "", "", "dog", "", "", ""]


@pytest.mark.parametrize(("kind", "starts", "before"), [("llama", True, 1), ("llama", False, 2), ("gpt2", False, 2)])
def test_an_imported_model_begins_texts_as_it_learned_to(tmp_path, kind, starts, before):
    """And is exported with that: generate of transformers begins and ends likewise."""
    save_pretrained(tmp_path / "theirs", CONFIGS[kind], random_params(CONFIGS[kind]))
    llamas(starts).save(tmp_path / "theirs" / "tokenizer.json")
    source = tmp_path / "theirs"
    for number in range(2):  # there and back
        home, out = tmp_path / f"run{number}", tmp_path / f"out{number}"
        import_hf(str(source), str(home))
        generator = Generator.of(*load_run(home))
        assert [generator.encode("s").tolist(), generator.encode("").tolist()] == [[before, 6], [before]]
        assert generator.first_token.tolist() == [before]
        export_hf(str(home), str(out), None)
        about = json.loads((out / CONFIG).read_text())
        assert (about["bos_token_id"], about["eos_token_id"]) == (before, 2)
        source = out


def test_the_package_says_how_a_sentencepiece_model_is_used(tmp_path):
    """A .model has <s> whether it is used or not: config.json knows."""
    model = tokenizers.train_pieces(["the dogs saw the dog"] * 30, 20)
    save_pretrained(tmp_path / "theirs", CONFIGS["llama"], random_params(CONFIGS["llama"]))
    model.save(tmp_path / "theirs" / "tokenizer.model")
    for stored, before in (({"bos_token_id": 1}, 1), ({}, 1), ({"bos_token_id": 2}, 2)):
        about = json.loads((tmp_path / "theirs" / CONFIG).read_text())
        del about["bos_token_id"]
        (tmp_path / "theirs" / CONFIG).write_text(json.dumps(about | stored))
        home = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        import_hf(str(tmp_path / "theirs"), str(home))
        assert Generator.of(*load_run(home)).first_token.tolist() == [before]
        (tmp_path / "theirs" / CONFIG).write_text(json.dumps(about | {"bos_token_id": None}))


def test_what_is_no_tokenizer(tmp_path):
    text = Path(tmp_path / "text.txt")
    text.write_text("no tokenizer")
    with pytest.raises(UserError, match=r"text\.txt \(Expecting value.*; give a tokenizer\.json"):
        tokenizers.load(text)


def test_rows_that_no_token_has_stay_behind():
    """A padded table; what is no table of tokens is whole."""
    table = np.arange(10).reshape(5, 2)
    cut = _cut_tables({"token": {"embedding": table}, "head": {"embedding": table}, "norm": {"scale": table}}, 3)
    np.testing.assert_array_equal(cut["token"]["embedding"], table[:3])
    np.testing.assert_array_equal(cut["head"]["embedding"], table[:3])
    np.testing.assert_array_equal(cut["norm"]["scale"], table)
