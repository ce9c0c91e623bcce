"""Small files in the official layouts, and what readers make of them as tuples."""

import dataclasses
import json

CONTEXT = "Der Fluß, «naïve» 🙂, fließt nach Süden."
FLOW = CONTEXT.index("fließt")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(*rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def tuples(dataset):
    return [dataclasses.astuple(example) for example in dataset.examples]


def squad(*questions, context=CONTEXT):
    half = len(questions) // 2
    paragraphs = [{"context": context, "qas": list(part)} for part in (questions[:half], questions[half:])]
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [part]} for part in paragraphs]})


def question(name, *answers, **more):
    return {"id": name, "question": f"{name}?", "answers": [{"text": t, "answer_start": s} for t, s in answers]} | more
