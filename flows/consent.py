"""Going on from a run: what lets code of others run counts where the command gives it again, and nowhere else.

The record that a command goes on from can be somebody else's, and so can the model, the tasks and the cluster that it
names. What a record has and the command does not give is missed only by a stage that has yet to be computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from blockpruner.errors import ConfigurationError
from flows.grid import EXTERNAL_ROLE
from flows.recipe import Recipe, make_recipe
from stages.consent import CODE_SETTINGS, as_options, code_settings

if TYPE_CHECKING:
    from flows.goals import Goal
    from flows.grid import External
    from flows.plan import Plan
    from flows.runner import Execute, Runner, StageCall
    from stages.artifacts import Artifact
    from stages.runs import RunRecord

_IDENTIFIES = "task_dir"
"""Without it nobody knows which tasks are meant, so that it stays in the recipe; to look at them runs nothing."""
_RUN_NO_CODE = ("fold", "export")
"""Roles of the stages that need no code of a model's."""


@dataclass(frozen=True)
class Consent:
    """What a command that goes on from a run was allowed."""

    run_id: str = ""
    withheld: Mapping[str, Any] = field(default_factory=dict)
    """The settings that the record has and the command does not give."""

    @classmethod
    def of(cls, record: RunRecord, given: Mapping[str, Any]) -> Self:
        """The consent to a run's settings, of a command with these of its own."""
        recorded = code_settings(record.config)
        return cls(record.run_id, {name: value for name, value in recorded.items() if name not in given})

    @property
    def is_guarded(self) -> bool:
        """Whether the recipe still has a setting that was not given: it may be carried out as `checked` says only."""
        return _IDENTIFIES in self.withheld

    def checked(self, runner: Runner, recipe: Recipe, goal: Goal, external: External | None = None) -> Execute:
        """Who may execute the recipe's stages, once it is known that none of those to be computed needs what is missed.

        Raises:
            ConfigurationError: if one does; it names the run, and what to give.
        """
        from flows.plan import Plan
        from flows.runner import execute_here

        if not self.withheld:
            return execute_here
        plan = Plan.make(recipe, goal, external)
        for role in runner.missing(plan):
            self._require(role, plan)

        def execute(call: StageCall) -> Artifact[Any]:
            if call.found is None:  # also where it was there a moment ago
                self._require(call.planned.role, plan)
            return execute_here(call)

        return execute

    def _require(self, role: str, plan: Plan) -> None:
        """Make sure that a stage can be computed without what is withheld."""
        needed = {name: value for name, value in self.withheld.items() if name in _used(role, plan)}
        if needed:
            raise ConfigurationError(
                f"run {self.run_id} was begun with settings that let code of others run, which are never taken over "
                f"from a run's record; if you trust that code, give them again: {as_options(needed)}"
            )


ALL_GIVEN = Consent()
"""Of a command that goes on from no run: everything is its own."""


def recipe_of(record: RunRecord, given: Mapping[str, Any]) -> Recipe:
    """A run's recipe, less what the command has to give, with what it gives of that.

    Raises:
        ConfigurationError: if the record's settings are not valid.
    """
    kept = {name: value for name, value in record.config.items() if name == _IDENTIFIES or name not in CODE_SETTINGS}
    return make_recipe(kept | {name: value for name, value in given.items() if name in CODE_SETTINGS})


def _used(role: str, plan: Plan) -> set[str]:
    """The settings that a stage heeds."""
    kind = role.removeprefix(EXTERNAL_ROLE).partition(":")[0]
    used = set() if kind in _RUN_NO_CODE else {"trust_remote_code"}
    if kind == "evaluate" and any(task.origin == "local" for task in plan.tasks):
        used.add("task_dir")
    if kind == "search" and plan.recipe.executor == "ray":
        used.add("ray_address")
    return used
