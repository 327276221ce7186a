"""Scenes: a few made-up sentences and a question that can only be answered from them (recall in the context).

A scene is drawn anew each time; nothing in it is a standing fact. Documents and the task share these builders.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world import (
    COLOURS,
    CONTAINERS,
    FRUITS,
    NUMBERS,
    PLACES,
    THINGS,
    WORLD,
    Person,
    listed,
    upper_first,
)


@dataclass(frozen=True)
class Scene:
    """Sentences, a question about them, its answer, and wrong answers of the same kind (at least three)."""

    kind: str
    text: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    told: str
    """The answer as a whole sentence."""


def _people(rng: random.Random, count: int) -> list[Person]:
    return rng.sample(WORLD.people, count)


def _others(rng: random.Random, used: list[str], pool: list[str], answer: str, count: int = 3) -> tuple[str, ...]:
    """Wrong answers: those that the scene names first, then others of the pool."""
    wrong = [value for value in dict.fromkeys(used) if value != answer]
    rest = [value for value in pool if value not in used]
    return tuple((wrong + rng.sample(rest, max(0, count - len(wrong))))[:count])


def put_away(rng: random.Random) -> Scene:
    """Three or four people each put one thing in one place."""
    count = rng.choice((3, 3, 4))
    who, things, places = _people(rng, count), rng.sample(THINGS, count), rng.sample(PLACES, count)
    verb = rng.choice(("put", "left", "hid", "placed"))
    text = " ".join(f"{p.name} {verb} the {t} in the {w}." for p, t, w in zip(who, things, places, strict=True))
    asked = rng.randrange(count)
    question = rng.choice((f"Where is the {things[asked]}?", f"Where did {who[asked].name} go?"))
    told = f"The {things[asked]} is in the {places[asked]}." if "is" in question.split() else (
        f"{who[asked].name} went to the {places[asked]}.")  # fmt: skip
    answer = f"in the {places[asked]}"
    if question.startswith("Where did"):
        answer = f"to the {places[asked]}"
        return Scene("places", text, question, answer, tuple(f"to the {p}" for p in _others(rng, places, PLACES, places[asked])), told)
    return Scene("places", text, question, answer, tuple(f"in the {p}" for p in _others(rng, places, PLACES, places[asked])), told)


def owners(rng: random.Random) -> Scene:
    """Who has what."""
    count = rng.choice((3, 4))
    who, things = _people(rng, count), rng.sample(THINGS, count)
    verb = rng.choice(("has", "found", "bought", "wants"))
    text = " ".join(f"{p.name} {verb} the {t}." for p, t in zip(who, things, strict=True))
    asked = rng.randrange(count)
    names = [p.name for p in who]
    question = f"Who {verb} the {things[asked]}?"
    wrong = _others(rng, names, [p.name for p in WORLD.people], names[asked])
    return Scene("owners", text, question, names[asked], wrong, f"{names[asked]} {verb} the {things[asked]}.")


def carried(rng: random.Random) -> Scene:
    """One thing is carried from place to place; a second thing stays where it is."""
    first, second = _people(rng, 2)
    thing, still = rng.sample(THINGS, 2)
    stops = rng.sample(PLACES, rng.choice((2, 3)))
    home = rng.choice([place for place in PLACES if place not in stops])
    moves = [f"{first.name} took the {thing} to the {stops[0]}."]
    moves += [rng.choice(("Then", "Later", "After that")) + f" {first.they} took the {thing} to the {s}." for s in stops[1:]]
    moves.insert(rng.randrange(len(moves) + 1), f"{second.name} left the {still} in the {home}.")
    asked, place = (thing, stops[-1]) if rng.random() < 0.75 else (still, home)
    wrong = tuple(f"in the {p}" for p in _others(rng, [*stops, home], PLACES, place))
    told = f"The {asked} is in the {place} now."
    text = " ".join(upper_first(m) if i or m[0].isupper() else m for i, m in enumerate(moves))
    return Scene("moves", text, f"Where is the {asked} now?", f"in the {place}", wrong, told)


def handed_on(rng: random.Random) -> Scene:
    """A thing is handed from one to the next."""
    who = _people(rng, rng.choice((3, 4)))
    thing = rng.choice(THINGS)
    text = f"{who[0].name} had the {thing}. " + " ".join(
        f"{x.name} gave the {thing} to {y.name}." for x, y in zip(who, who[1:], strict=False)
    )
    names = [p.name for p in who]
    wrong = _others(rng, names[::-1], [p.name for p in WORLD.people], names[-1])
    return Scene("moves", text, f"Who has the {thing} now?", names[-1], wrong, f"{names[-1]} has the {thing} now.")


def compared(rng: random.Random) -> Scene:
    """Three people in an order that two sentences give."""
    more, most, least = rng.choice(
        (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"), ("stronger", "strongest", "weakest"))
    )
    who = _people(rng, 3)
    links = [f"{who[0].name} is {more} than {who[1].name}.", f"{who[1].name} is {more} than {who[2].name}."]
    if rng.random() < 0.3:
        links.reverse()
    top = rng.random() < 0.5
    asked, word = (who[0], most) if top else (who[2], least)
    names = [p.name for p in who]
    wrong = _others(rng, names, [p.name for p in WORLD.people], asked.name)
    return Scene("compared", " ".join(links), f"Who is the {word}?", asked.name, wrong, f"{asked.name} is the {word}.")


def coloured(rng: random.Random) -> Scene:
    """Things in containers of some colour."""
    count = 3
    things, boxes, colours = rng.sample(THINGS, count), rng.sample(CONTAINERS, count), rng.sample(COLOURS, count)
    text = " ".join(f"The {t} is in the {c} {b}." for t, c, b in zip(things, colours, boxes, strict=True))
    asked = rng.randrange(count)
    thing, box, colour = things[asked], boxes[asked], colours[asked]
    form = rng.randrange(3)
    if form == 0:
        wrong = _others(rng, colours, COLOURS, colour)
        return Scene("colours", text, f"What colour is the {box}?", colour, wrong, f"The {box} is {colour}.")
    if form == 1:
        wrong = _others(rng, things, THINGS, thing)
        return Scene("colours", text, f"What is in the {box}?", f"the {thing}", tuple(f"the {w}" for w in wrong),
                     f"The {thing} is in the {box}.")  # fmt: skip
    wrong = _others(rng, boxes, CONTAINERS, box)
    return Scene("colours", text, f"Where is the {thing}?", f"in the {colour} {box}",
                 tuple(f"in the {colours[boxes.index(w)] if w in boxes else rng.choice(COLOURS)} {w}" for w in wrong),
                 f"The {thing} is in the {colour} {box}.")  # fmt: skip


def counted(rng: random.Random) -> Scene:
    """Someone has some, gets or gives some, and has how many then?"""
    person, other = _people(rng, 2)
    goods = rng.choice(FRUITS)
    have = rng.randint(2, 12)
    more = rng.randint(1, 8) if rng.random() < 0.6 else -rng.randint(1, have - 1)
    count = have + more
    change = f"{other.name} gave {person.them} {NUMBERS[more]} more." if more > 0 else (
        f"{upper_first(person.they)} gave {NUMBERS[-more]} of them to {other.name}.")  # fmt: skip
    text = f"{person.name} had {NUMBERS[have]} {goods}. {change}"
    near = [n for n in dict.fromkeys((have, abs(more), count - 1, count + 1, count + 2, count + 3)) if 0 < n <= 20]
    wrong = tuple(NUMBERS[n] for n in rng.sample([n for n in near if n != count], 3))
    question = f"How many {goods} does {person.name} have now?"
    return Scene("counted", text, question, NUMBERS[count], wrong, f"{person.name} has {NUMBERS[count]} {goods} now.")


def codes(rng: random.Random) -> Scene:
    """Numbers written beside coloured things."""
    thing = rng.choice(("door", "gate", "room", "house", "ticket", "boat"))
    colours = rng.sample(COLOURS, rng.choice((3, 4)))
    numbers = [str(n) for n in rng.sample(range(10, 100), len(colours) + 3)]
    text = " ".join(f"The {c} {thing} has number {n}." for c, n in zip(colours, numbers, strict=False))
    asked = rng.randrange(len(colours))
    wrong = _others(rng, numbers[: len(colours)], numbers, numbers[asked])
    told = f"The number of the {colours[asked]} {thing} is {numbers[asked]}."
    return Scene("codes", text, f"Which number has the {colours[asked]} {thing}?", numbers[asked], wrong, told)


def in_line(rng: random.Random) -> Scene:
    """A list of words, and which of them is first, last, or after another."""
    words = rng.sample(THINGS, rng.choice((4, 5)))
    text = f"The list is: {', '.join(words)}."
    form = rng.randrange(4)
    index = rng.randrange(len(words) - 1)
    question, answer = (
        ("Which word is first?", words[0]),
        ("Which word is last?", words[-1]),
        (f"Which word comes after {words[index]}?", words[index + 1]),
        (f"Which word comes before {words[index + 1]}?", words[index]),
    )[form]
    return Scene("lists", text, question, answer, _others(rng, rng.sample(words, len(words)), THINGS, answer), f"It is {answer}.")


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
__all__ = ["SCENES", "Scene", "listed"]
