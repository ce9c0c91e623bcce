"""Time our BERT pretraining step against transformers' BertForPreTraining and torch's AdamW.

    python benchmarks/bert_step.py --preset bert_mini --batch 16 --length 128
    python benchmarks/bert_step.py --preset bert_base --batch 8 --length 128 --blocks 5 --steps 4

Both train the same model on the same batches (rows of tokens drawn at random, a tenth of them short and padded, 15 %
masked), dropout on, with AdamW, weight decay, clipping to norm 1 and a learning rate schedule, on all cores, in
float32; with a GPU in bfloat16 (theirs: autocast and torch.compile). Each runs in a process of its own and waits while
the other works; they take turns in blocks of steps, so that a machine that slows down slows both, and the medians over
blocks are compared (see contest.py).

Each does the work that it does for its users: ours projects onto the vocabulary the masked positions alone, theirs all.
On a CPU our command line lets malloc keep freed memory; so that the difference is not malloc's alone, torch runs twice,
as it comes and with the same setting. Needs the extra [parity]. Writes everything to benchmarks/results.
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

import numpy as np

from bert_flax.presets import PRESETS

NUM_BATCHES = 8


def parse() -> argparse.Namespace:
    """The options, for this process and for the two it starts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="bert_mini", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--blocks", type=int, default=9, help="turns each takes")
    parser.add_argument("--steps", type=int, default=10, help="steps per turn")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/bert_step_PRESET_DEVICE.json")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_batches(options: argparse.Namespace, vocab_size: int) -> list[dict[str, np.ndarray]]:
    """Batches in our layout, shaped like the paper's: a tenth of the rows short, 15 % of the tokens masked."""
    draw = np.random.default_rng(options.seed)
    B, L = options.batch, options.length
    P = int(np.ceil(0.15 * L))
    batches = []
    for _ in range(NUM_BATCHES):
        lengths_B = np.where(draw.random(B) < 0.1, draw.integers(8, L + 1, B), L)
        positions_BP = np.zeros((B, P), np.int32)
        weights_BP = np.zeros((B, P), np.float32)
        for row, length in enumerate(lengths_B):
            masked = min(P, max(1, round(0.15 * length)))
            positions_BP[row, :masked] = np.sort(draw.permutation(length)[:masked])
            weights_BP[row, :masked] = 1
        valid_BL = np.arange(L) < lengths_B[:, None]
        batches.append(
            {
                "tokens": np.where(valid_BL, draw.integers(1, vocab_size, (B, L)), 0).astype(np.int32),
                "segments": ((np.arange(L) >= lengths_B[:, None] // 2) & valid_BL).astype(np.int32),
                "valid": valid_BL,
                "masked_positions": positions_BP,
                "masked_tokens": draw.integers(1, vocab_size, (B, P), np.int32),
                "masked_weights": weights_BP,
                "next_is_random": draw.integers(0, 2, B, np.int32),
                "example_weights": np.ones(B, np.float32),
            }
        )
    return batches


class Ours:
    """The step that ``bert-flax pretrain`` runs, with the preset's settings."""

    def __init__(self, options: argparse.Namespace) -> None:
        import jax
        import jax.numpy as jnp

        from bert_flax.model import BertForPreTraining
        from bert_flax.pretrain import loss_weights, pretraining_sums
        from bert_flax.sharding import AXIS_FIELDS, PARAM_RULES
        from core_flax.config import RunConfig, TrainConfig
        from core_flax.hardware import compute_dtype
        from core_flax.params import count
        from core_flax.program import make_program
        from core_flax.task import Task

        self.jax = jax
        config = PRESETS[options.preset]()
        self.batch_size, self.batches = options.batch, make_batches(options, config.model.vocab_size)
        dtype = compute_dtype(config.train.compute_dtype)
        model = BertForPreTraining(config.model, dtype)
        ids = jnp.zeros((1, 8), jnp.int32)
        task = Task(
            init=lambda key: model.init(key, ids, ids, ids == 0, ids[:, :2])["params"],
            loss_weights=loss_weights,
            loss_sums=lambda params, batch, key: pretraining_sums(model, params, batch, key),
            batches=lambda start, rows: iter(()),
            param_rules=PARAM_RULES,
            axis_fields=AXIS_FIELDS,
        )
        train = TrainConfig(num_steps=config.train.num_steps, batch_size=options.batch)
        settings = {name: getattr(config, name) for name in ("optimizer", "schedule", "mesh", "checkpoint", "log")}
        run = RunConfig(seed=options.seed, train=train, **settings)
        self.program = make_program(task, run)
        with jax.set_mesh(self.program.mesh):
            self.state = self.program.init(jax.random.key(options.seed))
        self.num_steps = 0
        self.facts = {
            "parameters": count(self.state.params),
            "device": jax.devices()[0].device_kind,
            "num_devices": jax.device_count(),
            "backend": "cpu" if jax.default_backend() == "cpu" else "accelerator",
            "dtype": str(dtype),
            "model": repr(config.model),
            "optimizer": repr(config.optimizer),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        }

    def take(self, num_steps: int) -> list[float]:
        """Steps as the loop takes them: the loss is read one step late. Returns the losses."""
        from core_flax import sharding

        losses, pending = [], None
        with self.jax.set_mesh(self.program.mesh):
            for _ in range(num_steps):
                batch = self.batches[self.num_steps % NUM_BATCHES]
                placed = sharding.place_batch(batch, self.batch_size, self.program.mesh)
                self.state, metrics = self.program.step(self.state, placed)
                if pending is not None:
                    losses.append(float(pending))
                pending = metrics["loss"]
                self.num_steps += 1
            self.jax.block_until_ready(self.state)
        return [*losses, float(pending)]


class Torch:
    """The usual torch loop round transformers' model: fused AdamW, scaled dot-product attention, no copies to spare."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, preset = torch, PRESETS[options.preset]()
        torch.manual_seed(options.seed)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        size = preset.model
        config = transformers.BertConfig(
            vocab_size=size.vocab_size,
            hidden_size=size.width,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            intermediate_size=size.mlp_width,
            max_position_embeddings=size.max_length,
            hidden_dropout_prob=size.dropout,
            attention_probs_dropout_prob=size.attention_dropout,
        )
        self.model = transformers.BertForPreTraining(config).to(self.device).train()
        self.parameters = list(self.model.parameters())
        settings = preset.optimizer
        groups = [
            {"params": [x for x in self.parameters if x.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [x for x in self.parameters if x.ndim == 1], "weight_decay": 0.0},
        ]
        betas = settings.beta1 or 0.9, settings.beta2 or 0.999
        self.optimizer = torch.optim.AdamW(
            groups, settings.learning_rate, betas=betas, eps=settings.epsilon or 1e-8, fused=True
        )
        warmup, total = preset.schedule.warmup_steps, preset.train.num_steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / max(1, warmup), (total - step) / (total - warmup))
        )
        self.clip_norm = settings.clip_norm
        self.batches = [self.convert(batch) for batch in make_batches(options, size.vocab_size)]
        self.forward = torch.compile(self.model) if self.cuda else self.model
        self.num_steps = 0
        self.facts = {
            "parameters": sum(x.numel() for x in self.parameters),
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "backend": "accelerator" if self.cuda else "cpu",
            "threads": torch.get_num_threads(),
            "attention": config._attn_implementation,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def convert(self, batch: dict[str, np.ndarray]) -> dict:
        """transformers' names; labels at every position, of which -100 are left out."""
        labels_BL = np.full(batch["tokens"].shape, -100)
        rows, places = np.nonzero(batch["masked_weights"])
        labels_BL[rows, batch["masked_positions"][rows, places]] = batch["masked_tokens"][rows, places]
        arrays = {
            "input_ids": batch["tokens"],
            "token_type_ids": batch["segments"],
            "attention_mask": batch["valid"],
            "labels": labels_BL,
            "next_sentence_label": batch["next_is_random"],
        }
        tensors = {name: self.torch.from_numpy(x.astype(np.int64)) for name, x in arrays.items()}
        return {name: x.pin_memory() for name, x in tensors.items()} if self.cuda else tensors

    def take(self, num_steps: int) -> list[float]:
        """Steps; the loss is read one step late. Returns the losses."""
        losses, pending = [], None
        for _ in range(num_steps):
            batch = self.batches[self.num_steps % NUM_BATCHES]
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            self.optimizer.zero_grad(set_to_none=True)
            with self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.cuda):
                loss = self.forward(**batch).loss
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            self.optimizer.step()
            self.schedule.step()
            if pending is not None:
                losses.append(pending.item())
            pending = loss.detach()
            self.num_steps += 1
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
    if PRESETS[options.preset]().optimizer.name != "adamw":
        sys.exit(f"{options.preset} does not train with AdamW; take one of the paper's presets")
    load = contest.load()
    workers = {"ours": contest.Worker("ours")}
    on_cpu = workers["ours"].facts["backend"] == "cpu"
    others = [name for name in CONTESTANTS if name == "torch" or (on_cpu and name not in workers)]
    workers |= {name: contest.Worker(name) for name in others}
    try:
        losses = {name: worker.take(options.warmup)["told"] for name, worker in workers.items()}
        answers = contest.take_turns(workers, options.blocks, options.steps)
    finally:
        for worker in workers.values():
            worker.close()
    timings = {name: [answer["seconds"] / options.steps for answer in each] for name, each in answers.items()}
    losses = {name: sum((answer["told"] for answer in answers[name]), first) for name, first in losses.items()}
    facts = {name: worker.facts for name, worker in workers.items()}
    assert len({fact["parameters"] for fact in facts.values()}) == 1, "not the same model"
    assert len({fact["backend"] for fact in facts.values()}) == 1, "one of them did not find the accelerator"
    tokens = options.batch * options.length
    medians = {name: statistics.median(each) for name, each in timings.items()}
    print(f"{options.preset}, batch {options.batch} x {options.length}, {facts['ours']['device']}, dropout on")
    print(f"{'':22}{'s/step':>9}{'tokens/s':>11}{'ours, times as fast':>21}")
    for name, seconds in medians.items():
        print(f"{name:22}{seconds:9.4f}{tokens / seconds:11.0f}{seconds / medians['ours']:21.2f}")
    report = {
        "what": "seconds per pretraining step, ours and transformers' in turn",
        **contest.origin(),
        "load_at_start": load,
        "seed": options.seed,
        "tokens_per_step": tokens,
        "median_seconds_per_step": medians,
        "tokens_per_second": {name: tokens / seconds for name, seconds in medians.items()},
        "ratio_of_tokens_per_second": {name: seconds / medians["ours"] for name, seconds in medians.items()},
        "seconds_per_step_of_each_block": timings,
        "losses": losses,
        "facts": facts,
    }
    device = facts["ours"]["device"].lower().replace(" ", "_")
    output = options.output or contest.RESULTS / f"bert_step_{options.preset}_{device}.json"
    contest.write(report, output)


if __name__ == "__main__":
    main()
