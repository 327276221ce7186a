"""The paper's five tasks from local files: scores against log-likelihoods computed by hand, identity, bad files.

The prompts below are written out from lm-eval's published task files; the code under test never sees them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError
from stages.contract import Runtime
from stages.evaluate import SAMPLES_FILE, STAGE, EvaluateConfig, EvaluateInputs, EvaluateManifest
from stages.lm_tasks import loaded_tasks, resolve_tasks
from stages.task_data import DATA_TASKS
from tests.oracles import oracle_logits
from tests.tiny_models import tiny_tokenizer

Row = dict[str, Any]


class Question(NamedTuple):
    """What a model must be asked for one row: pairs of context and continuation, and the lengths to normalise by."""

    pairs: list[tuple[str, str]]
    lengths: list[int]
    answer: int


NOUNS = ["river", "letter", "lantern", "stone", "garden", "window"]
VERBS = ["opened", "found", "carried", "left", "saw", "kept"]


def piqa(i: int) -> Row:
    return {
        "goal": f"keep the {NOUNS[i]}",
        "sol1": f"{VERBS[i]} it in the garden",
        "sol2": f"ask {NOUNS[-i]}",
        "label": i % 2,
    }


def ask_piqa(row: Row) -> Question:
    return choices(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def winogrande(i: int) -> Row:
    return {
        "sentence": f"The {NOUNS[i]} beat the {NOUNS[-i]} because the _ was {VERBS[i]} again.",
        "option1": NOUNS[i],
        "option2": NOUNS[-i] + "s",
        "answer": "12"[i % 2],
    }


def ask_winogrande(row: Row) -> Question:
    """The end of the sentence is scored behind each of its beginnings."""
    before, after = row["sentence"].split("_")
    pairs = [(before + row[option], " " + after.strip()) for option in ("option1", "option2")]
    return Question(pairs, [1, 1], int(row["answer"]) - 1)


def hellaswag(i: int) -> Row:
    return {
        "ind": i,
        "activity_label": f"Making a {NOUNS[i]} [header]",
        "ctx_a": f"A man {VERBS[i]}  the {NOUNS[i]}.",
        "ctx_b": "he then",
        "endings": [f"{verb} a {NOUNS[i]} [title] again." for verb in (VERBS[i], VERBS[-i], "slowly drinks", "is")],
        "label": str(i % 4),
    }


def ask_hellaswag(row: Row) -> Question:
    """WikiHow's brackets go, a title begins a sentence, doubled spaces are one."""
    i = row["ind"]
    prompt = f"Making a {NOUNS[i]} : A man {VERBS[i]} the {NOUNS[i]}. He then"
    endings = [f"{verb} a {NOUNS[i]}. again." for verb in (VERBS[i], VERBS[-i], "slowly drinks", "is")]
    return choices(prompt, endings, int(row["label"]))


def arc(i: int) -> Row:
    labels = ["A", "B", "C", "D"] if i % 2 else ["1", "2", "3"]
    texts = [f"the {NOUNS[i]}", "it", f"{VERBS[i]} by the {NOUNS[-i]}", "none"][: len(labels)]
    key = labels[i % len(labels)]
    return {
        "id": f"q{i}",
        "question": f"What {VERBS[i]} the {NOUNS[i]}?",
        "choices": {"text": texts, "label": labels},
        "answerKey": key,
    }


def ask_arc(row: Row) -> Question:
    answer = row["choices"]["label"].index(row["answerKey"])
    return choices(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], answer)


def choices(prompt: str, texts: list[str], answer: int) -> Question:
    return Question([(prompt, " " + text) for text in texts], [len(text) for text in texts], answer)


FORMATS: dict[str, tuple[Callable[[int], Row], Callable[[Row], Question]]] = {
    "piqa": (piqa, ask_piqa),
    "winogrande": (winogrande, ask_winogrande),
    "hellaswag": (hellaswag, ask_hellaswag),
    "arc_easy": (arc, ask_arc),
    "arc_challenge": (lambda i: arc(5 - i), ask_arc),
}


def rows_of(name: str) -> list[Row]:
    return [FORMATS[name][0](i) for i in range(6)]


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in FORMATS:
        write(folder / f"{name}.jsonl", rows_of(name))
    return folder


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(str(tiny_folder("llama")))


