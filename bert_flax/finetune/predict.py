"""``bert-flax predict``: what a fine-tuned model says of a file, or of one text at the terminal."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bert_flax.finetune import spans, tables
from bert_flax.finetune.conll import DOCUMENT_START
from bert_flax.finetune.data import encode, remarks_on
from bert_flax.finetune.examples import Dataset, QuestionExample, TaggedExample, TextExample
from bert_flax.finetune.files import task_of
from bert_flax.finetune.predictions import Predictions, Told, predict
from bert_flax.finetune.readers import read_file
from bert_flax.finetune.runs import FinetuneRun, best_run, figures_by_step
from bert_flax.finetune.task import Labelled, make_evaluator, make_model
from bert_flax.finetune.tasks import SUBMISSION_HEADER, TaskSpec
from core_flax import storage
from core_flax.config import MeshConfig
from core_flax.evaluate import make_collect
from core_flax.hardware import compute_dtype
from core_flax.sharding import make_mesh, replicated, ways_of_batch
from core_flax.types import UserError

NULL_THRESHOLD, NO_ANSWER = "dev/null_threshold", "(no answer)"


@dataclass(frozen=True, kw_only=True)
class PredictCommand:
    """Predictions of a fine-tuned model, for a file or for one text."""

    workdir: str
    """Folder of bert-flax finetune; of several seeds the one that is best on the dev set is taken."""
    data: str | None = None
    """File in the task's layout, with or without labels."""
    output: str | None = None
    """File to write: GLUE's submission TSV (also for SWAG; a CSV if its name ends in .csv), SQuAD's JSON, or CoNLL
    columns."""
    null_odds: str | None = None
    """SQuAD 2.0: file to write with the null odds of each question."""
    n_best: str | None = None
    """SQuAD: file to write with the candidates of each question."""
    text: str | None = None
    """One text instead of a file (squad: the question; ner: words with spaces between); the prediction is printed."""
    text_pair: str | None = None
    """Its second text (squad: the context)."""
    step: int | None = None
    """Step of the checkpoint; None: the best on the dev set."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Type of the computation; None: that of training. bfloat16 is faster on CPUs with instructions for it, too."""

    def __post_init__(self) -> None:
        """Raises UserError on what does not go together."""
        if (self.data is None) == (self.text is None):
            raise UserError("give either --data FILE with --output FILE, or --text TEXT")
        if (self.data is None) != (self.output is None):
            raise UserError("--data FILE and --output FILE go together")
        if self.text is None and self.text_pair is not None:
            raise UserError("--text-pair goes with --text")
        if self.data is None and (self.null_odds, self.n_best) != (None, None):
            raise UserError("--null-odds and --n-best go with --data FILE")
        for option, text in (("--text", self.text), ("--text-pair", self.text_pair)):
            if text is not None and not text.strip():
                raise UserError(f"{option} is empty")
            if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"{option} is not UTF-8")
        for option, path in (("--output", self.output), ("--null-odds", self.null_odds), ("--n-best", self.n_best)):
            if path is not None and (not path or "://" in path):
                raise UserError(f"{option} {path or 'is empty'}: only local files can be written; give the path of one")
        written = [Path(path).resolve() for path in (self.output, self.null_odds, self.n_best, self.data) if path]
        if len(set(written)) < len(written):
            raise UserError("--data, --output, --null-odds and --n-best must be different files")


def run(command: PredictCommand) -> None:
    """Writes or prints predictions.

    Raises:
      UserError: the file, the text or the folder does not fit.
    """
    found = best_run(str(storage.folder("--workdir", command.workdir)))
    spec = found.task.spec
    if (command.null_odds and not spec.unanswerable) or (command.n_best and spec.kind != "span"):
        raise UserError(f"--null-odds is for squad2, --n-best for squad and squad2; this run is of task {spec.name}")
    if command.text is not None:
        example: Any = _example(spec, command.text, command.text_pair)
        _show(
            spec, example, predict_examples(found, Dataset((example,)), "--text", command.step, command.compute_dtype)
        )
        return
    assert command.data is not None and command.output is not None
    dataset = read_file(spec, command.data, labelled=False)
    for path in filter(None, (command.output, command.null_odds, command.n_best)):
        storage.check_writable(Path(path))
    if spec.kind in ("classification", "regression", "choice"):
        tables.check_fields(Path(command.output), (*spec.labels, *(example.id for example in dataset.examples)))
    owner = task_of(Path(command.data).absolute().parent)
    if spec.folder and owner not in (None, spec.name):
        print(f"{command.data} is in the folder of task {owner}, the model is of {spec.name}", flush=True)
    predictions = predict_examples(found, dataset, command.data, command.step, command.compute_dtype)
    write(spec, dataset.examples, predictions, Path(command.output))
    if command.null_odds:
        with storage.writing(path := Path(command.null_odds)):
            spans.write_json(path, spans.null_odds(predictions.answers))
    if command.n_best:
        with storage.writing(path := Path(command.n_best)):
            spans.write_json(path, spans.n_best_lists(predictions.answers, spec.unanswerable))
    print(f"{command.output}: {len(dataset.examples):,} predictions of {found.workdir}")


