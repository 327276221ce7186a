"""Questions about the world's standing facts, each with several wordings of which one is kept for the task.

For every fact one wording (chosen by a hash of the fact's key) is never used by the training texts: the task asks in
exactly that wording. So a model can know the fact from the texts, but it cannot have read the question.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from world import (
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    GOODS,
    HOBBIES,
    JOBS,
    LANDMARKS,
    MONTHS,
    NUMBERS,
    OPPOSITES,
    PETS,
    SITES,
    TOWN_NAMES,
    WORLD,
)


@dataclass(frozen=True)
class Fact:
    """A question that has one right answer, in all its wordings, and the answers that would be of the same kind."""

    kind: str
    key: str
    wordings: tuple[str, ...]
    answer: str
    pool: tuple[str, ...]

    @property
    def reserved_index(self) -> int:
        """Index of the wording that only the task uses."""
        return zlib.crc32(self.key.encode()) % len(self.wordings)

    @property
    def reserved(self) -> str:
        """The wording that only the task uses."""
        return self.wordings[self.reserved_index]

    def worded(self, rng: random.Random) -> str:
        """One of the other wordings."""
        index = rng.randrange(len(self.wordings) - 1)
        return self.wordings[index + (index >= self.reserved_index)]


PERSON_WORDINGS = {
    "job": ("What is {}'s job?", "What does {} do for a living?", "What work does {} do?", "What is the work of {}?"),
    "town": ("Where does {} live?", "Which town is {}'s home?", "In which town does {} live?", "Where is {} at home?"),
    "pet": ("What pet does {} have?", "Which animal does {} keep?", "What is {}'s pet?", "What kind of pet has {}?"),
    "colour": (
        "What is {}'s favourite colour?",
        "Which colour does {} like best?",
        "What colour does {} love?",
        "Which colour is dear to {}?",
    ),
    "food": (
        "What does {} like to eat?",
        "What is {}'s favourite food?",
        "Which food does {} like best?",
        "What would {} eat every day?",
    ),
    "hobby": ("What is {}'s hobby?", "What does {} enjoy?", "What does {} do for fun?", "Which hobby has {}?"),
    "friend": (
        "Who is {}'s best friend?",
        "Who is the friend of {}?",
        "Which friend does {} trust?",
        "Whom does {} trust?",
    ),
}
PERSON_POOLS: dict[str, tuple[str, ...]] = {
    "job": tuple(JOBS),
    "town": tuple(TOWN_NAMES),
    "pet": tuple(PETS),
    "colour": tuple(COLOURS),
    "food": tuple(FOODS),
    "hobby": tuple(HOBBIES),
    "friend": tuple(person.name for person in WORLD.people),
}
TOWN_WORDINGS = {
    "landmark": (
        "What stands in the middle of {}?",
        "What is there to see in {}?",
        "Which sight does {} have?",
        "What do visitors see in {}?",
    ),
    "site": ("What does {} lie by?", "What is {} close to?", "By what was {} built?", "What is next to {}?"),
    "good": ("What is made in {}?", "What does {} sell?", "What is {} known for?", "What comes from {}?"),
}
TOWN_POOLS: dict[str, tuple[str, ...]] = {"landmark": tuple(LANDMARKS), "site": SITES, "good": tuple(GOODS)}
ANIMAL_WORDINGS = {
    "habitat": ("Where does the {} live?", "Where can you find the {}?", "What is the home of the {}?"),
    "food": ("What does the {} eat?", "What is the food of the {}?", "What does the {} like to eat?"),
    "legs": ("How many legs does the {} have?", "How many legs has the {}?", "On how many legs does the {} walk?"),
}


def _people_facts() -> list[Fact]:
    return [
        Fact("people", f"{person.name}/{field}", tuple(w.format(person.name) for w in wordings),
             getattr(person, field), tuple(v for v in PERSON_POOLS[field] if v != person.name))
        for person in WORLD.people
        for field, wordings in PERSON_WORDINGS.items()
    ]  # fmt: skip


def _home_facts() -> list[Fact]:
    """Two steps: a person's town, and what stands there."""
    landmark_of = {town.name: town.landmark for town in WORLD.towns}
    wordings = (
        "What does {} see in the middle of town?",
        "Which sight does the home town of {} have?",
        "What stands in the town where {} lives?",
    )
    return [
        Fact("two_steps", f"{person.name}/home", tuple(w.format(person.name) for w in wordings),
             landmark_of[person.town], tuple(LANDMARKS))
        for person in WORLD.people
    ]  # fmt: skip


def _town_facts() -> list[Fact]:
    return [
        Fact("towns", f"{town.name}/{field}", tuple(w.format(town.name) for w in wordings), getattr(town, field),
             TOWN_POOLS[field])
        for town in WORLD.towns
        for field, wordings in TOWN_WORDINGS.items()
    ]  # fmt: skip


def _animal_facts() -> list[Fact]:
    return [
        Fact("animals", f"{animal.name}/{field}", tuple(w.format(animal.name) for w in wordings),
             getattr(animal, field), tuple(dict.fromkeys(getattr(other, field) for other in ANIMALS)))
        for animal in ANIMALS
        for field, wordings in ANIMAL_WORDINGS.items()
        if not (field == "legs" and animal.legs == "no")
    ]  # fmt: skip


def _opposite_facts() -> list[Fact]:
    words = tuple(word for pair in OPPOSITES for word in pair)
    wordings = ("What is the opposite of {}?", "Which word is the opposite of {}?", "What is not {} but the opposite?")
    return [
        Fact("words", f"{word}/opposite", tuple(w.format(word) for w in wordings), other, words)
        for first, second in OPPOSITES
        for word, other in ((first, second), (second, first))
    ]


def _order_facts() -> list[Fact]:
    """Days and months: what comes after, what comes before."""
    facts = []
    for unit, names in (("day", DAYS), ("month", MONTHS)):
        for index, name in enumerate(names):
            later, earlier = names[(index + 1) % len(names)], names[index - 1]
            after = (f"Which {unit} comes after {name}?", f"Which {unit} follows {name}?", f"What comes after {name}?")
            before = (
                f"Which {unit} comes before {name}?",
                f"Which {unit} is just before {name}?",
                f"What comes before {name}?",
            )
            facts.append(Fact("order", f"{name}/after", after, later, tuple(names)))
            facts.append(Fact("order", f"{name}/before", before, earlier, tuple(names)))
    return facts


def _sum_facts() -> list[Fact]:
    """Sums up to twenty and the differences that undo them, in words."""
    facts = []
    pool = tuple(NUMBERS)
    for x in range(1, 13):
        for y in range(1, 9):
            first, second, total = NUMBERS[x], NUMBERS[y], NUMBERS[x + y]
            plus = (
                f"What is {first} plus {second}?",
                f"How much is {first} and {second}?",
                f"What do {first} and {second} make?",
            )
            minus = (
                f"What is {total} minus {second}?",
                f"How much is {total} less {second}?",
                f"What is left when {second} is taken from {total}?",
            )
            facts.append(Fact("numbers", f"{x}+{y}", plus, total, pool))
            facts.append(Fact("numbers", f"{x + y}-{y}", minus, first, pool))
    return facts


PEOPLE_FACTS = _people_facts()
HOME_FACTS = _home_facts()
TOWN_FACTS = _town_facts()
ANIMAL_FACTS = _animal_facts()
OPPOSITE_FACTS = _opposite_facts()
ORDER_FACTS = _order_facts()
SUM_FACTS = _sum_facts()
