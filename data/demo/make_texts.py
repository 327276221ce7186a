"""Write the demo's texts: a sample corpus, Alpaca-shaped rows, a held-out text and a multiple-choice task.

    python data/demo/make_texts.py [--out FOLDER]

Everything follows from the seeds below: the same call writes the same bytes. No line of the held-out text and no
question of the task occurs in the other files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from documents import document, instruction
from questions import Question, draw_questions

HERE = Path(__file__).resolve().parent
TRAIN_SEED, CALIBRATION_SEED, EVALUATION_SEED, TASK_SEED = 1, 2, 3, 4
TRAIN_CHARS, EVALUATION_CHARS = 300_000, 40_000
CALIBRATION_ROWS = 400
TASK_NAME = "demo_facts"
TASK_YAML = """\
# Multiple choice about the demo's small world: standing facts, and what was said in the prompt.
# The data file lies beside this one.
task: demo_facts
dataset_path: json
dataset_kwargs:
  data_files:
    test: demo_facts.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


class Holdout:
    """What training texts must not contain: the held-out lines and the prompts of the task."""

    def __init__(self) -> None:
        self.questions = draw_questions(random.Random(TASK_SEED))
        self.lines = list(_distinct(random.Random(EVALUATION_SEED), EVALUATION_CHARS))
        self._lines = frozenset(self.lines)
        self._prompts = tuple(question["prompt"].split(" Question:")[0].strip() for question in self.questions)

    def allows(self, text: str) -> bool:
        """Whether none of the held-out lines is this text and no prompt of the task stands in it."""
        return text not in self._lines and not any(prompt in text for prompt in self._prompts)


def _distinct(rng: random.Random, num_chars: int) -> Iterator[str]:
    """Different documents until `num_chars` characters are reached."""
    seen: set[str] = set()
    written = 0
    while written < num_chars:
        text = document(rng)
        if text not in seen:
            seen.add(text)
            written += len(text) + 1
            yield text


def sample_corpus(holdout: Holdout) -> list[str]:
    """The lines of `train.txt`: a sample of what the model is trained on."""
    return [text for text in _distinct(random.Random(TRAIN_SEED), TRAIN_CHARS) if holdout.allows(text)]


def calibration_rows(holdout: Holdout) -> list[dict[str, str]]:
    """The rows of `calibration.jsonl`."""
    rng = random.Random(CALIBRATION_SEED)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < CALIBRATION_ROWS:
        row = instruction(rng)
        if holdout.allows(row["text"]):
            rows.setdefault(row["text"], row)
    return list(rows.values())


def _write_jsonl(path: Path, rows: list[dict[str, str]] | list[Question]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_all(out: Path) -> None:
    """Write the four texts and the task under `out`."""
    holdout = Holdout()
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    (out / "train.txt").write_text("\n".join(sample_corpus(holdout)) + "\n", encoding="utf-8")
    (out / "evaluation.txt").write_text("\n".join(holdout.lines) + "\n", encoding="utf-8")
    _write_jsonl(out / "calibration.jsonl", calibration_rows(holdout))
    _write_jsonl(out / "tasks" / f"{TASK_NAME}.jsonl", holdout.questions)
    (out / "tasks" / f"{TASK_NAME}.yaml").write_text(TASK_YAML, encoding="utf-8")


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description="Write the demo's texts.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: the script's own)")
    out: Path = parser.parse_args().out
    write_all(out)
    for path in sorted(out.glob("*.txt")) + sorted(out.glob("*.jsonl")) + sorted((out / "tasks").iterdir()):
        print(f"{path.stat().st_size:>8,} bytes  {path.relative_to(out)}")


if __name__ == "__main__":
    main()
