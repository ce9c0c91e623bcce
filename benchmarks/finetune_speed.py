"""Time our fine-tuning and predictions on MRPC against the torch recipe, in examples a second.

    python benchmarks/finetune_speed.py --data GLUE --weights FOLDER
    python benchmarks/finetune_speed.py --data GLUE --weights FOLDER --blocks 7 --steps 20

--data is a folder in GLUE's layout (MRPC/train.tsv, MRPC/dev.tsv), --weights a Hugging Face folder of a BERT. Both
train on the same examples by the same recipe (batches of 32, at most 128 tokens, AdamW at 5e-5, weight decay 0.01,
clipping to norm 1, warmup and linear decay, dropout 0.1), in float32 on all cores, and predict the whole dev set in
batches of 32. Each runs in a process of its own; they take turns in blocks (see contest.py), and the medians over
blocks are compared.

Ours is what ``bert-flax finetune`` and ``bert-flax predict`` run: its steps with the making of packed batches, and the
evaluator's pass with the making of predictions. Theirs is the loop of finetune_torch.py, with its collating: batches
padded to the length 128, as run_glue does unless told otherwise, and to the longest of the batch. Both have their
texts as tokens before the clock starts, and ours has compiled, which the report gives the seconds of. Our command line
lets malloc keep freed memory; so that the difference is not malloc's alone, torch runs with that setting, too. Both run
once more in bfloat16 (ours: --train.compute-dtype and predict's --compute-dtype; theirs: autocast), which CPUs with
instructions for it do faster.

On a CPU only, where float32 is what both compute in unless told otherwise. Needs the extra [parity], scipy,
scikit-learn and seqeval. Writes everything to benchmarks/results.
"""

import argparse
import hashlib
import itertools
import os
import statistics
import sys
import time
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contest

from core_flax.memory import keep_freed_memory

KEEPING_MEMORY, BFLOAT16 = "_keeping_memory", "_bfloat16"
if any(word.startswith("ours") or word.endswith(KEEPING_MEMORY) for word in sys.argv):  # a worker's name
    keep_freed_memory()  # before jax, torch or numpy, which start threads, are imported

TASK = "mrpc"
BATCH, LENGTH, EPOCHS, LEARNING_RATE, DROPOUT = 32, 128, 3, 5e-5, 0.1


