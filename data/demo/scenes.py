"""Scenes: a few made-up sentences, and questions that can only be answered from them (recall in the context).

A scene is drawn anew each time; nothing in it is a standing fact. Documents and the task share these builders.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from world import COLOURS, CONTAINERS, FRUITS, NUMBERS, PLACES, THINGS, WORLD, Person, upper_first

NAMES = tuple(person.name for person in WORLD.people)
DEGREES = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
)


@dataclass(frozen=True)
class Query:
    """A question about a scene, its answer, and wrong answers of the same kind."""

    question: str
    answer: str
    wrong: tuple[str, ...]
    """At least three; those that the scene itself names come first."""
    told: str
    """The answer as a whole sentence."""


@dataclass(frozen=True)
class Scene:
    """Some sentences and all the questions about them."""

    kind: str
    text: str
    queries: tuple[Query, ...]


def _people(rng: random.Random, count: int) -> list[Person]:
    return rng.sample(WORLD.people, count)


def _wrong(
    rng: random.Random, used: Sequence[str], pool: Sequence[str], answer: str, form: str = "{}"
) -> tuple[str, ...]:
    """Wrong answers to choose three from: those used in the scene, and if these are few, others of the pool."""
    wrong = [value for value in dict.fromkeys(used) if value != answer]
    if len(wrong) < 3:
        wrong += rng.sample([value for value in pool if value not in used and value != answer], 3 - len(wrong))
    return tuple(form.format(value) for value in wrong)


def put_away(rng: random.Random) -> Scene:
    """Three or four people each put one thing in one place."""
    count = rng.choice((3, 3, 4))
    who, things, places = _people(rng, count), rng.sample(THINGS, count), rng.sample(PLACES, count)
    verb = rng.choice(("put", "left", "hid", "placed"))
    rows = list(zip(who, things, places, strict=True))
    queries = []
    for person, thing, place in rows:
        name = person.name
        inside = _wrong(rng, places, PLACES, place, "in the {}")
        towards = _wrong(rng, places, PLACES, place, "to the {}")
        what = _wrong(rng, things, THINGS, thing, "the {}")
        queries += [
            Query(f"Where is the {thing}?", f"in the {place}", inside, f"The {thing} is in the {place}."),
            Query(f"Where did {name} go?", f"to the {place}", towards, f"{name} went to the {place}."),
            Query(f"What is in the {place}?", f"the {thing}", what, f"The {thing} is in the {place}."),
        ]
    return Scene("places", " ".join(f"{p.name} {verb} the {t} in the {w}." for p, t, w in rows), tuple(queries))


def owners(rng: random.Random) -> Scene:
    """Who has what."""
    count = rng.choice((3, 4))
    names, things = rng.sample(NAMES, count), rng.sample(THINGS, count)
    verb = rng.choice(("has", "found", "bought", "wants"))
    queries = tuple(
        Query(f"Who {verb} the {thing}?", name, _wrong(rng, names, NAMES, name), f"{name} {verb} the {thing}.")
        for name, thing in zip(names, things, strict=True)
    )
    return Scene("owners", " ".join(f"{n} {verb} the {t}." for n, t in zip(names, things, strict=True)), queries)


def carried(rng: random.Random) -> Scene:
    """One thing is carried from place to place; a second thing stays where it is."""
    first, second = _people(rng, 2)
    thing, still = rng.sample(THINGS, 2)
    *stops, home = rng.sample(PLACES, rng.choice((3, 4)))
    moves = [f"{first.name} took the {thing} to the {stops[0]}."]
    for stop in stops[1:]:
        moves.append(f"{rng.choice(('Then', 'Later', 'After that'))} {first.they} took the {thing} to the {stop}.")
    moves.insert(rng.randrange(len(moves) + 1), f"{second.name} left the {still} in the {home}.")
    queries = tuple(
        Query(
            f"Where is the {what} now?",
            f"in the {place}",
            _wrong(rng, [*stops, home], PLACES, place, "in the {}"),
            f"The {what} is in the {place} now.",
        )
        for what, place in ((thing, stops[-1]), (still, home))
    )
    return Scene("moves", " ".join(moves), queries)


def handed_on(rng: random.Random) -> Scene:
    """A thing is handed from one to the next."""
    names = rng.sample(NAMES, rng.choice((3, 4)))
    thing = rng.choice(THINGS)
    gifts = " ".join(f"{giver} gave the {thing} to {taker}." for giver, taker in pairwise(names))
    last, first = names[-1], names[0]
    queries = (
        Query(f"Who has the {thing} now?", last, _wrong(rng, names, NAMES, last), f"{last} has the {thing} now."),
        Query(f"Who had the {thing} first?", first, _wrong(rng, names, NAMES, first), f"{first} had it first."),
    )
    return Scene("moves", f"{first} had the {thing}. {gifts}", queries)


def compared(rng: random.Random) -> Scene:
    """Three people in an order that two sentences give."""
    more, most, least = rng.choice(DEGREES)
    names = rng.sample(NAMES, 3)
    links = [f"{first} is {more} than {second}." for first, second in pairwise(names)]
    if rng.random() < 0.3:
        links.reverse()
    queries = tuple(
        Query(f"Who is the {word}?", name, _wrong(rng, names, NAMES, name), f"{name} is the {word}.")
        for name, word in ((names[0], most), (names[2], least))
    )
    return Scene("compared", " ".join(links), queries)


def coloured(rng: random.Random) -> Scene:
    """Things in containers of some colour."""
    things, boxes, colours = rng.sample(THINGS, 3), rng.sample(CONTAINERS, 3), rng.sample(COLOURS, 3)
    rows = list(zip(things, colours, boxes, strict=True))
    queries = []
    for thing, colour, box in rows:
        shade, what = _wrong(rng, colours, COLOURS, colour), _wrong(rng, things, THINGS, thing, "the {}")
        where = _wrong(rng, boxes, CONTAINERS, box, "in the {}")
        queries += [
            Query(f"What colour is the {box}?", colour, shade, f"The {box} is {colour}."),
            Query(f"What is in the {box}?", f"the {thing}", what, f"The {thing} is in the {box}."),
            Query(f"Where is the {thing}?", f"in the {box}", where, f"The {thing} is in the {box}."),
        ]
    return Scene("colours", " ".join(f"The {t} is in the {c} {b}." for t, c, b in rows), tuple(queries))


def counted(rng: random.Random) -> Scene:
    """Someone has some, gets or gives some, and has how many then?"""
    person, other = _people(rng, 2)
    goods = rng.choice(FRUITS)
    have = rng.randint(2, 12)
    more = rng.randint(1, 8) if rng.random() < 0.6 else -rng.randint(1, have - 1)
    count = have + more
    change = f"{upper_first(person.they)} gave {NUMBERS[-more]} of them to {other.name}."
    if more > 0:
        change = f"{other.name} gave {person.them} {NUMBERS[more]} more."
    near = [n for n in dict.fromkeys((have, abs(more), count - 1, count + 1, count + 2, count + 3)) if 0 < n <= 20]
    wrong = tuple(NUMBERS[n] for n in near if n != count)
    told = f"{person.name} has {NUMBERS[count]} {goods} now."
    query = Query(f"How many {goods} does {person.name} have now?", NUMBERS[count], wrong, told)
    return Scene("counted", f"{person.name} had {NUMBERS[have]} {goods}. {change}", (query,))


def codes(rng: random.Random) -> Scene:
    """Numbers written beside coloured things."""
    thing = rng.choice(("door", "gate", "room", "house", "ticket", "boat"))
    colours = rng.sample(COLOURS, rng.choice((3, 4)))
    pool = [str(number) for number in rng.sample(range(10, 100), len(colours) + 3)]
    numbers = pool[: len(colours)]
    rows = list(zip(colours, numbers, strict=True))
    queries = tuple(
        Query(
            f"Which number has the {colour} {thing}?",
            number,
            _wrong(rng, numbers, pool, number),
            f"The number of the {colour} {thing} is {number}.",
        )
        for colour, number in rows
    )
    return Scene("codes", " ".join(f"The {c} {thing} has number {n}." for c, n in rows), queries)


def in_line(rng: random.Random) -> Scene:
    """A list of words, and which of them is first, last, or after another."""
    words = rng.sample(THINGS, rng.choice((4, 5)))
    asked = [("Which word is first?", words[0]), ("Which word is last?", words[-1])]
    for before, after in pairwise(words):
        asked += [(f"Which word comes after {before}?", after), (f"Which word comes before {after}?", before)]
    queries = tuple(
        Query(question, word, _wrong(rng, words, THINGS, word), f"It is {word}.") for question, word in asked
    )
    return Scene("lists", f"The list is: {', '.join(words)}.", queries)


SCENES: tuple[Callable[[random.Random], Scene], ...] = (
    put_away,
    owners,
    carried,
    handed_on,
    compared,
    coloured,
    counted,
    codes,
    in_line,
)