def evaluate(model: Checkpoint, data: Path, names: list[str], out_dir: Path, **settings: Any) -> EvaluateManifest:
    out_dir.mkdir()
    specs = resolve_tasks(names, task_data=data, num_fewshot=settings.get("num_fewshot"))
    inputs = EvaluateInputs(model, task_data=data)
    return STAGE.run(EvaluateConfig(tasks=specs, **settings), inputs, out_dir, Runtime())


def log_likelihood(model: Checkpoint, context: str, continuation: str) -> float:
    tokenizer = tiny_tokenizer()
    num_context = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    logits = oracle_logits(load_file(model.path / "model.safetensors"), model.config, ids)
    log_probabilities = logits[0].double().log_softmax(-1)
    return sum(float(log_probabilities[t - 1, ids[0, t]]) for t in range(num_context, ids.shape[1]))


def correct_by_hand(model: Checkpoint, questions: list[Question], *, normalised: bool) -> list[int]:
    correct = []
    for question in questions:
        scores = [log_likelihood(model, *pair) for pair in question.pairs]
        if normalised:
            scores = [score / length for score, length in zip(scores, question.lengths, strict=True)]
        correct.append(int(max(range(len(scores)), key=scores.__getitem__) == question.answer))
    return correct


def test_the_papers_tasks_are_scored_as_by_hand(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    manifest = evaluate(model, data, list(FORMATS), tmp_path / "out", log_samples=True)
    found = {(metric.task, metric.metric): metric for metric in manifest.metrics}
    samples = {(row["task"], row["doc_id"]): row for row in pq.read_table(tmp_path / "out" / SAMPLES_FILE).to_pylist()}
    taken, told_apart = [], 0
    for name, (_, ask) in FORMATS.items():
        questions = [ask(row) for row in rows_of(name)]
        plain, normalised = (correct_by_hand(model, questions, normalised=flag) for flag in (False, True))
        assert found[name, "acc"].value == pytest.approx(statistics.mean(plain))
        assert found[name, "acc"].num_examples == 6
        if name == "winogrande":
            assert (name, "acc_norm") not in found
            taken.append(statistics.mean(plain))
        else:
            assert found[name, "acc_norm"].value == pytest.approx(statistics.mean(normalised))
            taken.append(statistics.mean(normalised))
            told_apart += plain != normalised
        for number, question in enumerate(questions):
            kept = samples[name, number]
            assert kept["acc"] == plain[number]
            assert json.loads(kept["arguments"]) == [list(pair) for pair in question.pairs]
            said = [float(answers[0][0]) for answers in json.loads(kept["responses"])]
            assert said == pytest.approx([log_likelihood(model, *pair) for pair in question.pairs], rel=1e-4)
    assert found["average", "acc_norm or acc"].value == pytest.approx(statistics.mean(taken))
    assert found["average", "acc_norm or acc"].num_examples == 30
    assert 0 < statistics.mean(taken) < 1, "a model that is always right, or never, tells nothing"
    assert told_apart, "normalising must change something, or the test could not see it missing"


def test_samples_have_a_column_a_metric(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    evaluate(model, data, ["winogrande", "piqa"], tmp_path / "out", log_samples=True, limit=2)
    table = pq.read_table(tmp_path / "out" / SAMPLES_FILE)
    fields = {field.name: str(field.type) for field in table.schema}
    assert fields == {
        **dict.fromkeys(("task", "filter", "doc", "target", "arguments", "responses"), "string"),
        "doc_id": "int64",
        "acc": "double",
        "acc_norm": "double",
    }
    rows = table.to_pylist()
    assert [(row["task"], row["doc_id"]) for row in rows] == [
        ("piqa", 0),
        ("piqa", 1),
        *[("winogrande", i) for i in (0, 1)],
    ]
    assert json.loads(rows[0]["doc"]) == piqa(0)
    assert [row["acc_norm"] is None for row in rows] == [False, False, True, True]


def test_no_samples_unless_asked_for(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    evaluate(model, data, ["piqa"], tmp_path / "out", limit=1)
    assert not (tmp_path / "out" / SAMPLES_FILE).exists()


def test_examples_come_from_a_file_of_their_own(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no file .*piqa\.train\.jsonl with the examples that num_fewshot=1 "):
        resolve_tasks(["piqa"], task_data=data, num_fewshot=1)
    shown = {"goal": "find it", "sol1": "the stone", "sol2": "the lantern", "label": 1}
    write(data / "piqa.train.jsonl", [shown])
    with pytest.raises(ConfigurationError, match=r"piqa\.train\.jsonl has 1 examples, .* give --num-fewshot 0 or more"):
        resolve_tasks(["piqa"], task_data=data, num_fewshot=1)
    write(data / "piqa.train.jsonl", [shown, shown])  # so that whichever is drawn is known
    manifest = evaluate(model, data, ["piqa"], tmp_path / "out", num_fewshot=1)
    prompt = "Question: find it\nAnswer: the lantern\n\n"
    asked = [ask_piqa(row) for row in rows_of("piqa")]
    asked = [q._replace(pairs=[(prompt + context, rest) for context, rest in q.pairs]) for q in asked]
    assert manifest.metrics[0].value == pytest.approx(statistics.mean(correct_by_hand(model, asked, normalised=False)))
    assert manifest.metrics[0].num_fewshot == 1


def test_prompts_and_metrics_are_lm_evals_own(data: Path) -> None:
    """Against lm-eval's task of that name, which would get its data from the hub."""
    from lm_eval.tasks import TaskManager

    (spec,) = resolve_tasks(["hellaswag"], task_data=data)
    with loaded_tasks([spec], task_data=data) as tasks:
        (ours,) = tasks.items
        theirs = TaskManager(include_defaults=False, include_path=lm_eval_folder("hellaswag")).task_index["hellaswag"]
        assert theirs.cfg is not None
        for field in ("doc_to_text", "doc_to_target", "doc_to_choice", "output_type"):
            assert getattr(ours.config, field) == theirs.cfg[field]
        assert [metric["metric"] for metric in ours.config.metric_list] == ["acc", "acc_norm"]
        assert ours.config.metadata["version"] == theirs.cfg["metadata"]["version"]


def lm_eval_folder(name: str) -> str:
    import lm_eval.tasks

    return str(Path(lm_eval.tasks.__file__).parent / name)


def test_identity_is_the_content(data: Path, tmp_path: Path) -> None:
    (first,) = resolve_tasks(["piqa"], task_data=data)
    assert first.origin == "data"
    moved = data.rename(tmp_path / "elsewhere")
    write(moved / "piqa.train.jsonl", [piqa(0), piqa(1)])
    assert resolve_tasks(["piqa"], task_data=moved) == (first,), "without examples their file does not matter"
    shots = resolve_tasks(["piqa"], task_data=moved, num_fewshot=1)
    write(moved / "piqa.train.jsonl", [piqa(0), piqa(2)])
    assert shots != resolve_tasks(["piqa"], task_data=moved, num_fewshot=1) != (first,)
    write(moved / "piqa.jsonl", [piqa(1)])
    assert resolve_tasks(["piqa"], task_data=moved) != (first,)
    with pytest.raises(ConfigurationError, match="'piqa' has changed since"), loaded_tasks([first], task_data=moved):
        pass


def test_a_task_of_the_users_own_goes_first(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "piqa.yaml").write_text(
        f"task: piqa\ndataset_path: json\ndataset_kwargs: {{data_files: {data}/piqa.jsonl}}\n"
    )
    assert [spec.origin for spec in resolve_tasks(["piqa", "arc_easy"], own, task_data=data)] == ["local", "data"]


def test_what_other_programs_write_is_read(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    """Numbers for text (HellaSwag's authors), a byte order mark, Windows lines, blank lines, fields of mixed types."""
    first = evaluate(model, data, ["hellaswag"], tmp_path / "first")
    rows = [
        row | {"label": int(row["label"]), "more": [1, "a", None][i % 3]} for i, row in enumerate(rows_of("hellaswag"))
    ]
    text = "\r\n\r\n".join(json.dumps(row) for row in rows)
    (data / "hellaswag.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert evaluate(model, data, ["hellaswag"], tmp_path / "again") == first


def test_a_text_that_looks_like_a_date_stays_text(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    rows = [{"goal": "2024-01-01", "sol1": "2024-01-02", "sol2": "2024-01-03", "label": 0}]
    write(data / "piqa.jsonl", rows)
    evaluate(model, data, ["piqa"], tmp_path / "out", log_samples=True)
    (kept,) = pq.read_table(tmp_path / "out" / SAMPLES_FILE).to_pylist()
    assert json.loads(kept["arguments"])[0] == ["Question: 2024-01-01\nAnswer:", " 2024-01-02"]


def without(row: Row, field: str) -> Row:
    return {name: value for name, value in row.items() if name != field}


BAD: dict[str, tuple[str, Any, str]] = {
    "empty": ("piqa", [], "is empty; it must hold the questions of piqa"),
    "missing field": (
        "piqa",
        [piqa(0), without(piqa(1), "sol2")],
        "line 2: the field 'sol2' is missing; a line has the fields goal, sol1, sol2, label, as in baber/piqa",
    ),
    "no JSON": ("piqa", "{'goal': 1}\n", "line 1 is no JSON"),
    "no object": ("piqa", "[1]\n", "line 1 is no JSON object; a line has the fields"),
    "deep": ("piqa", "[" * 100_000 + "\n", "line 1 is no JSON"),
    "no UTF-8": ("piqa", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
    "label out of range": ("piqa", [piqa(0) | {"label": 2}], "label is 2: it should be less than or equal to 1"),
    "label as text": ("piqa", [piqa(0) | {"label": "1"}], "label is '1': it should be a valid integer"),
    "label of no row": ("piqa", [piqa(0) | {"label": -1}], "label is -1"),
    "blank answer": ("piqa", [piqa(0) | {"sol1": " "}], "sol1 is blank"),
    "half a character": ("piqa", '{"goal":"\\ud800","sol1":"a","sol2":"b","label":0}', "line 1: goal is '\\ud800'"),
    "number as answer": ("winogrande", [winogrande(0) | {"answer": 1}], "answer is 1: it should be '1' or '2'"),
    "answer not told": ("winogrande", [winogrande(0) | {"answer": ""}], "answer is ''"),
    "no gap": ("winogrande", [winogrande(0) | {"sentence": "no gap"}], "no '_' with more text after it"),
    "gap at the end": ("winogrande", [winogrande(0) | {"sentence": "a gap _ "}], "no '_' with more text after it"),
    "no endings": ("hellaswag", [hellaswag(0) | {"endings": []}], "endings is []"),
    "label not told": ("hellaswag", [hellaswag(0) | {"label": ""}], "label is ''"),
    "no such ending": ("hellaswag", [hellaswag(0) | {"label": "4"}], "not the position of one of the endings"),
    "no such key": ("arc_easy", [arc(0) | {"answerKey": "E"}], "answerKey is none of choices.label"),
    "labels missing": (
        "arc_challenge",
        [arc(0) | {"choices": {"text": ["a", "b"]}}],
        "the field 'choices.label' is missing",
    ),
    "fewer labels": (
        "arc_easy",
        [arc(0) | {"choices": {"text": ["a", "b"], "label": ["1"]}}],
        "choices.label and choices.text are not equally long",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(case: str, data: Path) -> None:
    name, content, words = BAD[case]
    path = data / f"{name}.jsonl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        write(path, content)
    with pytest.raises(ConfigurationError) as caught:
        resolve_tasks([name], task_data=data)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600


def test_missing_files_and_folders(data: Path) -> None:
    (data / "arc_easy.jsonl").unlink()
    for names, folder, words in [
        (["piqa", "arc_easy"], data, f"there is no file {data}/arc_easy.jsonl with the questions of arc_easy"),
        (["piqa"], data / "gone", f"there is no folder {data}/gone with task data"),
        (["arc-easy"], data, "did you mean 'arc_easy'?"),
    ]:
        with pytest.raises(ConfigurationError) as caught:
            resolve_tasks(names, task_data=folder)
        assert words in str(caught.value)


def test_every_task_of_the_paper_is_there() -> None:
    assert sorted(DATA_TASKS) == sorted(FORMATS)
