"""Time our beam search against transformers' ``generate`` on the same weights and sentences.

    python benchmarks/translation_decode.py --workdir RUN --input test_2016_flickr.en

The model, from any folder that ``seq2seq-flax export-hf`` reads, is exported as a MarianMTModel for both sides. They
translate all sentences of the input, sorted by length, in batches of as many, with the same number of beams, no length
penalty and the same limit of tokens, ours each sentence by its own length; both stop a sentence when nothing better can
come. Both work on token ids: text is cut beforehand. They take turns (see contest.py); medians over turns are compared,
and how many translations are the same to the token: all but those that rounding decides. On a GPU theirs is in bfloat16
as well as ours.

Needs the extra [parity]. Writes everything to benchmarks/results.
"""

import argparse
import gzip
import os
import statistics
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import contest

from core_flax.memory import keep_freed_memory

if {"ours", "torch_keeping_memory"} & set(sys.argv):  # a worker's name: before jax, torch or numpy start a thread
    keep_freed_memory()

import numpy as np

EXPORTED = "SEQ2SEQ_EXPORTED"
"""Environment variable that tells the workers where the exported model lies."""


def parse() -> argparse.Namespace:
    """The options, for this process and for those it starts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="a run, an average, an imported model")
    parser.add_argument("--input", type=Path, required=True, help="sentences, one a line; may be gzipped")
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="sentences at a time")
    parser.add_argument("--num", type=int, help="how many of the sentences; default: all")
    parser.add_argument("--blocks", type=int, default=5, help="turns each takes, over all sentences")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/translation_decode_DEVICE.json")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def sources(options: argparse.Namespace, tokenizer) -> list[list[list[int]]]:
    """Token ids of the sentences in batches, the longest first."""
    opener = gzip.open if options.input.suffix == ".gz" else open
    with opener(options.input, "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file][: options.num]
    ids = sorted(([*each, tokenizer.eos_id] for each in tokenizer.encode(lines)), key=len, reverse=True)
    return [ids[begin : begin + options.batch] for begin in range(0, len(ids), options.batch)]


def padded(batch: list[list[int]], bos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, flags of real tokens) of a batch, padded on the right."""
    shape = len(batch), max(map(len, batch))
    tokens, valid = np.full(shape, bos_id), np.zeros(shape, bool)
    for row, ids in enumerate(batch):
        tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
    return tokens, valid


class Ours:
    """As ``seq2seq-flax translate`` does it, from token ids to token ids."""

    def __init__(self, options: argparse.Namespace) -> None:
        import jax

        from core_flax.beam import BeamSearch
        from core_flax.config import MeshConfig
        from core_flax.hardware import compute_dtype
        from core_flax.sharding import make_mesh, replicated
        from seq2seq_flax.decode import translate
        from seq2seq_flax.huggingface import load_pretrained
        from seq2seq_flax.model import Transformer

        pretrained, dtype = load_pretrained(os.environ[EXPORTED]), compute_dtype("auto")
        tokenizer, mesh = pretrained.tokenizer, make_mesh(MeshConfig(), jax.local_devices()[:1])
        self.translate = partial(
            translate,
            Transformer(pretrained.config, dtype),
            jax.device_put(dict(pretrained.params), replicated(mesh)),
            [ids for batch in sources(options, tokenizer) for ids in batch],
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            search=BeamSearch(beam_size=options.beam_size, length_penalty=0.0),
            mesh=mesh,
            batch_size=options.batch,
        )
        self.eos_id = tokenizer.eos_id
        self.facts = {
            "device": jax.devices()[0].device_kind,
            "backend": "cpu" if jax.default_backend() == "cpu" else "accelerator",
            "dtype": str(dtype),
            "model": repr(pretrained.config),
            "sentences": sum(map(len, sources(options, tokenizer))),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        }

    def take(self) -> list[list[int]]:
        """The translation of every sentence, its end included."""
        best = (several[0] for several in self.translate())
        return [[*each.tokens, self.eos_id] if each.is_complete else [*each.tokens] for each in best]


