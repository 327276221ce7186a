"""The multiple-choice task `demo_facts`: questions with one right answer among four.

Half asks for standing facts, in the wordings that no training text uses; half asks about scenes that are drawn here
and that the training texts must leave out (`train_model.py` drops them).
"""

from __future__ import annotations

import random
from typing import TypedDict

from facts import ANIMAL_FACTS, HOME_FACTS, OPPOSITE_FACTS, ORDER_FACTS, PEOPLE_FACTS, SUM_FACTS, TOWN_FACTS, Fact
from scenes import SCENES

FACT_COUNTS: tuple[tuple[list[Fact], int], ...] = (
    (PEOPLE_FACTS, 48),
    (HOME_FACTS, 12),
    (TOWN_FACTS, 12),
    (ANIMAL_FACTS, 12),
    (OPPOSITE_FACTS, 12),
    (ORDER_FACTS, 8),
    (SUM_FACTS, 16),
)
SCENES_EACH = 14


class Question(TypedDict):
    """One row of `demo_facts.jsonl`; `answer` is the index of the right choice."""

    id: int
    kind: str
    prompt: str
    choices: list[str]
    answer: int


def _laid_out(rng: random.Random, kind: str, prompt: str, answer: str, wrong: tuple[str, ...]) -> Question:
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return Question(id=0, kind=kind, prompt=f"{prompt} Answer:", choices=[f"{choice}." for choice in choices],
                    answer=choices.index(answer))  # fmt: skip


def _about_fact(rng: random.Random, fact: Fact) -> Question:
    others = [value for value in fact.pool if value != fact.answer]
    wrong = tuple(rng.sample(others, 3))
    return _laid_out(rng, fact.kind, f"Question: {fact.reserved}", fact.answer, wrong)


def draw_questions(rng: random.Random) -> list[Question]:
    """All questions of the task, in mixed order and numbered from 0."""
    questions = [_about_fact(rng, fact) for facts, count in FACT_COUNTS for fact in rng.sample(facts, count)]
    for build in SCENES:
        for _ in range(SCENES_EACH):
            scene = build(rng)
            query = rng.choice(scene.queries)
            wrong = tuple(rng.sample(query.wrong, 3))
            prompt = f"{scene.text} Question: {query.question}"
            questions.append(_laid_out(rng, scene.kind, prompt, query.answer, wrong))
    rng.shuffle(questions)
    for index, question in enumerate(questions):
        question["id"] = index
    return questions
