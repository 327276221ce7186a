"""Documents of the demo's corpus: each is one line of text about the world (`world.py`) or a scene (`scenes.py`).

`document(rng)` gives a one-line document, `instruction(rng)` an Alpaca-shaped row. Neither knows of files, splits or
seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from facts import ANIMAL_FACTS, HOME_FACTS, OPPOSITE_FACTS, ORDER_FACTS, PEOPLE_FACTS, SUM_FACTS, TOWN_FACTS, Fact
from scenes import SCENES
from world import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    DAYS,
    FRUITS,
    LETTERS,
    MONTHS,
    NUMBERS,
    OPPOSITES,
    PLACES,
    SEASONS,
    THINGS,
    WORLD,
    Person,
    a,
    listed,
    upper_first,
)

FACT_GROUPS = (
    PEOPLE_FACTS,
    PEOPLE_FACTS,
    PEOPLE_FACTS,
    PEOPLE_FACTS,
    HOME_FACTS,
    TOWN_FACTS,
    ANIMAL_FACTS,
    OPPOSITE_FACTS,
    ORDER_FACTS,
    SUM_FACTS,
)
LANDMARK_OF = {town.name: town.landmark for town in WORLD.towns}


def _said(person: Person, field: str, subject: str, rng: random.Random) -> str:
    """One sentence that states one fact about a person; `subject` is the name or the pronoun."""
    their, p = person.their, person
    forms = {
        "job": (
            f"{subject} is {a(p.job)}.",
            f"{subject} works as {a(p.job)}.",
            f"{subject} earns a living as {a(p.job)}.",
        ),
        "town": (
            f"{subject} lives in {p.town}.",
            f"{subject} has a house in {p.town}.",
            f"{subject} lives in {p.town}, the town with the {LANDMARK_OF[p.town]}.",
        ),
        "pet": (f"{subject} has {a(p.pet)}.", f"{subject} keeps {a(p.pet)}.", f"{subject} has {a(p.pet)} as a pet."),
        "colour": (
            f"{subject} likes {p.colour} best.",
            f"{subject} paints {their} door {p.colour}.",
            f"{subject} wears {p.colour}.",
        ),
        "food": (
            f"{subject} likes to eat {p.food}.",
            f"{subject} eats {p.food} every day.",
            f"{subject} would eat {p.food} at any time.",
        ),
        "hobby": (
            f"{subject} enjoys {p.hobby}.",
            f"{subject} spends the evening with {p.hobby}.",
            f"{subject} is fond of {p.hobby}.",
        ),
        "friend": (
            f"{subject} trusts {p.friend}.",
            f"{subject} has a friend called {p.friend}.",
            f"{subject} often meets {p.friend}.",
        ),
    }
    return rng.choice(forms[field])


FIELDS = ("job", "town", "pet", "colour", "food", "hobby", "friend")


def portrait(rng: random.Random) -> str:
    """Some facts about one person, in any order, then about the friend."""
    person = rng.choice(WORLD.people)
    sentences = []
    for who in (person, WORLD.person(person.friend))[: rng.choice((1, 1, 2))]:
        for index, field in enumerate(rng.sample(FIELDS, rng.randint(3, 5))):
            subject = who.name if index == 0 or rng.random() < 0.3 else upper_first(who.they)
            sentences.append(_said(who, field, subject, rng))
    return " ".join(sentences)


def introduction(rng: random.Random) -> str:
    """One person speaks."""
    p = rng.choice(WORLD.people)
    parts = [
        f"I am {a(p.job)}.", f"I live in {p.town}.", f"I have {a(p.pet)}.", f"My favourite colour is {p.colour}.",
        f"I like to eat {p.food}.", f"My hobby is {p.hobby}.", f"My best friend is {p.friend}.",
    ]  # fmt: skip
    hello = rng.choice(("Hello", "Good morning", "Good evening"))
    return f'"{hello}, my name is {p.name}. {" ".join(rng.sample(parts, rng.randint(3, 5)))}"'


def gathering(rng: random.Random) -> str:
    """Several people compared by one fact."""
    people, field = rng.sample(WORLD.people, rng.randint(3, 5)), rng.choice(FIELDS)
    return " ".join(_said(person, field, person.name, rng) for person in people)


def town_portrait(rng: random.Random) -> str:
    """One or two towns and those who live there."""
    sentences = []
    for town in rng.sample(WORLD.towns, rng.choice((1, 2))):
        facts = [
            rng.choice(
                (f"In the middle of {town.name} stands the {town.landmark}.", f"{town.name} has {a(town.landmark)}.")
            ),
            rng.choice((f"{town.name} lies by the {town.site}.", f"The {town.site} is near {town.name}.")),
            rng.choice((f"The people of {town.name} make {town.good}.", f"{town.name} sells {town.good}.")),
        ]
        at_home = [person.name for person in WORLD.people if person.town == town.name]
        facts.append(f"{listed(rng.sample(at_home, 2))} live there.")
        sentences += rng.sample(facts[:3], 3) + facts[3:]
    return " ".join(sentences)


def animal_portrait(rng: random.Random) -> str:
    """Two or three animals."""
    sentences = []
    for animal in rng.sample(ANIMALS, rng.choice((2, 3))):
        facts = [
            f"The {animal.name} lives in the {animal.habitat}.", f"The {animal.name} eats {animal.food}.",
            f"The {animal.name} has {animal.legs} legs.", f"The {animal.name} {animal.sound}.",
        ]  # fmt: skip
        sentences += rng.sample(facts, rng.choice((2, 3)))
    return " ".join(sentences)


def questions(rng: random.Random) -> str:
    """Two to five questions about standing facts with their answers."""
    facts = rng.choice(FACT_GROUPS)
    chosen = rng.sample(facts, rng.randint(2, 5))
    return " ".join(f"Question: {fact.worded(rng)} Answer: {fact.answer}." for fact in chosen)


def spoken_question(rng: random.Random) -> str:
    """A standing fact asked and answered by two speakers."""
    fact, (first, second) = rng.choice(rng.choice(FACT_GROUPS)), rng.sample(WORLD.people, 2)
    thanks = rng.choice(("Thank you", "I see", "Of course", "How nice"))
    asked = f'"{fact.worded(rng)}" asked {first.name}.'
    return f'{asked} "{upper_first(fact.answer)}," said {second.name}. "{thanks}," said {first.name}.'


def scene_text(rng: random.Random) -> str:
    """A scene with one to four of its questions, answered shortly or in whole sentences."""
    scene = rng.choice(SCENES)(rng)
    queries = rng.sample(scene.queries, min(len(scene.queries), rng.choice((1, 2, 3, 4))))
    if rng.random() < 0.75:
        return " ".join([scene.text, *(f"Question: {query.question} Answer: {query.answer}." for query in queries)])
    return " ".join([scene.text, *(f"{query.question} {query.told}" for query in queries)])


def words(rng: random.Random) -> str:
    """Opposites in a row."""
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in rng.sample(OPPOSITES, rng.randint(3, 5))]
    form = rng.choice(("The opposite of {} is {}.", "What is {0} is not {1}.", "{0} and {1} are opposites."))
    return " ".join(upper_first(form.format(*pair)) for pair in pairs)


def counting(rng: random.Random) -> str:
    """A row of numbers, days, months or letters that goes on by a rule."""
    form = rng.randrange(4)
    if form == 0:
        step, start = rng.choice((1, 2, 3, 5, 10)), rng.randint(1, 30)
        row = [str(start + step * index) for index in range(rng.randint(6, 9))]
        return f"Count by {NUMBERS[step]} from {start}: {', '.join(row)}."
    if form == 1:
        start, length = rng.randint(0, 12), rng.randint(4, 8)
        row = NUMBERS[start : start + length]
        if rng.random() < 0.4:
            return f"Count back from {row[-1]} to {row[0]}: {', '.join(row[::-1])}."
        return f"Count from {row[0]} to {row[-1]}: {', '.join(row)}."
    names = rng.choice((DAYS, MONTHS, SEASONS, LETTERS))
    start = rng.randrange(len(names))
    row = [names[(start + index) % len(names)] for index in range(rng.randint(3, 7))]
    return f"In order: {', '.join(row)}. Backwards: {', '.join(row[::-1])}."


def sums(rng: random.Random) -> str:
    """Some sums and differences."""
    parts = []
    for _ in range(rng.randint(3, 5)):
        x, y = rng.randint(1, 12), rng.randint(1, 8)
        if rng.random() < 0.6:
            parts.append(f"{NUMBERS[x]} plus {NUMBERS[y]} is {NUMBERS[x + y]}.")
        else:
            parts.append(f"{NUMBERS[x + y]} minus {NUMBERS[y]} is {NUMBERS[x]}.")
    return " ".join(upper_first(part) for part in parts)


def lists(rng: random.Random) -> str:
    """A list of words repeated, turned round, or shortened."""
    row = rng.sample(rng.choice((THINGS, PLACES, COLOURS)), rng.randint(3, 7))
    order, told = rng.choice(
        (
            ("Say it again", row),
            ("Say it again", row),
            ("Now backwards", row[::-1]),
            ("Without the first", row[1:]),
            ("Without the last", row[:-1]),
        )
    )
    return f"Take these words: {', '.join(row)}. {order}: {', '.join(told)}."


def week(rng: random.Random) -> str:
    """What someone does on some days, and one of them asked again."""
    person = rng.choice(WORLD.people)
    acts = rng.sample(("bakes bread", "cleans the house", "goes to the market", "visits a friend", "reads a book",
                       "works in the garden", "sleeps late", "writes letters", "walks by the river"), 3)  # fmt: skip
    days = sorted(rng.sample(range(7), 3))
    told = " ".join(
        f"On {DAYS[d]} {person.name if i == 0 else person.they} {act}."
        for i, (d, act) in enumerate(zip(days, acts, strict=True))
    )
    pick = rng.randrange(3)
    return f"{told} So when does {person.name} {_bare(acts[pick])}? On {DAYS[days[pick]]}."


def _bare(act: str) -> str:
    """'goes to the market' -> 'go to the market'."""
    verb, rest = act.split(" ", 1)
    return f"{'go' if verb == 'goes' else verb.removesuffix('s')} {rest}"


def story(rng: random.Random) -> str:
    """A short story: something is lost, looked for with a friend, and found."""
    hero = rng.choice(WORLD.people)
    friend = WORLD.person(hero.friend)
    thing, adjective = rng.choice(THINGS), rng.choice(ADJECTIVES)
    first, second = rng.sample(PLACES, 2)
    opening = rng.choice(
        (f"One {rng.choice(SEASONS)} day", f"On a {rng.choice(DAYS)}", "Long ago", f"Last {rng.choice(MONTHS)}")
    )
    they, their = hero.they, hero.their
    beginning = f"{opening}, {hero.name} the {hero.job} of {hero.town} lost {a(adjective + ' ' + thing)}."
    looking = f"{upper_first(they)} looked in the {first}, but the {thing} was not there."
    asking = rng.choice((
        f"So {they} asked {their} friend {friend.name}, who lives in {friend.town}.",
        f'"{friend.name}, have you seen my {thing}?" asked {hero.name}.',
        f"{upper_first(their)} {hero.pet} ran to the house of {friend.name}.",
    ))  # fmt: skip
    finding = rng.choice((
        f"Together they found the {adjective} {thing} in the {second}.",
        f"{friend.name} found the {thing} in the {second} and gave it to {hero.name}.",
        f"At last the {hero.pet} found it in the {second}.",
    ))  # fmt: skip
    ending = rng.choice((
        f"They were happy and ate {hero.food}.",
        f"{hero.name} thanked {friend.name} and they ate {friend.food}.",
        f"Since then {hero.name} keeps the {thing} in the {first}.",
        f"That evening {hero.name} went back to {their} {hero.hobby}.",
    ))  # fmt: skip
    return " ".join((beginning, looking, asking, finding, ending))


def trade(rng: random.Random) -> str:
    """Two people swap things; who has which is said again."""
    first, second = rng.sample(WORLD.people, 2)
    mine, yours = rng.sample(THINGS, 2)
    town = rng.choice(WORLD.towns)
    swap = rng.choice(("They made a trade.", "They swapped."))
    return (
        f"{first.name} and {second.name} met at the {town.landmark} of {town.name}. {first.name} had {a(mine)} and "
        f"{second.name} had {a(yours)}. {swap} Now {first.name} has the {yours} and "
        f"{second.name} has the {mine}."
    )


def shopping(rng: random.Random) -> str:
    """Somebody buys some numbers of goods and the total is told."""
    person = rng.choice(WORLD.people)
    goods = rng.sample(FRUITS, 2)
    x, y = rng.randint(1, 10), rng.randint(1, 10)
    return (
        f"{person.name} bought {NUMBERS[x]} {goods[0]} and {NUMBERS[y]} {goods[1]}. "
        f"There were {NUMBERS[x]} {goods[0]}. There were {NUMBERS[y]} {goods[1]}. Together that makes {NUMBERS[x + y]}."
    )


KINDS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (portrait, 12),
    (introduction, 5),
    (gathering, 7),
    (town_portrait, 5),
    (animal_portrait, 4),
    (questions, 16),
    (spoken_question, 5),
    (scene_text, 30),
    (words, 3),
    (counting, 4),
    (sums, 5),
    (lists, 6),
    (week, 3),
    (story, 8),
    (trade, 3),
    (shopping, 2),
)
_BUILDERS = [builder for builder, _ in KINDS]
_WEIGHTS = [weight for _, weight in KINDS]


def document(rng: random.Random) -> str:
    """One document: a single line of 50 to 500 characters."""
    text = rng.choices(_BUILDERS, _WEIGHTS)[0](rng)
    while len(text) < 50:
        text = f"{text} {rng.choices(_BUILDERS, _WEIGHTS)[0](rng)}"
    return text


def _fact_task(rng: random.Random) -> tuple[str, str, str]:
    fact: Fact = rng.choice(rng.choice(FACT_GROUPS))
    return fact.worded(rng), "", f"{upper_first(fact.answer)}."


def _scene_task(rng: random.Random) -> tuple[str, str, str]:
    scene = rng.choice(SCENES)(rng)
    query = rng.choice(scene.queries)
    return f"Read the text and answer. {query.question}", scene.text, query.told


def _portrait_task(rng: random.Random) -> tuple[str, str, str]:
    person = rng.choice(WORLD.people)
    said = [
        _said(person, field, person.name if i == 0 else upper_first(person.they), rng)
        for i, field in enumerate(rng.sample(FIELDS, 3))
    ]
    return f"Tell me something about {person.name}.", "", " ".join(said)


def _list_task(rng: random.Random) -> tuple[str, str, str]:
    row = rng.sample(THINGS, rng.randint(3, 5))
    order, answer = rng.choice(
        (
            ("Repeat these words.", row),
            ("Say these words backwards.", row[::-1]),
            ("Name the first of these words.", row[:1]),
        )
    )
    return order, f"{', '.join(row)}", upper_first(", ".join(answer)) + "."


def _story_task(rng: random.Random) -> tuple[str, str, str]:
    return f"Tell a short story{rng.choice((' about something lost', '', ' with a happy end'))}.", "", story(rng)


TASKS: tuple[Callable[[random.Random], tuple[str, str, str]], ...] = (
    _fact_task, _scene_task, _scene_task, _portrait_task, _list_task, _story_task,
)  # fmt: skip


def instruction(rng: random.Random) -> dict[str, str]:
    """One Alpaca-shaped row: instruction, input (may be empty), output, and the three laid out as one text."""
    order, given, output = rng.choice(TASKS)(rng)
    material = f"\n\n### Input:\n{given}" if given else ""
    opening = "Here is a task. Write an answer that does what it asks."
    text = f"{opening}\n\n### Task:\n{order}{material}\n\n### Answer:\n{output}"
    return {"instruction": order, "input": given, "output": output, "text": text}
