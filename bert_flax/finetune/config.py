"""The settings of a fine-tuning run."""

import dataclasses
import math
from dataclasses import dataclass

from bert_flax.finetune.tasks import TaskSpec
from bert_flax.model import BertConfig
from core_flax.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig, check_range
from core_flax.types import UserError


@dataclass(frozen=True)
class FinetuneInputs:
    """How examples become sequences of tokens."""

    max_length: int = 128
    """Tokens of a sequence, [CLS] and [SEP] included; of longer texts the end is cut, which is reported."""
    stride: int = 128
    """squad, squad2: tokens between the starts of two windows over a context that is too long."""
    max_answer_tokens: int = 30
    """squad, squad2: tokens of the longest answer."""
    n_best: int = 20
    """squad, squad2: candidates kept for each question."""
    document_context: bool = False
    """ner: fill the sequence with words of the same document before and after the sentence."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("inputs", self, "max_length", least=16)
        check_range("inputs", self, "stride", "max_answer_tokens", "n_best", least=1)


@dataclass(frozen=True)
class FinetuneSettings(RunConfig):
    """What can be set for a fine-tuning run; the model is the pretrained one's."""

    epochs: float | None = 3
    """Passes over the training examples, from which train.num-steps follows; None: train.num-steps as it is given."""
    warmup_share: float | None = 0.1
    """Share of the steps in which the learning rate rises, from which schedule.warmup-steps follows; None: as given."""
    evaluations_per_epoch: int | None = 1
    """Evaluations on the dev set in each epoch, from which train.eval-every-steps follows; None: as given. The last
    step is always evaluated."""
    dropout: float | None = None
    """Share dropped from the output of every sublayer and before the head; None: as in pretraining, or in the
    fine-tuning whose model is taken over."""
    attention_dropout: float | None = None
    """Share dropped from attention probabilities; None: likewise."""
    inputs: FinetuneInputs = FinetuneInputs()

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        super().__post_init__()
        check_range("", self, "epochs", above=0)
        check_range("", self, "epochs", below=2**31)
        check_range("", self, "warmup_share", "dropout", "attention_dropout", least=0, below=1)
        check_range("", self, "evaluations_per_epoch", least=1)
        if not self.checkpoint.keep_best:
            raise UserError(
                "--checkpoint.keep-best 0: the best checkpoint is what predict and export-hf take; 1 or more"
            )
        if self.train.eval_batches:
            raise UserError(
                f"--train.eval-batches {self.train.eval_batches}: a task is measured on its whole dev set; 0"
            )


@dataclass(frozen=True)
class FinetuneConfig(FinetuneSettings):
    """A run's settings with its model."""

    model: BertConfig = BertConfig()


DECIDED_BY = {
    "train.num_steps": "epochs",
    "schedule.warmup_steps": "warmup_share",
    "train.eval_every_steps": "evaluations_per_epoch",
}
"""Settings of any run, and what decides each of them here unless it is None."""


ONLY_FOR = {
    "--inputs.stride": "span",
    "--inputs.max-answer-tokens": "span",
    "--inputs.n-best": "span",
    "--inputs.document-context": "tagging",
}
"""Options that mean something for one kind of task alone."""


def settings_of(spec: TaskSpec) -> FinetuneSettings:
    """The task's recipe."""
    return FinetuneSettings(
        epochs=spec.epochs,
        inputs=FinetuneInputs(max_length=spec.max_length),
        optimizer=OptimizerConfig(learning_rate=spec.learning_rate),
        train=TrainConfig(batch_size=spec.batch_size),
        checkpoint=CheckpointConfig(every_steps=0, keep_last=1),
    )


def resolve(settings: FinetuneSettings, model: BertConfig, num_units: int) -> FinetuneConfig:
    """The run's config: steps, warmup and evaluations from the number of training units, dropout into the model.

    Raises:
      UserError: sequences are longer than the model takes.
    """
    train, schedule = settings.train, settings.schedule
    per_epoch = num_units / train.batch_size
    if settings.epochs is not None:
        train = dataclasses.replace(train, num_steps=max(1, round(settings.epochs * per_epoch)))
    if settings.warmup_share is not None:
        schedule = dataclasses.replace(schedule, warmup_steps=round(settings.warmup_share * train.num_steps))
    if settings.evaluations_per_epoch is not None:
        # Rounded up, so that the last of them is not followed at once by that of the last step.
        num_epochs = settings.epochs or train.num_steps / per_epoch
        times = max(1, round(num_epochs * settings.evaluations_per_epoch))
        train = dataclasses.replace(train, eval_every_steps=math.ceil(train.num_steps / times))
    if settings.inputs.max_length > model.max_length:
        raise UserError(
            f"--inputs.max-length {settings.inputs.max_length} exceeds the {model.max_length} positions of the model"
        )
    changed = {name: getattr(settings, name) for name in ("dropout", "attention_dropout")}
    model = dataclasses.replace(model, **{name: value for name, value in changed.items() if value is not None})
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(FinetuneSettings)}
    return FinetuneConfig(**fields | {"train": train, "schedule": schedule}, model=model)
