"""Time a training step of ours against nanoGPT's model in torch: the same sizes, AdamW, clipping, no dropout.

    python benchmarks/lm_step.py --preset char_small --batch 12 --length 64 --steps 50
    python benchmarks/lm_step.py --preset gpt2 --batch 1 --length 512 --steps 4 --chunks 2

Each runs in a process of its own and waits while the other works; they take turns in blocks of steps, and the medians
over blocks are compared (see contest.py). float32 on a CPU; with a GPU bfloat16 (theirs: autocast and torch.compile),
and MFU is told, attention counted whole (lm_flax/model.py says what is counted). On a CPU our command line lets malloc
keep freed memory; so that the difference is not malloc's alone, torch runs twice, as it comes and with the same
setting. Needs the extra [parity]. Writes everything to benchmarks/results.
"""

import argparse
import dataclasses
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

PRESETS = ("char_small", "char_10m", "gpt2", "gpt2_medium")
NUM_BATCHES = 8
LEARNING_RATE, BETA2, DECAY, CLIP = 6e-4, 0.95, 0.1, 1.0


def parse() -> argparse.Namespace:
    """The options, for this process and for those it starts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="char_small", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=12, help="sequences per step")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--chunks", type=int, help="our --loss.num-chunks; default: the preset's, for its own batch")
    parser.add_argument("--remat", help="our --model.remat; default: the preset's, for its own batch")
    parser.add_argument("--unroll", type=int, help="our --model.unroll; default: the device's")
    parser.add_argument("--blocks", type=int, default=9, help="turns each takes")
    parser.add_argument("--steps", type=int, default=20, help="steps per turn")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/lm_step_PRESET_DEVICE.json")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def preset_of(options: argparse.Namespace):
    """The preset's settings, without dropout, with AdamW and rows of the length asked for."""
    from core_flax.config import OptimizerConfig, ScheduleConfig
    from lm_flax.presets import PRESETS as ALL

    config = ALL[options.preset]()
    sizes = {"max_length": options.length, "unroll": options.unroll, "remat": options.remat or config.model.remat}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0, **sizes),
        loss=dataclasses.replace(config.loss, num_chunks=options.chunks or config.loss.num_chunks),
        inputs=dataclasses.replace(config.inputs, length=options.length, packing="stream"),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, beta2=BETA2, weight_decay=DECAY, clip_norm=CLIP),
        schedule=ScheduleConfig("constant"),
        train=dataclasses.replace(config.train, batch_size=options.batch),
    )


def make_batches(options: argparse.Namespace, vocab_size: int) -> list[dict[str, np.ndarray]]:
    """Rows of tokens drawn at random, and the tokens after them."""
    draw = np.random.default_rng(options.seed)
    texts = [draw.integers(0, vocab_size, (options.batch, options.length + 1), np.int32) for _ in range(NUM_BATCHES)]
    ones = np.ones((options.batch, options.length), np.float32)
    return [{"tokens": text[:, :-1], "labels": text[:, 1:], "weights": ones} for text in texts]


class Ours:
    """The step that ``lm-flax train`` runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        import jax

        from core_flax.hardware import peak_flops
        from core_flax.params import count
        from core_flax.program import make_program
        from lm_flax.task import task_without_data

        self.jax, config = jax, preset_of(options)
        self.batch_size, self.batches = options.batch, make_batches(options, config.model.vocab_size)
        task = task_without_data(config)
        self.program = make_program(task, config, jax.devices()[:1])
        self.num_steps = 0
        with jax.set_mesh(self.program.mesh):
            self.state = self.program.init(jax.random.key(options.seed))
        self.facts = {
            "parameters": count(self.state.params),
            "device": jax.devices()[0].device_kind,
            "backend": "cpu" if jax.default_backend() == "cpu" else "accelerator",
            "flops_per_step": task.cost(0).flops,
            "peak_flops": peak_flops(jax.devices()[0].device_kind),
            "model": repr(config.model),
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
    """nanoGPT's loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        import nanogpt
        import torch

        config = preset_of(options).model
        self.torch, self.cuda = torch, torch.cuda.is_available()
        torch.manual_seed(options.seed)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = torch.device("cuda" if self.cuda else "cpu")
        sizes = nanogpt.Sizes(config.vocab_size, config.num_layers, config.num_heads, config.width, options.length)
        self.model = nanogpt.GPT(sizes).to(self.device).train()
        self.optimizer = nanogpt.make_adamw(self.model, LEARNING_RATE, BETA2, DECAY)
        self.forward = torch.compile(self.model) if self.cuda else self.model
        self.batches = [
            [torch.from_numpy(batch[name].astype(np.int64)).to(self.device) for name in ("tokens", "labels")]
            for batch in make_batches(options, config.vocab_size)
        ]
        self.num_steps = 0
        self.facts = {
            "parameters": sum(x.numel() for x in self.model.parameters()),
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "backend": "accelerator" if self.cuda else "cpu",
            "threads": torch.get_num_threads(),
            "versions": {"torch": version("torch")},
        }

    def take(self, num_steps: int) -> list[float]:
        """Steps; the loss is read one step late. Returns the losses."""
        losses, pending = [], None
        for _ in range(num_steps):
            with self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.cuda):
                loss = self.forward(*self.batches[self.num_steps % NUM_BATCHES])
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
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
    facts = {name: worker.facts for name, worker in workers.items()}
    assert len({fact["parameters"] for fact in facts.values()}) == 1, "not the same model"
    assert len({fact["backend"] for fact in facts.values()}) == 1, "one of them did not find the accelerator"
    timings = {name: [answer["seconds"] / options.steps for answer in each] for name, each in answers.items()}
    medians = {name: statistics.median(each) for name, each in timings.items()}
    tokens, ours = options.batch * options.length, facts["ours"]
    peak = ours["peak_flops"]
    mfu = {name: ours["flops_per_step"] / seconds / peak if peak else None for name, seconds in medians.items()}
    print(f"{options.preset}, batch {options.batch} x {options.length}, {ours['device']}")
    print(f"{'':22}{'s/step':>9}{'tokens/s':>11}{'ours, times as fast':>21}{'MFU':>8}")
    for name, seconds in medians.items():
        share = "-" if mfu[name] is None else f"{mfu[name]:.1%}"
        print(f"{name:22}{seconds:9.4f}{tokens / seconds:11.0f}{seconds / medians['ours']:21.2f}{share:>8}")
    report = {
        "what": "seconds per training step, ours and nanoGPT's model in turn",
        **contest.origin(),
        "load_at_start": load,
        "seed": options.seed,
        "tokens_per_step": tokens,
        "median_seconds_per_step": medians,
        "tokens_per_second": {name: tokens / seconds for name, seconds in medians.items()},
        "ratio_of_tokens_per_second": {name: seconds / medians["ours"] for name, seconds in medians.items()},
        "mfu": mfu,
        "seconds_per_step_of_each_block": timings,
        "losses": {name: sum((answer["told"] for answer in answers[name]), first) for name, first in losses.items()},
        "facts": facts,
    }
    device = ours["device"].lower().replace(" ", "_")
    contest.write(report, options.output or contest.RESULTS / f"lm_step_{options.preset}_{device}.json")


if __name__ == "__main__":
    main()
