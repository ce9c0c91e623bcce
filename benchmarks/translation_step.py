"""Time our translation training step, with packed pairs, against the same model in torch with length-sorted batches.

    seq2seq-flax prepare --train train.en train.de --output DATA --vocab-size 10000
    python benchmarks/translation_step.py --data DATA --preset transformer_tiny

Both train the same Transformer (transformers' MarianMTModel and torch's fused Adam on the other side) on the same pairs
with the same budget of tokens a step, dropout, label smoothing and a learning rate schedule, on all cores, in float32;
with a GPU in bfloat16 (theirs: autocast and torch.compile). Ours packs pairs into rows. Theirs has the usual batches:
pairs sorted by length, as many to a batch as its longest source and its longest target allow, the rest padding, a few
of these batches taken at random. Compared is what is of use: target tokens that are no padding, per second.

Each runs in a process of its own; they take turns in blocks of steps, and medians over blocks are compared (see
contest.py). On a CPU our command line lets malloc keep freed memory; so that the difference is not malloc's alone,
torch runs twice, as it comes and with the same setting. Needs the extra [parity]. Writes to benchmarks/results.
"""

import argparse
import os
import statistics
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import contest

from core_flax.memory import keep_freed_memory

if {"ours", "torch_keeping_memory"} & set(sys.argv):  # a worker's name: before jax, torch or numpy start a thread
    keep_freed_memory()

import dataclasses

import numpy as np

from core_flax.text.sentencepiece_model import SentencePiece
from seq2seq_flax.batches import row_capacity
from seq2seq_flax.config import TranslateConfig
from seq2seq_flax.pairs import TOKENIZER, PairStore
from seq2seq_flax.presets import PRESETS


def parse() -> argparse.Namespace:
    """The options, for this process and for those it starts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder made by seq2seq-flax prepare")
    parser.add_argument("--preset", default="transformer_tiny", choices=PRESETS)
    parser.add_argument("--rows", type=int, help="rows of a step, as train.batch_size; default: the preset's")
    parser.add_argument("--blocks", type=int, default=9, help="turns each takes")
    parser.add_argument("--steps", type=int, default=8, help="steps per turn, over as many different batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/translation_step_PRESET_DEVICE.json")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def settings(options: argparse.Namespace, tokenizer: SentencePiece) -> TranslateConfig:
    """The preset's, with the data's vocabulary and the number of rows asked for."""
    config = PRESETS[options.preset]()
    model = dataclasses.replace(config.model, vocab_size=tokenizer.num_tokens)
    train = dataclasses.replace(config.train, batch_size=options.rows or config.train.batch_size)
    return dataclasses.replace(config, model=model, train=train, seed=options.seed)


class Ours:
    """The step that ``seq2seq-flax train`` runs, on the first batches of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        import jax

        from core_flax.hardware import compute_dtype
        from core_flax.params import count
        from core_flax.program import make_program
        from seq2seq_flax.batches import PairBatches
        from seq2seq_flax.task import make_task

        self.jax = jax
        store, tokenizer = PairStore(options.data, "train"), SentencePiece.load(options.data / TOKENIZER)
        config = settings(options, tokenizer)
        pairs = PairBatches(store, config.inputs, config.train.batch_size, tokenizer.bos_id, jax.device_count())
        self.batches = [pairs.make_batch(step, options.seed) for step in range(options.steps)]
        self.program = make_program(make_task(config, store, None, tokenizer, jax.device_count()), config)
        with jax.set_mesh(self.program.mesh):
            self.state = self.program.init(jax.random.key(options.seed))
        self.facts = {
            "parameters": count(self.state.params),
            "device": jax.devices()[0].device_kind,
            "num_devices": jax.device_count(),
            "backend": "cpu" if jax.default_backend() == "cpu" else "accelerator",
            "dtype": str(compute_dtype(config.train.compute_dtype)),
            "rows": config.train.batch_size,
            "row_lengths": pairs.capacity,
            "target_tokens": sum(int((batch["target_sequences"] > 0).sum()) for batch in self.batches),
            "share_of_padding": pairs.share_of_padding(options.seed, options.steps),
            "model": repr(config.model),
            "optimizer": repr(config.optimizer),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        }

    def take(self) -> list[float]:
        """A step on each batch, as the loop takes them: the loss is read one step late. Returns the losses."""
        from core_flax import sharding

        losses, pending = [], None
        with self.jax.set_mesh(self.program.mesh):
            for batch in self.batches:
                num_rows = len(batch["target_labels"])
                placed = sharding.place_batch(batch, num_rows, self.program.mesh)
                self.state, metrics = self.program.step(self.state, placed)
                if pending is not None:
                    losses.append(float(pending))
                pending = metrics["nll"]
            self.jax.block_until_ready(self.state)
        return [*losses, float(pending)]


