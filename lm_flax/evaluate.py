"""``lm-flax evaluate``: what a model makes of held-out data, in rows as in training or in a sliding window."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from core_flax.config import check_range
from core_flax.hardware import compute_dtype
from core_flax.run import Run, on_all_held_out
from core_flax.run import evaluate as run_evaluate
from core_flax.types import UserError
from lm_flax import figures, runs
from lm_flax.architectures import context, make_model
from lm_flax.config import Word2VecRun
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
    batch_size: int | None = None
    """Rows that are read together; None: as in training. Of an LSTM also the streams that the text is cut into."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "length", "stride", "batch_size", least=1)


def evaluate(command: EvaluateCommand) -> None:
    """``lm-flax evaluate``: print the table. Raises UserError if data and model do not belong together."""
    run, tokenizer = runs.load_run(command.workdir)
    folder = run.data_folder(command.data)
    train, valid, found = runs.open_data(folder)
    if found.fingerprint != tokenizer.fingerprint:
        raise UserError(f"data folder {folder} was made with another tokenizer than the model in {run.workdir}")
    if found.end_id != tokenizer.end_id:
        raise UserError(
            f"in data folder {folder} token {found.end_id} ends documents, for the model in {run.workdir} it is "
            f"{tokenizer.end_id}; prepare it again with --tokenizer {run.workdir}"
        )
    text = train if command.split == "train" else valid
    if text is None:
        raise UserError(f"{folder} holds out nothing: prepare it with --valid-fraction above 0, or give --split train")
    if isinstance(run.config, Word2VecRun):
        if (command.length, command.stride, command.batch_size) != (None, None, None):
            raise UserError("--length, --stride and --batch-size are for language models, not for word vectors")
        evaluator = make_word2vec_task(on_all_held_out(run.config), train, text).evaluators["held_out"]
        metrics, step = run_evaluate(run, evaluator, command.step)
        for name, value in metrics.items():
            print(f"{command.split}, step {step}: {name} {value:.4f}")
        return
    run = _as_asked(run, command)
    model = make_model(run.config.model, compute_dtype(run.config.train.compute_dtype))
    evaluator = make_evaluator(run.config, model, text, start_of(run, tokenizer), command.stride)
    metrics, step = run_evaluate(run, evaluator, command.step)
    title = "held out" if command.split == "valid" else "training text"
    figures.print_table(metrics, f"{title}, step {step}", train, text, tokenizer)


def _as_asked(run: Run[Any], command: EvaluateCommand) -> Run[Any]:
    """The run with rows of the length asked for. Raises UserError if that, or the stride, cannot be."""
    config, most = on_all_held_out(run.config), context(run.config.model)
    if command.length is not None and most is not None and command.length > most:
        raise UserError(f"--length {command.length}: the model can take {most} tokens; give so many at most")
    inputs = dataclasses.replace(config.inputs, length=command.length or config.inputs.length)
    settings = config.train
    if command.batch_size is not None:
        settings = dataclasses.replace(settings, batch_size=command.batch_size, num_microbatches=1)
    config = dataclasses.replace(config, inputs=inputs, train=settings)
    if command.stride is not None and inputs.order == "streams":
        raise UserError("--stride: this model forgets nothing between rows, so there is nothing to slide; leave it out")
    if command.stride is not None and command.stride > inputs.length:
        raise UserError(f"--stride {command.stride} would leave tokens out; give {inputs.length}, the length, or less")
    return dataclasses.replace(run, config=config)
