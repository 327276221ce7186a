"""From a recipe to the stages that it asks for, in order, each with its settings and inputs.

Opens the model's folder and checks what can be checked before anything is computed. Runs nothing, stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from blockpruner.baichuan import check_fold, is_foldable
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError
from blockpruner.export.formats import FORMATS, check_code
from blockpruner.export.names import ExportFormat, FormatChoice
from blockpruner.loading import DtypeName, resolve_device, resolve_dtype
from blockpruner.paths import user_path
from blockpruner.trace import read_trace
from flows.formats import PrunedModel, check_family, check_formats, dtype_for, is_repeated
from flows.goals import EXPORTING, SEARCHING, Goal
from flows.grid import EXTERNAL_ROLE, External
from flows.model_shape import ModelShape, measured_shape, searched_shape
from flows.opened_models import PrunedElsewhere, check_any_model, folded_model, opened
from flows.recipe import Recipe
from stages import baseline, calibrate, evaluate, export, fold, search, speed
from stages.artifacts import Artifact
from stages.contract import ArtifactRef, Stage, StageConfig, StageInputs
from stages.executor import require_ray
from stages.lm_tasks import TaskSpec, resolve_tasks
from stages.runs import RunDescription
from stages.text_sources import Purpose, resolve_text

_FOLDED = "fold"
"""Role of the artifact that holds a model folded into a Llama."""

_DENSE = ("evaluate:dense", "evaluate dense")
"""Role and label of the dense model's evaluation."""

TextRefs = tuple[tuple[str, ArtifactRef], ...]
"""Prepared texts by the name under which their results are listed."""

Artifacts = Mapping[str, Artifact[Any]]
"""The artifacts that a run has so far, by role."""


