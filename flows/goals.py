"""How far a run goes. Imports nothing heavy, so that the command line can name the goals."""

from __future__ import annotations

from typing import Literal, get_args

Goal = Literal["calibrate", "baseline", "search", "export", "evaluate", "measure", "speed"]
"""How far to go: to the stage of this name with all that it needs ('evaluate' is the whole pipeline); 'measure'
evaluates the model as it is and prunes nothing."""

SEARCHING: frozenset[Goal] = frozenset({"search", "export", "evaluate", "speed"})
EXPORTING: frozenset[Goal] = frozenset({"export", "evaluate", "speed"})


def known_goal(name: str | None) -> Goal | None:
    """The goal of this name; None if there is none."""
    goals: tuple[Goal, ...] = get_args(Goal)
    return next((goal for goal in goals if goal == name), None)