def sorted_batches(store: PairStore, budget: tuple[int, int], count: int, seed: int) -> list[np.ndarray]:
    """Numbers of the pairs of some batches: of like length, in all at most the budget of padded tokens a side."""
    draw = np.random.default_rng(seed)
    lengths = np.stack([store.source_lengths, store.target_lengths], axis=1)
    ordered = np.lexsort((draw.random(len(lengths)), lengths[:, 0], lengths[:, 1]))
    batches, begin = [], 0
    while begin < len(ordered):
        longest = np.maximum.accumulate(lengths[ordered[begin : begin + max(budget)]], axis=0)
        sizes = longest * np.arange(1, len(longest) + 1)[:, None]
        size = max(1, int(np.count_nonzero((sizes <= budget).all(axis=1))))
        batches.append(ordered[begin : begin + size])
        begin += size
    return [batches[number] for number in draw.permutation(len(batches))[:count]]


class Torch:
    """The usual torch loop round transformers' model: fused Adam, scaled dot-product attention, no copies to spare."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch = torch
        torch.manual_seed(options.seed)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        store, tokenizer = PairStore(options.data, "train"), SentencePiece.load(options.data / TOKENIZER)
        preset = settings(options, tokenizer)
        self.model = self.make_model(transformers, preset.model, tokenizer).to(self.device).train()
        self.parameters = [x for x in self.model.parameters() if x.requires_grad]
        adam, warmup = preset.optimizer, preset.schedule.warmup_steps
        assert (adam.name, adam.weight_decay, adam.clip_norm) == ("adamw", 0, None), "another optimizer than below"
        betas = adam.beta1 or 0.9, adam.beta2 or 0.999
        self.optimizer = torch.optim.Adam(
            self.parameters, adam.learning_rate, betas=betas, eps=adam.epsilon or 1e-8, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)
        )
        self.smoothing = preset.inputs.label_smoothing
        rows, capacity = preset.train.batch_size, row_capacity(store, preset.inputs.row_length)
        chosen = sorted_batches(store, (rows * capacity[0], rows * capacity[1]), options.steps, options.seed)
        self.batches = [self.convert(store, numbers, tokenizer.bos_id) for numbers in chosen]
        real = [[int(batch["attention_mask"].sum()), int((batch["labels"] >= 0).sum())] for batch in self.batches]
        places = [batch["input_ids"].numel() + batch["labels"].numel() for batch in self.batches]
        self.forward = torch.compile(self.model, dynamic=True) if self.cuda else self.model
        self.facts = {
            "parameters": sum(x.numel() for x in self.parameters),
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "backend": "accelerator" if self.cuda else "cpu",
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "target_tokens": sum(target for _, target in real),
            "share_of_padding": 1 - sum(map(sum, real)) / sum(places),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def make_model(self, transformers, size, tokenizer: SentencePiece):
        """Of the same sizes as ours."""
        config = transformers.MarianConfig(
            vocab_size=size.vocab_size,
            d_model=size.width,
            encoder_layers=size.num_layers,
            decoder_layers=size.num_layers,
            encoder_attention_heads=size.num_heads,
            decoder_attention_heads=size.num_heads,
            encoder_ffn_dim=size.mlp_width,
            decoder_ffn_dim=size.mlp_width,
            activation_function=size.activation,
            scale_embedding=size.scale_embeddings,
            dropout=size.dropout,
            attention_dropout=size.attention_dropout,
            activation_dropout=size.activation_dropout,
            init_std=size.width**-0.5,
            pad_token_id=tokenizer.bos_id,
            decoder_start_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )
        return transformers.MarianMTModel(config)

    def convert(self, store: PairStore, numbers: np.ndarray, bos_id: int) -> dict:
        """Padded on the right; targets are seen causally, so that their padding needs no mask."""
        pairs = store.read(numbers)
        longest = [max(len(pair[side]) for pair in pairs) for side in (0, 1)]
        source, inputs = np.full((len(pairs), longest[0]), bos_id), np.full((len(pairs), longest[1]), bos_id)
        labels = np.full((len(pairs), longest[1]), -100)
        for row, (source_ids, target_ids) in enumerate(pairs):
            source[row, : len(source_ids)] = source_ids
            inputs[row, 1 : len(target_ids)] = target_ids[:-1]
            labels[row, : len(target_ids)] = target_ids
        valid = np.arange(longest[0]) < np.array([len(pair[0]) for pair in pairs])[:, None]
        arrays = {"input_ids": source, "attention_mask": valid, "decoder_input_ids": inputs, "labels": labels}
        tensors = {name: self.torch.from_numpy(x.astype(np.int64)) for name, x in arrays.items()}
        return {name: x.pin_memory() for name, x in tensors.items()} if self.cuda else tensors

    def take(self) -> list[float]:
        """A step on each batch; the loss is read one step late. Returns the losses."""
        losses, pending = [], None
        for batch in self.batches:
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            labels = batch.pop("labels").flatten()
            self.optimizer.zero_grad(set_to_none=True)
            with self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.cuda):
                logits = self.forward(**batch, use_cache=False).logits
                loss = self.torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), labels, label_smoothing=self.smoothing
                )
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            if pending is not None:
                losses.append(pending.item())
            pending = loss.detach()
        if self.cuda:
            self.torch.cuda.synchronize()
        return [*losses, pending.item()]


CONTESTANTS = {"ours": Ours, "torch": Torch, "torch_keeping_memory": Torch}
"""The second torch has the setting of malloc that our command line makes; see the top of the file."""


def main() -> None:
    """Take turns, print the table, write the file."""
    options = parse()
    if options.worker:
        return contest.serve(partial(CONTESTANTS[options.worker], options))
    load = contest.load()
    workers = {"ours": contest.Worker("ours")}
    on_cpu = workers["ours"].facts["backend"] == "cpu"
    others = [name for name in CONTESTANTS if name == "torch" or (on_cpu and name not in workers)]
    workers |= {name: contest.Worker(name) for name in others}
    try:
        for worker in workers.values():
            worker.take()  # compiles, and does not count
        answers = contest.take_turns(workers, options.blocks)
    finally:
        for worker in workers.values():
            worker.close()
    facts = {name: worker.facts for name, worker in workers.items()}
    assert len({fact["parameters"] for fact in facts.values()}) == 1, "not the same model"
    assert len({fact["backend"] for fact in facts.values()}) == 1, "one of them did not find the accelerator"
    rates = {
        name: [facts[name]["target_tokens"] / answer["seconds"] for answer in each] for name, each in answers.items()
    }
    medians = {name: statistics.median(each) for name, each in rates.items()}
    print(f"{options.preset}, {facts['ours']['rows']} rows of {facts['ours']['row_lengths']} tokens, dropout on")
    print(f"{facts['ours']['device']:22}{'target tokens/s':>16}{'padding':>9}{'ours, times as fast':>21}")
    for name, rate in medians.items():
        padding = facts[name]["share_of_padding"]
        print(f"{name:22}{rate:16.0f}{padding:9.1%}{medians['ours'] / rate:21.2f}")
    report = {
        "what": "target tokens (no padding) per second of training, ours and transformers' Marian in turn",
        **contest.origin(),
        "load_at_start": load,
        "seed": options.seed,
        "steps_per_turn": options.steps,
        "target_tokens_per_second": medians,
        "ours_times_as_fast": {name: medians["ours"] / rate for name, rate in medians.items()},
        "target_tokens_per_second_of_each_turn": rates,
        "losses": {name: [answer["told"] for answer in each] for name, each in answers.items()},
        "facts": facts,
    }
    device = facts["ours"]["device"].lower().replace(" ", "_")
    output = options.output or contest.RESULTS / f"translation_step_{options.preset}_{device}.json"
    contest.write(report, output)


if __name__ == "__main__":
    main()