def predict_examples(
    found: FinetuneRun, dataset: Dataset[Any], where: str, step: int | None = None, dtype: str | None = None
) -> Predictions:
    """Predictions of a run's model for examples, on all devices. Prints what is to be said of them: texts cut.

    Args:
      found: the run.
      dataset: the examples, with labels or without.
      where: a name for the examples. That there are any is not said of ``--text``.
      step: of the checkpoint; None: the best one.
      dtype: of the computation, as ``TrainConfig.compute_dtype``; None: that of training.
    """
    spec, config = found.task.spec, found.config
    units = encode(spec, dataset.examples, found.vocabulary, config.inputs, labelled=False)
    units.labels = []
    for line in remarks_on(where, dataset, units, config.inputs)[where == "--text" :]:
        print(line)
    mesh = make_mesh(MeshConfig())
    model = make_model(spec, config.model, compute_dtype(dtype or config.train.compute_dtype))
    evaluator = make_evaluator(config, spec, model, Labelled(dataset.examples, units), ways_of_batch(mesh))
    params, step = found.params(step, replicated(mesh))
    threshold = _null_threshold(found, step) if spec.unanswerable else None
    told: Told = make_collect(evaluator, mesh)(params)
    return predict(spec, dataset.examples, units, told, config.inputs, threshold)


def _null_threshold(found: FinetuneRun, step: int) -> float:
    """The threshold that was best on the dev set at a step."""
    by_step = figures_by_step(found.workdir)
    known = [each for each, figures in by_step.items() if NULL_THRESHOLD in figures]
    if step not in known:
        raise UserError(
            f"{found.workdir}: step {step} was not measured on the dev set, so there is no threshold of null odds; "
            f"these were: {', '.join(map(str, known)) or 'none'}"
        )
    return by_step[step][NULL_THRESHOLD]


def _example(spec: TaskSpec, text: str, pair: str | None) -> TextExample | QuestionExample | TaggedExample:
    if spec.kind == "choice":
        raise UserError(f"--text does not go with {spec.name}, which chooses among endings; give --data FILE")
    if spec.kind == "tagging":
        if pair is not None:
            raise UserError(f"--text-pair does not go with {spec.name}")
        return TaggedExample("0", tuple(text.split()), None, 0)
    wants_pair = spec.kind == "span" or (spec.columns is not None and spec.columns.text_pair is not None)
    if wants_pair != (pair is not None):
        raise UserError(f"task {spec.name} takes {'a' if wants_pair else 'no'} --text-pair")
    if spec.kind == "span":
        return QuestionExample("0", text, pair or "", (), False)
    return TextExample("0", text, pair, None)


def _show(spec: TaskSpec, example: Any, found: Predictions) -> None:
    (value,) = found.values
    match spec.kind:
        case "span":
            (rows,) = spans.n_best_lists(found.answers, spec.unanswerable).values()
            if not rows:
                print(NO_ANSWER)
            for place, row in enumerate(rows):
                if place < 5 or not row["text"]:
                    print(f"{row['probability']:7.1%}  {row['text'] or NO_ANSWER}")
            if found.null_threshold is not None:
                odds = found.answers[example.id].null_odds
                side = "above" if odds > found.null_threshold else "not above"
                why = f"null odds {odds:.2f}, {side} {found.null_threshold:.2f}, the best threshold on the dev set"
                print(f"prediction: {value or NO_ANSWER} ({why})")
        case "tagging":
            for word, tag in zip(example.words, value, strict=True):
                print(f"{word}\t{tag}")
        case "regression":
            print(f"{value:.3f}")
        case _:
            for place in found.probabilities[0].argsort()[::-1]:
                print(f"{found.probabilities[0][place]:7.1%}  {spec.labels[place]}")


def write(spec: TaskSpec, examples: Sequence[Any], found: Predictions, path: Path) -> None:
    """Writes predictions as the task's scorer reads them."""
    match spec.kind:
        case "span":
            text = json.dumps(
                {example.id: value for example, value in zip(examples, found.values, strict=True)}, ensure_ascii=False
            )
            text += "\n"
        case "tagging":
            text = _columns(examples, found.values)
        case _:
            shown = found.values if spec.kind == "regression" else [spec.labels[value] for value in found.values]
            rows = [SUBMISSION_HEADER, *((example.id, shown[place]) for place, example in enumerate(examples))]
            text = tables.format_table(path, rows)
    with storage.writing(path):
        path.write_text(text, encoding="utf-8")


def _columns(examples: Sequence[TaggedExample], tags: Sequence[Sequence[str]]) -> str:
    """Words and tags. Where each sentence is a document of its own, the file had no line that begins one."""
    has_documents = len({example.document for example in examples}) < len(examples)
    lines, document = [], None
    for example, tagged in zip(examples, tags, strict=True):
        if has_documents and example.document != document:
            lines += [f"{DOCUMENT_START} O", ""]
            document = example.document
        lines += [f"{word} {tag}" for word, tag in zip(example.words, tagged, strict=True)]
        lines.append("")
    return "\n".join([*lines, ""])
