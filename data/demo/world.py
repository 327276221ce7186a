"""The small invented world that all of the demo's texts talk about: people, towns, animals, things and words.

The world is fixed (it depends on `WORLD_SEED` alone), so that every text states the same facts and a model can learn
them. It does not know how a fact is put into a sentence (`documents.py`), nor what is asked in the task
(`questions.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WORLD_SEED = 20261123

WOMEN = "Ada Bea Clara Dora Elsa Greta Hanna Julia Lena Mira Nora Olga Pia Sara Tilda Vera".split()
MEN = "Abel Boris Carl David Emil Felix Hugo Ivan Jonas Karl Leo Milo Otto Pavel Simon Theo".split()
JOBS = (
    "baker farmer teacher doctor sailor tailor painter singer miller weaver carpenter gardener fisher potter clerk "
    "pilot cook nurse smith judge"
).split()
PETS = "dog cat parrot rabbit goat pony turtle hen mouse lizard".split()
COLOURS = "red blue green yellow white black brown grey orange purple".split()
FOODS = "soup bread rice cheese honey cake fish beans plums noodles pie eggs".split()
HOBBIES = "chess dancing reading swimming knitting climbing rowing cycling drawing running skating singing".split()
TOWN_NAMES = (
    "Alderford Brinmouth Casterley Dunholt Elmwick Farrow Glenmoor Harwell Ironby Kestrel Lunden Marlow".split()
)
LANDMARKS = "tower bridge castle lighthouse windmill fountain library market harbour garden clock statue".split()
SITES = ("river", "sea", "forest", "lake", "desert", "mountain")
GOODS = "glass salt wool paper silk copper wine tea boats clocks carpets bells".split()

PLACES = "kitchen barn cellar garden attic garage cabin hall shed tent school tower boat shop".split()
CONTAINERS = "box bag basket drawer jar chest bucket cupboard".split()
THINGS = (
    "key lamp drum ball book coin cup hat rope map ring spoon knife letter mirror blanket hammer candle bottle brush "
    "comb kite whistle shoe"
).split()
FRUITS = "apples pears lemons nuts grapes cherries stones shells buttons cards".split()
ADJECTIVES = "old small bright heavy broken lovely strange plain tiny golden".split()

OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in (
        "hot/cold big/small up/down day/night fast/slow hard/soft wet/dry full/empty open/closed early/late light/dark "
        "happy/sad young/old rich/poor loud/quiet high/low long/short clean/dirty left/right first/last strong/weak "
        "sweet/bitter near/far thick/thin"
    ).split()
)
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = "spring summer autumn winter".split()
LETTERS = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z".split()


@dataclass(frozen=True)
class Person:
    """One inhabitant with the facts that hold about them everywhere."""

    name: str
    female: bool
    job: str
    town: str
    pet: str
    colour: str
    food: str
    hobby: str
    friend: str

    @property
    def they(self) -> str:
        """Subject pronoun."""
        return "she" if self.female else "he"

    @property
    def their(self) -> str:
        """Possessive pronoun."""
        return "her" if self.female else "his"

    @property
    def them(self) -> str:
        """Object pronoun."""
        return "her" if self.female else "him"


@dataclass(frozen=True)
class Town:
    """One town with its landmark, what it lies by, and what it makes."""

    name: str
    landmark: str
    site: str
    good: str


@dataclass(frozen=True)
class Animal:
    """One kind of animal: where it lives, what it eats, the sound it makes and how many legs it has."""

    name: str
    habitat: str
    food: str
    sound: str
    legs: str


ANIMALS = tuple(
    Animal(*row.split())
    for row in (
        "owl forest mice hoots two",
        "bear forest berries growls four",
        "wolf mountain meat howls four",
        "duck lake weeds quacks two",
        "frog pond flies croaks four",
        "horse meadow hay neighs four",
        "sheep hill grass bleats four",
        "lion desert meat roars four",
        "bee garden nectar buzzes six",
        "cow meadow grass moos four",
        "crow field seeds caws two",
        "pig farm roots grunts four",
        "snake desert mice hisses no",
        "seal sea fish barks no",
        "gull harbour fish cries two",
        "cricket field leaves chirps six",
    )
)


@dataclass(frozen=True)
class World:
    """All that is fixed: the people and the towns."""

    people: tuple[Person, ...]
    towns: tuple[Town, ...]

    def person(self, name: str) -> Person:
        """The person of that name; KeyError when nobody is called so."""
        return {person.name: person for person in self.people}[name]


def _dealt(rng: random.Random, values: list[str] | tuple[str, ...], count: int) -> list[str]:
    """`count` values in random order, each used about equally often."""
    deck = [values[index % len(values)] for index in range(count)]
    rng.shuffle(deck)
    return deck


def build_world() -> World:
    """The same world at every call."""
    rng = random.Random(WORLD_SEED)
    towns = tuple(
        Town(*facts)
        for facts in zip(
            TOWN_NAMES,
            _dealt(rng, LANDMARKS, len(TOWN_NAMES)),
            _dealt(rng, SITES, len(TOWN_NAMES)),
            _dealt(rng, GOODS, len(TOWN_NAMES)),
            strict=True,
        )
    )
    names = [(name, True) for name in WOMEN] + [(name, False) for name in MEN]
    ring = [name for name, _ in names]
    rng.shuffle(ring)
    friends = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    jobs, homes, pets, colours, foods, hobbies = (
        _dealt(rng, values, len(names)) for values in (JOBS, TOWN_NAMES, PETS, COLOURS, FOODS, HOBBIES)
    )
    people = tuple(
        Person(name, female, jobs[i], homes[i], pets[i], colours[i], foods[i], hobbies[i], friends[name])
        for i, (name, female) in enumerate(names)
    )
    return World(people, towns)


WORLD = build_world()


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(parts: list[str]) -> str:
    """'x', 'x and y', 'x, y and z'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def upper_first(sentence: str) -> str:
    """The sentence with a capital at its start."""
    return sentence[0].upper() + sentence[1:]
