"""Models of Hugging Face's in and out. What is imported is a run's folder with one checkpoint, of step 0."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_flax import storage
from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig, TrainConfig
from core_flax.run import CHECKPOINTS, Run, new_folder
from core_flax.state import TrainState
from core_flax.types import Params, UserError
from core_flax.weight_files import read_json
from lm_flax import runs, tokenizers
from lm_flax.config import GPT2Run, InputsConfig, LlamaRun, LossConfig, kind_of
from lm_flax.generate import start_of
from lm_flax.huggingface import CONFIG, load_pretrained, save_pretrained
from lm_flax.model import GPT2Config
from lm_flax.tokenizers import BytePairs, Pieces, Tokenizer


def import_hf(folder: str, output: str) -> None:
    """Turn a Hugging Face folder into one of ours, and print what was read, what is missing and what was not used.

    Raises:
      UserError: the folder cannot be read (see load_pretrained), its tokenizer is another model's, or the output is not
        empty.
    """
    home = new_folder(output)
    pretrained = load_pretrained(folder)
    end_id = _end(Path(folder), pretrained.config.vocab_size)
    tokenizer = tokenizers.load(folder, end_id)
    model: Any = pretrained.config
    if tokenizer.num_tokens > model.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.num_tokens} tokens, the model {model.vocab_size}; they do not "
            "belong together"
        )
    made: Any = GPT2Run if isinstance(model, GPT2Config) else LlamaRun
    config = made(
        model=model,
        inputs=InputsConfig(length=model.max_length),
        loss=LossConfig(num_chunks=8),
        train=TrainConfig(batch_size=8),
    )
    checkpoints = Checkpoints(home / CHECKPOINTS, CheckpointConfig())
    checkpoints.save(TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, pretrained.params), {}))
    checkpoints.close()
    facts = {"tokenizer_file": tokenizer.file, "start_id": _start(Path(folder), tokenizer), "end_id": end_id}
    # There is no data: the folder named is one that whoever evaluates will be asked for.
    run = Run(home, kind_of(config), config, storage.absolute(home) / "data", "", tokenizer.fingerprint, facts)
    run.save(tokenizer.file, tokenizer.save)
    print(f"{output}: {_size(model, pretrained.params)}")
    for line in pretrained.report.lines():
        print(f"  {line}")


def export_hf(workdir: str, output: str, step: int | None) -> None:
    """Write a model of ours as a folder that transformers loads, its tokenizer with it; print what it holds.

    Raises:
      UserError: the model's architecture is none of transformers', or the output is not empty.
    """
    home = new_folder(output)
    run, tokenizer = runs.load_run(workdir)
    if not isinstance(run.config, GPT2Run | LlamaRun):
        raise UserError(f"{workdir} holds a model that transformers does not have; GPT-2's and Llama's can be exported")
    params, step = run.params(step)
    arrays, model = jax.tree.map(np.asarray, dict(params)), run.config.model
    if run.content:  # trained here: rows beyond the tokenizer stand for nothing, and their generate would draw them
        arrays = _cut_tables(arrays, tokenizer.num_tokens)
        model = dataclasses.replace(model, vocab_size=tokenizer.num_tokens)
    with storage.filling(home) as folder:
        save_pretrained(folder, model, arrays, start_of(run, tokenizer), tokenizer.end_id)
        tokenizer.save(folder / tokenizer.file)
        if about := tokenizers.about(tokenizer, start_of(run, tokenizer)):
            text = json.dumps(about, indent=2, ensure_ascii=False)
            (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    print(f"{output}: {_size(model, arrays)}, step {step}")
    if not tokenizers.is_common(tokenizer):
        print(f"  {tokenizer.file} is ours: transformers has no tokenizer of this kind")


def _cut_tables(params: Params, num_rows: int) -> Params:
    """The parameters with so many rows in each table of tokens."""
    tables = {name: params[name] for name in ("token", "head") if name in params}
    return {**params, **{name: {**x, "embedding": x["embedding"][:num_rows]} for name, x in tables.items()}}


def _start(folder: Path, tokenizer: Tokenizer) -> int | None:
    """The token that stands before every text of theirs, if that is not what ends one, as it is in GPT-2."""
    if not isinstance(tokenizer, BytePairs | Pieces):
        return None
    found = tokenizer.start_id
    if isinstance(tokenizer, Pieces):  # such a file does not say whether it is used
        found = read_json(folder / CONFIG).get("bos_token_id", found)
    is_other = isinstance(found, int) and 0 <= found < tokenizer.num_tokens and found != tokenizer.end_id
    return found if is_other else None


def _end(folder: Path, vocab_size: int) -> int | None:
    """The token that config.json has end a text; None: it names none of the vocabulary's."""
    found = tokenizers.end_of(folder)
    return found if found is not None and found < vocab_size else None


def _size(config: Any, params: Any) -> str:
    name = "GPT-2" if isinstance(config, GPT2Config) else "Llama"
    count = sum(x.size for x in jax.tree.leaves(params))
    return f"{name} of {config.num_layers} layers, {config.width} wide, {count:,} parameters"
