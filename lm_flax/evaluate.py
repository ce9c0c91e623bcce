"""``lm-flax evaluate``: what a model makes of held-out data, in rows as in training or in a sliding window."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from core_flax.config import check_range
from core_flax.hardware import compute_dtype
from core_flax.run import Run
from core_flax.run import evaluate as run_evaluate
from core_flax.types import UserError
from lm_flax import runs
from lm_flax.architectures import make_model
from lm_flax.config import Word2VecRun, check_rows
from lm_flax.generate import start_of
from lm_flax.task import make_evaluator
from lm_flax.word2vec_task import make_task as make_word2vec_task


@dataclass(frozen=True)
class EvaluateCommand:
    """What a model makes of held-out text: loss per token, perplexity, bits per byte, perplexity per word.

    Beside them stand the figures of the unigram model of the training text. A word is what stands between white space,
    and the end of a line.
    """

    workdir: str
    """Folder of a training run, or an imported model."""
    data: str | None = None
    """Prepared folder to evaluate on; None: the one that the run was trained on."""
    split: Literal["valid", "train"] = "valid"
    """The part of that folder."""
    length: int | None = None
    """Tokens of a row; None: as in training."""
    stride: int | None = None
    """How far a row begins behind the one before; of a row, only the last so many tokens count, so that each is
    predicted from at least length - stride tokens. Smaller is slower and tells a lower loss. None: the length."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "length", "stride", least=1)


def evaluate(command: EvaluateCommand) -> None:
    """``lm-flax evaluate``: print the table. Raises UserError if data and model do not belong together."""
    run, tokenizer = runs.load_run(command.workdir)
    folder = run.data_folder(command.data)
    train, valid, found = runs.open_data(folder)
    if found.fingerprint != tokenizer.fingerprint:
        raise UserError(f"data folder {folder} was made with another tokenizer than the model in {run.workdir}")
    text = train if command.split == "train" else valid
    if text is None:
        raise UserError(f"{folder} holds out nothing: prepare it with --valid-fraction above 0, or give --split train")
    if isinstance(run.config, Word2VecRun):
        if (command.length, command.stride) != (None, None):
            raise UserError("--length and --stride are for language models, and this run is of word vectors")
        evaluator = make_word2vec_task(run.config, train, text).evaluators["held_out"]
        metrics, step = run_evaluate(run, evaluator, command.step)
        for name, value in metrics.items():
            print(f"{command.split}, step {step}: {name} {value:.4f}")
        return
    run = _as_asked(run, command)
    model = make_model(run.config.model, compute_dtype(run.config.train.compute_dtype))
    evaluator = make_evaluator(run.config, model, text, start_of(run, tokenizer), command.stride)
    metrics, step = run_evaluate(run, evaluator, command.step)
    runs.print_held_out(metrics, step, train, text, tokenizer)


def _as_asked(run: Run[Any], command: EvaluateCommand) -> Run[Any]:
    """The run with rows of the length asked for. Raises UserError if that, or the stride, cannot be."""
    config = run.config
    inputs = dataclasses.replace(config.inputs, length=command.length or config.inputs.length)
    config = dataclasses.replace(config, inputs=inputs, train=dataclasses.replace(config.train, eval_batches=0))
    check_rows(config)
    if command.stride is not None and inputs.order == "streams":
        raise UserError("--stride: this model forgets nothing between rows, so there is nothing to slide; leave it out")
    if command.stride is not None and command.stride > inputs.length:
        raise UserError(f"--stride {command.stride} would leave tokens out; give {inputs.length}, the length, or less")
    return dataclasses.replace(run, config=config)
