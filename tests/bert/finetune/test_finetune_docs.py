"""docs/finetune.md: every command in it is one that can be given, and its task of one's own is one."""

import re
import shlex
from pathlib import Path

import pytest

from bert_flax import cli
from bert_flax.finetune import cli as commands
from bert_flax.finetune import command, predict, score, tasks
from bert_flax.finetune.readers import read

PAGE = (Path(__file__).parents[3] / "docs" / "finetune.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
LINES = [line for _, block in BLOCKS for line in block.replace("\\\n", " ").split("\n")]
LINES += re.findall(r"`(bert-flax [^`]* --[^`]*)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S))
COMMANDS = [shlex.split(line)[1:] for line in LINES if line.startswith("bert-flax ") and "--help" not in line]


@pytest.fixture
def own_task(monkeypatch):
    """The page's task, put where the page says."""
    (block,) = [block for language, block in BLOCKS if language == "python"]
    found = vars(tasks).copy()
    exec(block, found)
    monkeypatch.setitem(tasks.TASKS, "reviews", found["REVIEWS"])
    return block, found["REVIEWS"]


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_commands(own_task, monkeypatch, argv):
    """Each is parsed as it stands, every option with its value; what would then be done is not."""
    done = []
    monkeypatch.setattr(command, "finetune", lambda *given: done.append(given))
    monkeypatch.setattr(commands, "_finetune_glue", lambda parse: done.append(parse(tasks.TASKS["mrpc"])))
    monkeypatch.setattr(predict, "run", done.append)
    monkeypatch.setattr(score, "print_scores", lambda *given: done.append(score._find_task(given[0])))
    for name in ("import_hf", "export_hf"):
        monkeypatch.setattr(f"bert_flax.pretrained.{name}", lambda *given: done.append(given))
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0 and len(done) == 1


def test_every_command_is_shown():
    assert {argv[0] for argv in COMMANDS} == {"import-hf", "finetune", "predict", "export-hf", "score"}
    assert {argv[1] for argv in COMMANDS if argv[0] == "finetune"} >= {"glue", "custom", "squad2", "swag", "ner"}


def test_a_task_is_a_dozen_lines(own_task, tmp_path):
    block, spec = own_task
    assert len(block.strip().split("\n")) <= 12
    (tmp_path / "train.tsv").write_text('review\tstars\na "good film\tpositive\ndull\tnegative\n')
    examples = read(spec, tmp_path, "train").examples
    assert [(each.text, spec.labels[each.label]) for each in examples] == [
        ('a "good film', "positive"),
        ("dull", "negative"),
    ]