def parse() -> argparse.Namespace:
    """The options, for this process and for those it starts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder in GLUE's layout")
    parser.add_argument("--weights", type=Path, required=True, help="Hugging Face folder of a BERT")
    parser.add_argument("--blocks", type=int, default=5, help="turns each takes at training, and at predicting")
    parser.add_argument("--steps", type=int, default=10, help="training steps per turn; one predicts the dev set")
    parser.add_argument("--warmup", type=int, default=3, help="training steps of each that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=contest.RESULTS / "finetune_speed_cpu.json")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


class Ours:
    """The steps of ``bert-flax finetune mrpc`` and the predictions of ``bert-flax predict``."""

    def __init__(self, options: argparse.Namespace, dtype: str = "float32") -> None:
        import jax

        from bert_flax.finetune.config import resolve
        from bert_flax.finetune.data import load_data
        from bert_flax.finetune.task import make_task
        from bert_flax.finetune.tasks import TASKS
        from bert_flax.pretrained import load_init
        from core_flax.evaluate import make_collect
        from core_flax.params import count
        from core_flax.program import make_program

        if jax.default_backend() != "cpu" or jax.device_count() > 1:
            sys.exit("this comparison is of CPUs, each as one device; set JAX_PLATFORMS=cpu")
        self.jax, self.spec = jax, TASKS[TASK]
        settings = recipe(options.seed, dtype)
        pretrained = load_init(str(options.weights))
        data = load_data(self.spec, str(options.data), pretrained.vocabulary, settings.inputs)
        self.dev, self.config = data.held_out["dev"], resolve(settings, pretrained.config, data.train.num_units)
        self.task = make_task(self.config, self.spec, data.train, data.held_out, pretrained.params)
        self.program = make_program(self.task, self.config)
        self.collect = make_collect(self.task.evaluators["dev"], self.program.mesh)
        self._start()
        self.facts = self._compile(options.warmup + options.blocks * options.steps) | {
            "parameters": count(self.state.params),
            "examples": {"train": data.train.num_units, "dev": self.dev.units.num_units},
            "tokens": {"train": int(data.train.lengths.sum()), "dev": int(self.dev.units.lengths.sum())},
            "model": repr(self.config.model),
            "optimizer": repr(self.config.optimizer),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")},
        }

    def _start(self) -> None:
        """The state that a run begins with."""
        from core_flax.program import first_state

        with self.jax.set_mesh(self.program.mesh):
            self.state = first_state(self.task, self.program, self.config.seed)
        self.num_steps = 0

    def _compile(self, total: int) -> dict[str, Any]:
        """Takes a step of each shape that is to come, and predicts: seconds of that, and what the batches hold."""
        if total > self.config.train.num_steps:
            sys.exit(f"the run has {self.config.train.num_steps} steps, not {total}; take fewer --blocks or --steps")
        with closing(self.task.batches(0, range(BATCH))) as batches:
            train = list(itertools.islice(batches, total))
        seconds = {}
        for rows, step in {len(batch["tokens"]): step for step, batch in enumerate(train)}.items():
            self.num_steps, began = step, time.perf_counter()
            self._train(1)
            seconds[f"step of {rows} x {LENGTH} tokens"] = time.perf_counter() - began
        began = time.perf_counter()
        self._predict()
        seconds["prediction"] = time.perf_counter() - began
        self._start()
        dev = list(self.task.evaluators["dev"].batches())
        return {
            "seconds_of_first_calls": seconds,
            "mean_rows_of_a_training_batch": statistics.fmean(len(batch["tokens"]) for batch in train),
            "share_of_padding": {"train": padding(train), "dev": padding(dev)},
        }

    def take(self, what: str, amount: int) -> list[float]:
        """Steps, whose losses are returned, or passes over the dev set, whose accuracies are."""
        return self._train(amount) if what == "train" else [self._predict() for _ in range(amount)]

    def _train(self, num_steps: int) -> list[float]:
        """Steps as the loop takes them, each one's loss read one step late.

        Batches are made anew for each turn, so that none is ready when the clock starts.
        """
        from core_flax import sharding

        losses, pending = [], None
        with self.jax.set_mesh(self.program.mesh), closing(self.task.batches(self.num_steps, range(BATCH))) as batches:
            for batch in itertools.islice(batches, num_steps):
                assert batch["weights"].sum() == BATCH, "a step takes as many examples as theirs"
                placed = sharding.place_batch(batch, len(batch["tokens"]), self.program.mesh)
                self.state, metrics = self.program.step(self.state, placed)
                if pending is not None:
                    losses.append(float(pending))
                pending = metrics["loss"]
                self.num_steps += 1
            self.jax.block_until_ready(self.state)
        return [*losses, float(pending)]

    def _predict(self) -> float:
        from bert_flax.finetune.predictions import predict

        examples = self.dev.examples
        found = predict(self.spec, examples, self.dev.units, self.collect(self.state.params), self.config.inputs)
        return statistics.fmean(value == each.label for value, each in zip(found.values, examples, strict=True))


def recipe(seed: int, dtype: str) -> Any:
    """The recipe in full, so that another default changes nothing here."""
    from bert_flax.finetune.config import FinetuneInputs, FinetuneSettings
    from core_flax.config import OptimizerConfig, TrainConfig

    return FinetuneSettings(
        seed=seed,
        epochs=EPOCHS,
        warmup_share=0.1,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        inputs=FinetuneInputs(max_length=LENGTH),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.01, clip_norm=1.0),
        train=TrainConfig(batch_size=BATCH, compute_dtype=dtype),
    )


def padding(batches: list[dict[str, Any]]) -> float:
    """Share of the tokens of packed batches that are padding."""
    return 1 - sum(int((batch["sequences"] > 0).sum()) for batch in batches) / sum(
        batch["sequences"].size for batch in batches
    )


class Torch:
    """finetune_torch.py's loop; ``pad`` is its option: "max", the length, or "longest", of each batch.

    ``autocast``: whether matrix products are in bfloat16.
    """

    def __init__(self, options: argparse.Namespace, pad: str, autocast: bool = False) -> None:
        import finetune_torch
        import numpy as np
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(options.seed)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.recipe = finetune_torch
        self.context = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
        own = {"data": options.data, "weights": options.weights, "max_train_rows": None}
        self.options = argparse.Namespace(**own, length=LENGTH, pad=pad, device="cpu")
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.weights)
        self.workload = finetune_torch.make_glue(TASK, tokenizer, self.options)
        self.model = finetune_torch.load_model(self.workload, self.options)
        train, dev = self.workload.train, self.workload.dev
        self.steps = finetune_torch.make_optimizer(self.model, EPOCHS * -(-len(train) // BATCH), LEARNING_RATE)
        draw = np.random.default_rng(options.seed)
        self.order = [int(row) for _ in range(EPOCHS) for row in draw.permutation(len(train))]
        self.facts = {
            "parameters": sum(x.numel() for x in self.model.parameters()),
            "examples": {"train": len(train), "dev": len(dev)},
            "tokens": {
                name: sum(len(row["input_ids"]) for row in rows) for name, rows in (("train", train), ("dev", dev))
            },
            "share_of_padding": {
                "train": self._padding([train[row] for row in self.order[: len(train)]]),
                "dev": self._padding(dev),
            },
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        }

    def _padding(self, rows: list[dict]) -> float:
        """Share of the tokens that pad these rows, in batches."""
        batches = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
        masks = [self.recipe.collate(batch, self.options, labels=False)["attention_mask"] for batch in batches]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def take(self, what: str, amount: int) -> list[float]:
        """Steps, whose mean loss is returned, or passes over the dev set, whose accuracies are."""
        with self.context():
            return self._take(what, amount)

    def _take(self, what: str, amount: int) -> list[float]:
        if what == "train":
            taken, self.order = self.order[: amount * BATCH], self.order[amount * BATCH :]
            assert len(taken) == amount * BATCH, "the run is shorter"
            return [self.recipe.train(self.model, self.steps, self.workload, taken, 0, self.options)["train_loss"]]
        outputs = [self.recipe.predict(self.model, self.workload, self.options)[0] for _ in range(amount)]
        return [float(self.workload.score(each)["accuracy"]) for each in outputs]


CONTESTANTS = {
    "ours": Ours,
    "torch_padded_to_128": partial(Torch, pad="max"),
    "torch_padded_to_longest": partial(Torch, pad="longest"),
    f"torch_padded_to_128{KEEPING_MEMORY}": partial(Torch, pad="max"),
    f"torch_padded_to_longest{KEEPING_MEMORY}": partial(Torch, pad="longest"),
    f"ours{BFLOAT16}": partial(Ours, dtype="bfloat16"),
    f"torch_padded_to_128{BFLOAT16}": partial(Torch, pad="max", autocast=True),
    f"torch_padded_to_longest{BFLOAT16}{KEEPING_MEMORY}": partial(Torch, pad="longest", autocast=True),
}
"""Those that keep memory have the setting of malloc that our command line makes; see the top of the file."""


def compare(answers: dict[str, list[dict[str, Any]]], examples: int) -> dict[str, Any]:
    """Examples a second of each, of the turns and of the median one, and how many times as fast ours is."""
    rates = {name: [examples / answer["seconds"] for answer in each] for name, each in answers.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "examples_per_turn": examples,
        "median_examples_per_second": medians,
        "ours_times_as_fast": {name: medians["ours"] / each for name, each in medians.items()},
        "ours_in_bfloat16_times_as_fast": {name: medians[f"ours{BFLOAT16}"] / each for name, each in medians.items()},
        "examples_per_second_of_each_turn": rates,
        "losses_or_accuracies": {name: [answer["told"] for answer in each] for name, each in answers.items()},
    }


def show(title: str, figures: dict[str, Any]) -> None:
    """Prints a table."""
    print(f"{title:50}{'examples/s':>12}{'ours, times as fast':>21}{'in bfloat16':>13}")
    for name, rate in figures["median_examples_per_second"].items():
        times = figures["ours_times_as_fast"][name], figures["ours_in_bfloat16_times_as_fast"][name]
        print(f"{name:50}{rate:12.1f}{times[0]:21.2f}{times[1]:13.2f}")


def main() -> None:
    """Take turns, print the tables, write the file."""
    options = parse()
    if options.worker:
        return contest.serve(partial(CONTESTANTS[options.worker], options))
    load = contest.load()
    weights = hashlib.sha256((options.weights / "model.safetensors").read_bytes()).hexdigest()
    workers: dict[str, contest.Worker] = {}
    try:
        for name in CONTESTANTS:
            workers[name] = contest.Worker(name)
        facts = {name: worker.facts for name, worker in workers.items()}
        assert len({fact["parameters"] for fact in facts.values()}) == 1, "not the same model"
        assert len({str([fact["examples"], fact["tokens"]]) for fact in facts.values()}) == 1, "not the same examples"
        for worker in workers.values():
            worker.take("train", options.warmup)
            worker.take("predict", 1)
        training = contest.take_turns(workers, options.blocks, "train", options.steps)
        predicting = contest.take_turns(workers, options.blocks, "predict", 1)
    finally:
        for worker in workers.values():
            worker.close()
    train = compare(training, options.steps * BATCH)
    predict = compare(predicting, facts["ours"]["examples"]["dev"])
    show("training", train)
    show("prediction", predict)
    report = {"what": "examples a second on MRPC, ours and torch's in turn", **contest.origin()}
    report |= {"load_at_start": load, "seed": options.seed, "weights_sha256": weights}
    contest.write({**report, "train": train, "predict": predict, "facts": facts}, options.output)


if __name__ == "__main__":
    main()