class Torch:
    """transformers' generate, with its cache."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        from seq2seq_flax.huggingface import load_pretrained

        transformers.logging.set_verbosity_error()
        self.torch = torch
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        dtype = torch.bfloat16 if cuda else torch.float32
        model = transformers.MarianMTModel.from_pretrained(os.environ[EXPORTED], dtype=dtype)
        self.model = model.to(self.device).eval()
        tokenizer = load_pretrained(os.environ[EXPORTED]).tokenizer
        self.batches, self.bos_id, self.eos_id = sources(options, tokenizer), tokenizer.bos_id, tokenizer.eos_id
        self.beam_size = options.beam_size
        self.facts = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "backend": "accelerator" if cuda else "cpu",
            "dtype": str(dtype),
            "threads": torch.get_num_threads(),
            "attention": model.config._attn_implementation,
            "sentences": sum(map(len, self.batches)),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def take(self) -> list[list[int]]:
        """The translation of every sentence, its end included."""
        from seq2seq_flax.decode import longest_target

        told = []
        for batch in self.batches:
            tokens, valid = (self.torch.from_numpy(x).to(self.device) for x in padded(batch, self.bos_id))
            with self.torch.inference_mode():
                found = self.model.generate(
                    tokens,
                    attention_mask=valid.long(),
                    num_beams=self.beam_size,
                    length_penalty=0.0,
                    early_stopping=False,
                    max_length=None,
                    max_new_tokens=longest_target(max(map(len, batch))),
                )
            for ids in found[:, 1:].tolist():
                end = ids.index(self.eos_id) + 1 if self.eos_id in ids else len(ids)
                told.append(ids[:end])
        return told


CONTESTANTS = {"ours": Ours, "torch": Torch, "torch_keeping_memory": Torch}
"""The second torch has the setting of malloc that our command line makes."""


def main() -> None:
    """Export, take turns, print the table, write the file."""
    options = parse()
    if options.worker:
        return contest.serve(partial(CONTESTANTS[options.worker], options))
    load = contest.load()
    with tempfile.TemporaryDirectory() as folder:
        export(options.workdir, folder)
        workers = {"ours": contest.Worker("ours")}
        try:
            on_cpu = workers["ours"].facts["backend"] == "cpu"
            others = [name for name in CONTESTANTS if name == "torch" or (on_cpu and name not in workers)]
            workers |= {name: contest.Worker(name) for name in others}
            for worker in workers.values():
                worker.take()  # compiles, and does not count
            answers = contest.take_turns(workers, options.blocks)
        finally:
            for worker in workers.values():
                worker.close()
    report(options, load, {name: worker.facts for name, worker in workers.items()}, answers)


def export(workdir: Path, folder: str) -> None:
    """Write the model for the workers."""
    from seq2seq_flax.huggingface import save_pretrained
    from seq2seq_flax.pretrained import load_model

    pretrained = load_model(str(workdir))
    save_pretrained(folder, pretrained.config, pretrained.params, pretrained.tokenizer, pretrained.max_length)
    os.environ[EXPORTED] = folder


def report(options: argparse.Namespace, load: float, facts: dict, answers: dict) -> None:
    """Print the table and write the file."""
    assert len({fact["backend"] for fact in facts.values()}) == 1, "one of them did not find the accelerator"
    seconds = {name: [answer["seconds"] for answer in each] for name, each in answers.items()}
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    told = {name: each[0]["told"] for name, each in answers.items()}
    same = {name: sum(a == b for a, b in zip(told["ours"], each, strict=True)) for name, each in told.items()}
    count = facts["ours"]["sentences"]
    print(f"{options.input.name}, {count} sentences, beam {options.beam_size}, {facts['ours']['device']}")
    print(f"{'':22}{'seconds':>9}{'sentences/s':>13}{'ours, times as fast':>21}{'same as ours':>14}")
    for name, median in medians.items():
        print(f"{name:22}{median:9.2f}{count / median:13.1f}{median / medians['ours']:21.2f}{same[name]:14}")
    result = {
        "what": "seconds to translate all sentences by beam search, ours and transformers' generate in turn",
        **contest.origin(),
        "load_at_start": load,
        "beam_size": options.beam_size,
        "sentences_at_a_time": options.batch,
        "median_seconds": medians,
        "ours_times_as_fast": {name: median / medians["ours"] for name, median in medians.items()},
        "seconds_of_each_turn": seconds,
        "target_tokens": {name: sum(map(len, each)) for name, each in told.items()},
        "translations_that_are_ours": same,
        "facts": facts,
    }
    device = facts["ours"]["device"].lower().replace(" ", "_")
    contest.write(result, options.output or contest.RESULTS / f"translation_decode_{device}.json")


if __name__ == "__main__":
    main()
