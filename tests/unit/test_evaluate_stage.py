"""The evaluate stage: task scores against log-likelihoods computed by hand, what identifies a task, what is refused."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from blockpruner.calibration import save_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError
from blockpruner.progress import Progress
from stages.contract import ArtifactRef, Runtime
from stages.evaluate import (
    RESULTS_FILE,
    STAGE,
    EvaluateConfig,
    EvaluateInputs,
    EvaluateManifest,
)
from stages.lm_harness import evaluate_tasks
from stages.lm_tasks import TaskSpec, loaded_tasks, resolve_tasks
from stages.task_scores import task_metrics
from tests.oracles import oracle_logits, oracle_sequence_nll
from tests.tiny_models import tiny_token_ids, tiny_tokenizer

Doc = dict[str, Any]

DOCS: list[Doc] = [
    {
        "question": f"She {verb} the {noun}",
        "choices": ["again", "in the quiet garden", "slowly and often"],
        "answer": index % 3,
    }
    for index, (verb, noun) in enumerate((v, n) for v in ("opened", "found", "carried") for n in ("river", "letter"))
]

PICK: Mapping[str, Any] = {
    "task": "pick",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/pick.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    "metadata": {"version": 1.0},
}


def write_docs(path: Path, docs: list[Doc]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))


def write_task(folder: Path, **changes: Any) -> None:
    """Write the task 'pick', changed; a None takes a field out."""
    config = {key: value for key, value in (dict(PICK) | changes).items() if value is not None}
    (folder / f"{config.get('task', 'pick')}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder)
    write_docs(folder / "data" / "pick.jsonl", DOCS)
    return folder


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(str(tiny_folder("llama")))


def evaluate(
    model: Checkpoint, task_dir: Path, names: list[str], out_dir: Path, runtime: Runtime | None = None, **settings: Any
) -> EvaluateManifest:
    out_dir.mkdir()
    config = EvaluateConfig(tasks=resolve_tasks(names, task_dir), **settings)
    return STAGE.run(config, EvaluateInputs(model, task_dir=task_dir), out_dir, runtime or Runtime())


def correct_by_hand(model: Checkpoint, docs: list[Doc], normalised: bool, shots: list[Doc] | None = None) -> list[int]:
    """For each document, 1 if the answer has the highest log-likelihood (by character if normalised), else 0."""
    tensors = load_file(model.path / "model.safetensors")
    tokenizer = tiny_tokenizer()
    correct = []
    for doc in docs:
        prompt = "".join(f"{shot['question']} {shot['choices'][shot['answer']]}\n\n" for shot in shots or [])
        prompt += doc["question"]
        num_prompt = len(tokenizer(prompt)["input_ids"])
        scores = []
        for choice in doc["choices"]:
            ids = torch.tensor([tokenizer(f"{prompt} {choice}")["input_ids"]])
            log_probabilities = oracle_logits(tensors, model.config, ids)[0].double().log_softmax(-1)
            score = sum(float(log_probabilities[t - 1, ids[0, t]]) for t in range(num_prompt, ids.shape[1]))
            scores.append(score / len(choice) if normalised else score)
        correct.append(int(max(range(len(scores)), key=scores.__getitem__) == doc["answer"]))
    return correct


def test_accuracy_is_the_one_computed_by_hand(
    model: Checkpoint,
    task_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # the data's path is relative to the YAML, not to where one stands
    capfd.readouterr()
    heard: list[Progress] = []
    manifest = evaluate(model, task_dir, ["pick"], tmp_path / "out", Runtime(progress=heard.append))
    *metrics, average = manifest.metrics
    assert average.model_dump() == metrics[1].model_dump() | {"task": "average", "metric": "acc_norm or acc"}
    for metric, normalised in zip(metrics, (False, True), strict=True):
        correct = correct_by_hand(model, DOCS, normalised)
        assert metric.model_dump() == {
            "task": "pick",
            "metric": "acc_norm" if normalised else "acc",
            "value": pytest.approx(statistics.mean(correct)),
            "stderr": pytest.approx(statistics.stdev(correct) / math.sqrt(len(correct))),
            "num_fewshot": 0,
            "num_examples": 6,
        }
    assert manifest.texts == ()
    assert capfd.readouterr().out == ""
    requests = [report for report in heard if report.unit == "requests"]
    assert (requests[-1].done, requests[-1].total) == (18, 18)
    assert [report.done for report in requests] == sorted(report.done for report in requests)


def test_the_tiny_models_scores_tell_apart(model: Checkpoint) -> None:
    """Guards the test above: neither all right nor all wrong, and normalising changes something."""
    plain, normalised = (correct_by_hand(model, DOCS, flag) for flag in (False, True))
    assert 0 < sum(plain) < len(plain)
    assert plain != normalised


def test_all_that_lm_eval_says_is_kept(model: Checkpoint, task_dir: Path, tmp_path: Path) -> None:
    evaluate(model, task_dir, ["pick"], tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    kept = json.loads((tmp_path / "out" / RESULTS_FILE).read_text(), parse_constant=refuse)
    assert kept["results"]["pick"]["sample_len"] == 6
    assert kept["lm_eval_version"] == EvaluateConfig(tasks=(TaskSpec(name="x", origin="local"),)).lm_eval_version
    assert {"configs", "versions", "n-shot", "transformers_version"} <= set(kept)
    assert "samples" not in kept
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RESULTS_FILE]


@pytest.mark.parametrize(
    ("changes", "available"),
    [
        ({}, 6),
        ({"fewshot_split": "test"}, 5),  # the question itself is none of its examples
        ({"fewshot_config": {"sampler": "first_n", "samples": DOCS[:2]}}, 2),
    ],
)
def test_no_more_examples_can_be_shown_than_there_are(
    changes: dict[str, Any], available: int, model: Checkpoint, task_dir: Path, tmp_path: Path
) -> None:
    write_task(task_dir, **changes)
    evaluate(model, task_dir, ["pick"], tmp_path / "most", num_fewshot=available, limit=2)
    with pytest.raises(ConfigurationError, match=f"'pick' has {available} examples .* give --num-fewshot {available}"):
        evaluate(model, task_dir, ["pick"], tmp_path / "more", num_fewshot=available + 1, limit=2)
    write_task(task_dir, **changes, num_fewshot=0)
    evaluate(model, task_dir, ["pick"], tmp_path / "fixed", num_fewshot=99, limit=2)  # a task that fixes it stays at 0


def test_fewshot_limit_and_repeated_calls(model: Checkpoint, task_dir: Path, tmp_path: Path) -> None:
    write_docs(task_dir / "data" / "shots.jsonl", DOCS[:1])
    files = {"test": "data/pick.jsonl", "train": "data/shots.jsonl"}
    write_task(task_dir, dataset_kwargs={"data_files": files}, training_split="train")
    settings: dict[str, Any] = {"num_fewshot": 1, "limit": 4}
    first = evaluate(model, task_dir, ["pick"], tmp_path / "first", **settings)
    again = evaluate(model, task_dir, ["pick"], tmp_path / "again", Runtime(batch_size=1), **settings)
    assert first == again
    correct = correct_by_hand(model, DOCS[:4], normalised=False, shots=DOCS[:1])
    assert first.metrics[0].value == pytest.approx(statistics.mean(correct))
    assert (first.metrics[0].num_fewshot, first.metrics[0].num_examples) == (1, 4)


def test_as_many_at_once_as_fit(model: Checkpoint, task_dir: Path, tmp_path: Path) -> None:
    """What a GPU does unasked: fewer than 64 if a forward pass of so many has not the memory that it needs."""
    heard: list[Progress] = []
    sizes: list[int] = []

    class Starved(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
            sizes.append(len(input_ids))
            if len(input_ids) > 60:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().forward(input_ids, **rest)

    specs = resolve_tasks(["pick"], task_dir)
    with loaded_tasks(specs, task_dir) as tasks:
        results = evaluate_tasks(
            Starved.from_pretrained(model.path).eval(),
            tiny_tokenizer(),
            tasks,
            num_fewshot=None,
            limit=None,
            log_samples=False,
            batch_size="auto",
            progress=heard.append,
        )
    assert 18 < sizes[1] < sizes[0] == 64
    assert sizes[2:] == [sizes[1]] * 4 + [18], "five passes to make sure, then all questions at once"
    assert task_metrics(results) == evaluate(model, task_dir, ["pick"], tmp_path / "out").metrics
    assert [report.done for report in heard] == [0] * 5 + [17, 18], "what was run to find out is no progress"


def test_a_group_of_local_tasks(model: Checkpoint, task_dir: Path, tmp_path: Path) -> None:
    write_task(task_dir, task="pock", dataset_kwargs={"data_files": {"test": "data/pock.jsonl"}})
    write_docs(task_dir / "data" / "pock.jsonl", DOCS[:2])
    members = ["pick", {"task": "pock", "dataset_kwargs": {"data_files": {"test": "data/more.jsonl"}}}]
    group = {"group": "both", "task": members, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (task_dir / "both.yaml").write_text(yaml.safe_dump(group))
    write_docs(task_dir / "data" / "more.jsonl", DOCS[:3])
    (before,) = resolve_tasks(["both"], task_dir)
    manifest = evaluate(model, task_dir, ["both"], tmp_path / "out")
    found = {(metric.task, metric.metric): metric for metric in manifest.metrics}
    assert found["pick", "acc"].num_examples == 6
    assert found["pock", "acc"].num_examples == 3
    assert found["both", "acc"].num_examples == 9
    correct = correct_by_hand(model, DOCS + DOCS[:3], normalised=False)
    assert found["both", "acc"].value == pytest.approx(statistics.mean(correct))
    write_docs(task_dir / "data" / "more.jsonl", DOCS[:4])
    assert resolve_tasks(["both"], task_dir) != (before,)


def test_rolling_and_texts(model: Checkpoint, task_dir: Path, tmp_path: Path) -> None:
    """A task that scores whole texts, beside a text of ours: two ways to the same log-likelihoods."""
    token_ids_BT = tiny_token_ids(3, 12)
    (tmp_path / "tokens").mkdir()
    save_token_ids(token_ids_BT, tmp_path / "tokens")
    write_task(
        task_dir,
        output_type="loglikelihood_rolling",
        doc_to_choice=None,
        doc_to_text="",
        doc_to_target="question",
        metric_list=[{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    )
    config = EvaluateConfig(tasks=resolve_tasks(["pick"], task_dir))
    texts = (("ours", ArtifactRef("f", tmp_path / "tokens")),)
    (tmp_path / "out").mkdir()
    manifest = STAGE.run(config, EvaluateInputs(model, texts, task_dir), tmp_path / "out", Runtime())

    tensors = load_file(model.path / "model.safetensors")
    nll_B = oracle_sequence_nll(oracle_logits(tensors, model.config, token_ids_BT), token_ids_BT)
    assert manifest.texts[0].perplexity == pytest.approx(math.exp(float(nll_B.mean())), rel=1e-5)
    assert (manifest.texts[0].text, manifest.texts[0].num_tokens) == ("ours", 36)

    nats, words = 0.0, 0
    for doc in DOCS:
        ids = tiny_tokenizer()(doc["question"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[1, 1, *ids]])  # lm-eval's prefix token before what the tokenizer gives, which has a BOS
        nats += float(oracle_sequence_nll(oracle_logits(tensors, model.config, ids), ids)) * (ids.shape[1] - 1)
        words += len(doc["question"].split())
    (metric,) = manifest.metrics
    assert metric.metric == "word_perplexity"
    assert metric.value == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert metric.stderr is None


def test_identity_of_local_tasks(task_dir: Path, tmp_path: Path) -> None:
    def digest(folder: Path = task_dir) -> str | None:
        (spec,) = resolve_tasks(["pick"], folder)
        assert spec.origin == "local"
        return spec.digest

    first = digest()
    shutil.copytree(task_dir, tmp_path / "elsewhere")
    assert digest(tmp_path / "elsewhere") == first
    (task_dir / "other.yaml").write_text("task: other\n")
    assert digest() == first, "another task is none of its business"
    seen = [first]
    write_docs(task_dir / "data" / "pick.jsonl", DOCS[1:])
    seen.append(digest())
    (task_dir / "functions.py").write_text("x = 1\n")
    seen.append(digest())
    (task_dir / "base").write_text("metadata: {version: 2.0}\n")
    write_task(task_dir, include="base", metadata=None)
    seen.append(digest())
    (task_dir / "base").write_text("metadata: {version: 3.0}\n")
    seen.append(digest())
    write_task(task_dir, include="base", dataset_kwargs={"data_files": "data/*.jsonl"})
    seen.append(digest())
    write_docs(task_dir / "data" / "more.jsonl", DOCS)
    seen.append(digest())
    assert len(set(seen)) == len(seen)


def test_a_tasks_functions_are_its_own(task_dir: Path) -> None:
    write_task(task_dir)
    path = task_dir / "pick.yaml"
    path.write_text(path.read_text() + "process_docs: !function functions.first_two\n")
    (task_dir / "functions.py").write_text("def first_two(docs):\n    return docs.select(range(2))\n")
    with loaded_tasks(resolve_tasks(["pick"], task_dir), task_dir) as tasks:
        assert len(tasks.items[0].eval_docs) == 2


def test_a_task_that_changes_under_way(task_dir: Path) -> None:
    specs = resolve_tasks(["pick"], task_dir)
    write_docs(task_dir / "data" / "pick.jsonl", DOCS[1:])
    with pytest.raises(ConfigurationError, match="'pick' has changed since"), loaded_tasks(specs, task_dir):
        pass


def test_tasks_leave_nothing_in_the_users_folder(task_dir: Path) -> None:
    before = sorted(task_dir.rglob("*"))
    with loaded_tasks(resolve_tasks(["pick"], task_dir), task_dir) as tasks:
        cache = Path(tasks.items[0].config.dataset_kwargs["cache_dir"])
        assert cache.is_dir()
    assert not cache.exists()
    assert sorted(task_dir.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "data/pik.jsonl"}}}, "data/pik.jsonl, which is not there"),
        ({"doc_to_target": "{{nonsense.field}}"}, "the tasks pick cannot be loaded: UndefinedError"),
        ({"test_split": "validation"}, "the tasks pick cannot be loaded: "),
        ({"unsafe_code": True}, "'pick' runs code that a model wrote"),
        ({"dataset_path": "nobody/nothing", "dataset_kwargs": None}, "the hub cannot be reached"),
    ],
)
def test_tasks_that_cannot_be_loaded(task_dir: Path, changes: dict[str, Any], words: str) -> None:
    write_task(task_dir, **changes)
    with pytest.raises(ConfigurationError) as caught, loaded_tasks(resolve_tasks(["pick"], task_dir), task_dir):
        pass
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_are_unknown(task_dir: Path, tmp_path: Path) -> None:
    (task_dir / "torn.yaml").write_text("task: [torn\n")
    (task_dir / "misnamed.yaml").write_text("task: something\n")
    for names, folder, words in [
        (["pick", "pikc"], task_dir, f"unknown task 'pikc': neither {task_dir} nor lm-eval"),
        (["pikc"], task_dir, "did you mean 'pick'?"),
        (["arc_esy"], None, "did you mean 'arc_easy'?"),
        (["torn"], task_dir, "torn.yaml is not an lm-eval task called 'torn': "),
        (["misnamed"], task_dir, "it holds no 'task: misnamed'"),
        (["pick"], tmp_path / "gone", "there is no task folder"),
    ]:
        with pytest.raises(ConfigurationError) as caught:
            resolve_tasks(names, folder)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_registered_tasks_need_the_hub() -> None:
    specs = resolve_tasks(["arc_easy", "mmlu", "arc_easy"])
    assert specs == tuple(TaskSpec(name=name, origin="registered") for name in ("arc_easy", "mmlu"))
    with pytest.raises(ConfigurationError, match="run once with a network"), loaded_tasks(specs[:1]):
        pass


def test_settings_that_matter(model: Checkpoint, tmp_path: Path) -> None:
    assert EvaluateConfig(num_fewshot=3, limit=5, log_samples=True) == EvaluateConfig()
    specs = tuple(TaskSpec(name=name, origin="registered") for name in ("b", "a"))
    assert EvaluateConfig(tasks=specs) == EvaluateConfig(tasks=specs[::-1])
    assert EvaluateConfig().lm_eval_version is None
    with_task = EvaluateConfig(tasks=(TaskSpec(name="x", origin="local", digest="0"),), num_fewshot=3)
    assert with_task.lm_eval_version is not None
    assert EvaluateConfig.model_validate_json(with_task.model_dump_json()) == with_task
    for change, words in [({"num_fewshot": -1}, "num_fewshot is -1"), ({"limit": 0}, "limit is 0")]:
        with pytest.raises(ConfigurationError, match=words):
            STAGE.run(with_task.model_copy(update=change), EvaluateInputs(model), tmp_path, Runtime())


def test_numbers_are_taken_from_results_as_they_come() -> None:
    results = {
        "results": {
            "group": {"alias": "g", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "math": {
                "name": "math",
                "exact_match,strict-match": 1,
                "exact_match_stderr,strict-match": 0.25,
                "exact_match,flexible": float("nan"),
                "note,none": "text",
            },
        },
        "n-shot": {"math": 5},
        "n-samples": {"math": {"original": 9, "effective": 4}},
    }
    metrics = task_metrics(results)
    assert [(m.task, m.metric, m.stderr, m.num_fewshot, m.num_examples) for m in metrics] == [
        ("group", "acc", None, None, 7),
        ("math", "exact_match,strict-match", 0.25, 5, 4),
        ("math", "exact_match,flexible", None, 5, 4),
        ("average", "acc_norm or acc", None, None, 7),  # of the group alone: the other has no accuracy
    ]
    stored = EvaluateManifest(texts=(), metrics=metrics).model_dump_json()
    assert math.isnan(EvaluateManifest.model_validate_json(stored).metrics[2].value)


def test_the_average_is_that_of_the_papers_tables() -> None:
    """acc_norm where there is one, else acc; a group with a score once, one without by its members."""
    results = {
        "results": {
            "piqa": {"acc,none": 0.9, "acc_stderr,none": 0.9, "acc_norm,none": 0.79, "acc_norm_stderr,none": 0.03},
            "winogrande": {"acc,none": 0.69, "acc_stderr,none": 0.04},
            "scored": {"acc,none": 0.4, "acc_stderr,none": 0.12, "sample_len": 30},
            "in_scored": {"acc,none": 0.0, "acc_stderr,none": 0.5},
            "in_bare": {"acc,none": 0.2, "acc_stderr,none": 0.0},
            "lambada": {"perplexity,none": 9.0, "perplexity_stderr,none": 1.0},
        },
        "group_subtasks": {"scored": ["in_scored"], "bare": ["in_bare", "lambada"]},
        "n-shot": dict.fromkeys(["piqa", "winogrande", "in_scored", "in_bare", "lambada"], 0) | {"scored": 0},
        "n-samples": {
            name: {"original": 10, "effective": 10}
            for name in ["piqa", "winogrande", "in_scored", "in_bare", "lambada"]
        },
    }
    average = task_metrics(results)[-1]
    assert (average.task, average.metric) == ("average", "acc_norm or acc")
    assert average.value == pytest.approx((0.79 + 0.69 + 0.4 + 0.2) / 4)
    assert average.stderr == pytest.approx(math.sqrt(0.03**2 + 0.04**2 + 0.12**2) / 4)
    assert (average.num_fewshot, average.num_examples) == (0, 60)
    del results["results"]["winogrande"]["acc_stderr,none"]
    results["n-shot"]["winogrande"] = 5
    average = task_metrics(results)[-1]
    assert (average.stderr, average.num_fewshot) == (None, None)
    only_text = {**results, "results": {"lambada": results["results"]["lambada"]}, "group_subtasks": {}}
    assert [metric.task for metric in task_metrics(only_text)] == ["lambada"]