@dataclass(frozen=True)
class Job:
    """What the artifact store needs to compute a stage."""

    stage: Stage[Any, Any, Any]
    config: StageConfig
    inputs: StageInputs

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the result."""
        return self.stage.fingerprint(self.config, self.inputs)

    @property
    def checkpoints(self) -> str | None:
        """Identifies the checkpoints that it may go on from; None if it keeps none."""
        return self.stage.resume_fingerprint(self.config, self.inputs) if self.stage.resumable else None


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan. Its job is known once the artifacts before it are there."""

    role: str
    """What the run uses it for: see `stages.runs.StageRun.role`."""
    label: str
    """For people."""
    job: Callable[[Artifacts], Job | None]
    """None where it turns out that there is nothing to do."""


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    recipe: Recipe
    goal: Goal
    checkpoint: Checkpoint
    device: str
    dtype: DtypeName
    shape: ModelShape | None
    """None where nothing is searched."""
    external: PrunedElsewhere | None = None
    """What takes the place of search and export."""

    @classmethod
    def make(cls, recipe: Recipe, goal: Goal, external: External | None = None) -> Plan:
        """Open the model and check the recipe against it.

        Args:
            recipe: what to do.
            goal: how far to go.
            external: a checkpoint pruned elsewhere, which is then measured in place of one that is searched for.

        Raises:
            BlockPrunerError: if the model, a text, a task or a setting cannot be used.
        """
        if goal in SEARCHING and external is None:
            recipe.require_target()
            require_ray(recipe.spread)
        device = resolve_device(recipe.device)
        dtype = resolve_dtype(recipe.dtype, device)
        if recipe.compile == "on" and device == "cpu":
            raise ConfigurationError(
                "compile is 'on', and the device is the CPU; compiling pays on a GPU only: leave it out"
            )
        checkpoint = opened(recipe.model)
        if external is None:
            shape = searched_shape(recipe, goal, checkpoint) if goal in SEARCHING else None
        else:
            shape = measured_shape(recipe, goal, checkpoint)
        if goal == "baseline" or (goal == "measure" and recipe.eval_text):
            check_any_model(recipe, checkpoint)
        elsewhere = PrunedElsewhere.open(external, recipe) if external else None
        plan = cls(recipe, goal, checkpoint, device, dtype, shape, elsewhere)
        plan.check()
        return plan

    def check(self) -> None:
        """Name every text and task and read every file, so that a bad one is refused before anything is computed."""
        if self.goal == "measure" and not (self.recipe.tasks or self.recipe.eval_text):
            raise ConfigurationError("there is nothing to evaluate; give --tasks a,b or --eval-text FILE")
        given = [name for name in ("task_data", "log_samples") if getattr(self.recipe, name)]
        if self.goal in ("evaluate", "measure") and given and not self.recipe.tasks:
            raise ConfigurationError(
                f"{given[0]} is given and no tasks; say which, for example --tasks piqa,arc_easy, or leave it out"
            )
        if self.goal != "measure":
            resolve_text(self.recipe.calibration, "calibration", self.recipe.calibration_column).check()
        for typed in self.texts.values():
            resolve_text(typed, "evaluation", self._column(typed)).check()
        _ = self.tasks
        if not is_foldable(self.checkpoint):
            self._check_family(self.checkpoint)

    def _check_family(self, model: Checkpoint) -> None:
        if self.goal in EXPORTING:
            check_family(PrunedModel(model, dtype=self.recipe.export_dtype), self._formats)

    def description(self) -> RunDescription:
        """What the run's record says from the beginning. Reads the model's weights once, to identify them."""
        recipe, searching = self.recipe, self.goal in SEARCHING and self.external is None
        calibrating = self.goal != "measure"
        return RunDescription(
            name=recipe.name,
            model=recipe.model,
            model_fingerprint=self.checkpoint.fingerprint if self.goal != "calibrate" else None,
            num_layers=self.shape.num_layers if self.shape else None,
            num_blocks_total=2 * self.shape.num_layers if self.shape else None,
            num_parameters=self.shape.num_parameters if self.shape else None,
            calibration=recipe.calibration if calibrating else None,
            num_samples=recipe.num_samples if calibrating else None,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed if calibrating else None,
            block_kinds=recipe.block_kinds if searching else None,
            metric=recipe.judged_by if searching else None,
            strategy=self.external.label if self.external else recipe.strategy if searching else None,
            external=str(self.external.checkpoint.path) if self.external else None,
            num_parameters_left=self.external.num_parameters if self.external else None,
            device=self.device,
            dtype=self.dtype,
            config=recipe.anchored().model_dump(mode="json"),
        )

    @cached_property
    def texts(self) -> dict[str, str]:
        """The evaluation texts as they were typed, by the name under which their results are listed."""
        named: dict[str, str] = {}
        for typed in self.recipe.eval_text:
            name = resolve_text(typed, "evaluation", self._column(typed)).name
            number = sum(other == name or other.startswith(f"{name} #") for other in (*named, baseline.CALIBRATION))
            named[name if not number else f"{name} #{number + 1}"] = typed
        return named

    @cached_property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """The lm-eval tasks, found and identified."""
        if self.goal not in ("evaluate", "measure"):
            return ()
        recipe = self.recipe
        return resolve_tasks(recipe.tasks, self._task_dir, task_data=self._task_data, num_fewshot=recipe.num_fewshot)

    @property
    def stages(self) -> Iterator[PlannedStage]:
        """The stages in the order in which they run.

        Before the search comes every stage that opens something of the user's: the texts, and with the dense model's
        evaluation the tasks' data. What is too short or not on this machine fails in the first minutes, and not after
        hours of searching; and a second run, which finds the evaluation in the cache, opens nothing.
        """
        goal = self.goal
        if is_foldable(self.checkpoint):
            yield PlannedStage(_FOLDED, "fold into a Llama", self._fold)
        if goal != "measure":
            yield PlannedStage("calibration", "calibrate", self._calibration)
        if goal not in ("search", "export", "speed"):
            for name, typed in self.texts.items():
                yield PlannedStage(f"text:{name}", f"calibrate {name}", partial(self._text, typed))
        yield from self._dense_evaluations
        if goal in ("baseline", "evaluate"):
            yield PlannedStage("baseline", "baseline", self._baseline)
        yield from self._pruning if self.external is None else self._texts_of(self.external)
        if goal == "speed":
            yield PlannedStage("speed", "speed", self._speed)
        if goal == "evaluate":
            yield PlannedStage("evaluate:pruned", "evaluate pruned", self._evaluate_pruned)

    @property
    def _pruning(self) -> Iterator[PlannedStage]:
        if self.goal in SEARCHING:
            yield PlannedStage("search", "search", self._search)
        if self.goal in EXPORTING:
            first, *others = self._formats
            yield PlannedStage("export", "export", partial(self._export, first))
            for name in others:
                yield PlannedStage(f"export:{name}", f"export as {name}", partial(self._another_export, name))

    def _texts_of(self, external: PrunedElsewhere) -> Iterator[PlannedStage]:
        """The texts that it is measured on, cut by its own tokenizer where that is another one."""
        if self.goal != "evaluate" or not external.has_other_tokenizer(self.checkpoint):
            return
        yield PlannedStage(
            f"{EXTERNAL_ROLE}calibration", f"calibrate for {external.label}", self._calibration_of_external
        )
        for name, typed in self.texts.items():
            label = f"calibrate {name} for {external.label}"
            yield PlannedStage(f"{EXTERNAL_ROLE}text:{name}", label, partial(self._text_of_external, typed))

    @property
    def _dense_evaluations(self) -> Iterator[PlannedStage]:
        """The tasks, as an artifact that all runs of a model share; and the texts where no baseline measures them."""
        if self.tasks:
            yield PlannedStage(*_DENSE, self._evaluate_dense_tasks)
        if self.goal == "measure" and self.texts:
            role, label = ("evaluate:dense:texts", "evaluate dense on texts") if self.tasks else _DENSE
            yield PlannedStage(role, label, self._evaluate_dense_texts)

    @property
    def _formats(self) -> list[FormatChoice]:
        """The formats to write; where the pruned model is to be run here, first one that transformers loads."""
        asked = list(dict.fromkeys(self.recipe.export_format))
        if self.goal == "export":
            return asked
        # A stable sort: the order that was asked for stays, but for those that only other engines load.
        first, *others = sorted(asked, key=_only_other_engines)
        return ["auto", first, *others] if _only_other_engines(first) else [first, *others]

    def _fold(self, _: Artifacts) -> Job:
        return Job(fold.STAGE, fold.FoldConfig(), fold.FoldInputs(self.checkpoint))

    def _model(self, artifacts: Artifacts) -> Checkpoint:
        """The model that the stages work on: the user's, or what it was folded into."""
        if _FOLDED not in artifacts:
            return self.checkpoint
        folder = artifacts[_FOLDED].path / fold.MODEL_FOLDER
        check_fold(self.checkpoint, folder)
        return folded_model(folder, self.checkpoint.name, self.checkpoint.hub_id)

    def _calibration(self, artifacts: Artifacts) -> Job:
        return self._calibration_by(self._model(artifacts))

    def _calibration_of_external(self, _: Artifacts) -> Job:
        assert self.external is not None
        return self._calibration_by(self.external.checkpoint)

    def _calibration_by(self, tokenizer: Checkpoint) -> Job:
        recipe = self.recipe
        purpose: Purpose = "calibration"
        return self._tokens(tokenizer, recipe.calibration, purpose, recipe.calibration_column, recipe.num_samples)

    def _text(self, typed: str, artifacts: Artifacts) -> Job:
        return self._tokens(self._model(artifacts), typed, "evaluation", self._column(typed), None)

    def _text_of_external(self, typed: str, _: Artifacts) -> Job:
        assert self.external is not None
        return self._tokens(self.external.checkpoint, typed, "evaluation", self._column(typed), None)

    def _tokens(
        self, tokenizer: Checkpoint, typed: str, purpose: Purpose, column: str | None, num_samples: int | None
    ) -> Job:
        text = resolve_text(typed, purpose, column)
        config = calibrate.CalibrateConfig(
            source=text.source,
            num_samples=num_samples,
            sequence_length=self.recipe.sequence_length,
            seed=self.recipe.seed,
        )
        inputs = calibrate.CalibrateInputs(tokenizer, text, self.recipe.trust_remote_code)
        return Job(calibrate.STAGE, config, inputs)

    def _baseline(self, artifacts: Artifacts) -> Job:
        texts = self._text_refs(artifacts)
        inputs = baseline.BaselineInputs(
            self._model(artifacts), artifacts["calibration"].ref, texts, self.recipe.trust_remote_code
        )
        return Job(baseline.STAGE, baseline.BaselineConfig(dtype=self.dtype), inputs)

    def _search(self, artifacts: Artifacts) -> Job:
        recipe = self.recipe
        if _FOLDED in artifacts:  # what no format knew before
            self._check_family(self._model(artifacts))
        config = search.SearchConfig(
            block_kinds=recipe.block_kinds,
            num_blocks=recipe.num_blocks,
            ratio=recipe.ratio,
            dtype=self.dtype,
            metric=recipe.metric,
            stock_compatible_at=recipe.stock_compatible_at,
            strategy=recipe.strategy,
            strategy_seed=recipe.strategy_seed,
            laco=recipe.laco,
        )
        inputs = search.SearchInputs(self._model(artifacts), artifacts["calibration"].ref, recipe.trust_remote_code)
        return Job(search.STAGE, config, inputs)

    def _export(self, first: FormatChoice, artifacts: Artifacts) -> Job:
        """The first format, once it is known that all of them can be written."""
        check_formats(self._pruned(artifacts), self._formats)
        return self._export_as(first, artifacts)

    def _another_export(self, name: FormatChoice, artifacts: Artifacts) -> Job | None:
        earlier = self._formats[: self._formats.index(name)]
        return None if is_repeated(self._pruned(artifacts), name, earlier) else self._export_as(name, artifacts)

    def _export_as(self, name: FormatChoice, artifacts: Artifacts) -> Job:
        recipe = self.recipe
        dtype = dtype_for(name, recipe.export_dtype)
        config = export.ExportConfig(num_blocks=recipe.export_blocks, format=name, dtype=dtype)
        return Job(export.STAGE, config, export.ExportInputs(self._model(artifacts), artifacts["search"].ref))

    def _pruned(self, artifacts: Artifacts) -> PrunedModel:
        """What is exported."""
        trace, count = read_trace(artifacts["search"].path), self.recipe.export_blocks
        return PrunedModel(self._model(artifacts), trace.removed(count), trace.merges(count), self.recipe.export_dtype)

    def _speed(self, artifacts: Artifacts) -> Job:
        recipe = self.recipe
        config = speed.SpeedConfig(
            batch_sizes=recipe.speed_batch_sizes,
            prompt_tokens=recipe.speed_prompt_tokens,
            new_tokens=recipe.speed_new_tokens,
            num_repeats=recipe.speed_repeats,
            dtype=self.dtype,
            machine=speed.machine(self.device),
        )
        pruned, has_code = self._measured(artifacts)
        inputs = speed.SpeedInputs(self._model(artifacts), pruned, recipe.trust_remote_code, has_code)
        return Job(speed.STAGE, config, inputs)

    def _evaluate_dense_tasks(self, artifacts: Artifacts) -> Job:
        return self._evaluate(self._model(artifacts), (), self.tasks)

    def _evaluate_dense_texts(self, artifacts: Artifacts) -> Job:
        return self._evaluate(self._model(artifacts), self._text_refs(artifacts), ())

    def _evaluate_pruned(self, artifacts: Artifacts) -> Job:
        """The pruned model on everything."""

        def ref(role: str) -> ArtifactRef:
            return artifacts.get(f"{EXTERNAL_ROLE}{role}", artifacts[role]).ref

        named = ((baseline.CALIBRATION, ref("calibration")), *((name, ref(f"text:{name}")) for name in self.texts))
        pruned, has_code = self._measured(artifacts)
        return self._evaluate(pruned, named, self.tasks, has_code=has_code)

    def _measured(self, artifacts: Artifacts) -> tuple[Checkpoint, bool]:
        """The model to be measured, and whether code that comes with it may be run: an export's is our own."""
        if self.external is not None:
            return self.external.checkpoint, self.recipe.trust_remote_code
        return _exported(artifacts["export"])

    def _evaluate(
        self, model: Checkpoint, texts: TextRefs, tasks: tuple[TaskSpec, ...], *, has_code: bool = False
    ) -> Job:
        recipe = self.recipe
        config = evaluate.EvaluateConfig(
            dtype=self.dtype,
            tasks=tasks,
            num_fewshot=recipe.num_fewshot,
            limit=recipe.limit,
            log_samples=recipe.log_samples,
        )
        trusts = recipe.trust_remote_code
        inputs = evaluate.EvaluateInputs(model, texts, self._task_dir, self._task_data, trusts, has_code)
        return Job(evaluate.STAGE, config, inputs)

    def _text_refs(self, artifacts: Artifacts) -> TextRefs:
        return tuple((name, artifacts[f"text:{name}"].ref) for name in self.texts)

    def _column(self, typed: str) -> str | None:
        """The column with the text; a .txt has none."""
        return None if typed.lower().endswith(".txt") else self.recipe.eval_text_column

    @property
    def _task_dir(self) -> Path | None:
        return user_path(self.recipe.task_dir).resolve() if self.recipe.task_dir else None

    @property
    def _task_data(self) -> Path | None:
        return user_path(self.recipe.task_data).resolve() if self.recipe.task_data else None


def _only_other_engines(name: FormatChoice) -> bool:
    """Whether transformers does not load the format; 'auto' takes one that it does."""
    return name != "auto" and not FORMATS[name].in_transformers


def _exported(artifact: Artifact[Any]) -> tuple[Checkpoint, bool]:
    """An exported model, and whether it comes with code, which is then ours.

    Raises:
        CheckpointError: if it has other code: an artifact may be somebody else's.
    """
    name: ExportFormat = artifact.manifest.format
    checkpoint = Checkpoint.open(str(artifact.path / export.MODEL_FOLDER))
    check_code(checkpoint, name)
    return checkpoint, FORMATS[name].has_code
