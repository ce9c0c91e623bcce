"""A tiny BERT learns eight fixed examples by heart."""

import jax
import pytest

from bert_flax.config import BertConfig, InputsConfig, PretrainConfig
from bert_flax.pretrain import make_task
from core_flax import sharding
from core_flax.config import MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.data.records import PassageStore
from core_flax.program import make_program
from core_flax.text.wordpiece import WordPiece

STEPS, B = 100, 8


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_eight_examples_are_learned_by_heart(data, compute_dtype):
    vocabulary = WordPiece.load(data / "vocab.txt")
    sizes = {"num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 64, "max_length": 32}
    config = PretrainConfig(
        model=BertConfig(vocab_size=vocabulary.num_tokens, dropout=0.0, attention_dropout=0.0, **sizes),
        inputs=InputsConfig(length=32, max_predictions=5),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=10),
        train=TrainConfig(num_steps=STEPS, batch_size=B, compute_dtype=compute_dtype),
        mesh=MeshConfig(data=1),
    )
    task = make_task(config, PassageStore(data, "train"), None, vocabulary)
    program = make_program(task, config, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        batch = sharding.place_batch(next(task.batches(0, range(B))), B, program.mesh)
        state, metrics = program.init(jax.random.key(0)), []
        for _ in range(STEPS):
            state, each = program.step(state, batch)
            metrics.append({name: float(x) for name, x in jax.device_get(each).items() if x.ndim == 0})
    first, last = metrics[0], metrics[-1]
    assert first["mlm_loss"] > 4.5 and first["next_sentence_loss"] > 0.6  # as good as guessing
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(state.params))
    assert last["mlm_loss"] < 0.01 and last["next_sentence_loss"] < 0.01
    assert last["mlm_accuracy"] == last["next_sentence_accuracy"] == 1
