"""The paper's five tasks from local files: what the files hold, whether they are right, and lm-eval's own task on them.

A folder holds `TASK.jsonl`, the questions that are asked, and for examples in the prompt `TASK.train.jsonl`, both in
the format of the task's dataset on the hub (the fields that a row class below names; others are passed over). Prompts,
metrics and everything else about a task come from the YAML that lm-eval ships, so that scores compare with those of
the same questions from the hub. Every line is checked before anything is computed: what is wrong is one line, with the
line's number. Importing lm-eval takes seconds, so it waits until a task is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from blockpruner.checkpoint import file_digest
from blockpruner.errors import ConfigurationError
from blockpruner.foreign_files import parsed_json

_Text = Annotated[str, Field(pattern=r"\S")]


class _Row(BaseModel):
    """One question."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Piqa(_Row):
    """PIQA."""

    goal: _Text
    sol1: _Text
    sol2: _Text
    label: Annotated[int, Field(strict=True, ge=0, le=1)]


class _Winogrande(_Row):
    """WinoGrande."""

    sentence: _Text
    option1: _Text
    option2: _Text
    answer: Literal["1", "2"]

    @model_validator(mode="after")
    def _has_a_gap(self) -> Self:
        """What stands after the gap is what lm-eval scores."""
        _, gap, rest = self.sentence.partition("_")
        if not gap or not rest.strip():
            raise PydanticCustomError("gap", "sentence has no '_' with more text after it")
        return self


class _Hellaswag(_Row):
    """HellaSwag; the label is text on the hub and a number in the files that its authors give."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[tuple[_Text, ...], Field(min_length=2)]
    label: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _names_an_ending(self) -> Self:
        if self.label >= len(self.endings):
            raise PydanticCustomError("label", "label is not the position of one of the endings")
        return self


class _ArcChoices(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    text: Annotated[tuple[_Text, ...], Field(min_length=2)]
    label: tuple[str, ...]


class _Arc(_Row):
    """ARC-easy or ARC-challenge."""

    question: _Text
    choices: _ArcChoices
    answerKey: str

    @model_validator(mode="after")
    def _names_a_choice(self) -> Self:
        if len(self.choices.label) != len(self.choices.text):
            raise PydanticCustomError("label", "choices.label and choices.text are not equally long")
        if self.answerKey not in self.choices.label:
            raise PydanticCustomError("key", "answerKey is none of choices.label")
        return self


class _Format(NamedTuple):
    """What a task's files hold."""

    folder: str
    """Where among lm-eval's tasks its YAML lies."""
    dataset: str
    """The dataset of the hub that its YAML names."""
    row: type[_Row]


_FORMATS: Mapping[str, _Format] = {
    "piqa": _Format("piqa", "baber/piqa", _Piqa),
    "winogrande": _Format("winogrande", "allenai/winogrande", _Winogrande),
    "hellaswag": _Format("hellaswag", "Rowan/hellaswag", _Hellaswag),
    "arc_easy": _Format("arc", "allenai/ai2_arc", _Arc),
    "arc_challenge": _Format("arc", "allenai/ai2_arc", _Arc),
}
"""By lm-eval's name of the task."""

DATA_TASKS: tuple[str, ...] = tuple(_FORMATS)
"""The tasks that local files can feed, by lm-eval's names; in the order of the paper's tables."""


def data_digest(name: str, folder: Path, num_fewshot: int | None) -> str:
    """Check a task's files, every line of them, and identify their content.

    Args:
        name: one of `DATA_TASKS`.
        folder: where the files lie.
        num_fewshot: examples in the prompt; None or 0: the file with examples is not needed, and not looked at.

    Raises:
        ConfigurationError: if a file that is needed is missing, empty or wrong, or holds fewer examples than are asked.
    """
    return "-".join(file_digest(_path(name, folder, shots)) for shots in _checked(name, folder, num_fewshot))


def data_config(name: str, folder: Path, num_fewshot: int | None, scratch: Path) -> dict[str, Any]:
    """lm-eval's configuration of a task, with its data taken from the folder.

    The rows go through a Parquet file in `scratch`: its columns have the types of the hub's dataset, where a JSON
    reader would guess them (and take a text that looks like a date for one).

    Raises:
        ConfigurationError: see `data_digest`.
    """
    config = _shipped_config(name)
    asked = config["test_split"] if config.get("test_split") else config["validation_split"]
    files: dict[str, str] = {}
    for is_shots, rows in _checked(name, folder, num_fewshot).items():
        split = "train" if is_shots else asked
        files[split] = str(scratch / f"{name}.{split}.parquet")
        pq.write_table(pa.Table.from_pylist([_as_on_the_hub(row) for row in rows]), files[split])
    return {
        **config,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(scratch)},
        "training_split": "train" if "train" in files else None,
        "validation_split": asked if not config.get("test_split") else None,
    }


def _checked(name: str, folder: Path, num_fewshot: int | None) -> dict[bool, list[_Row]]:
    """The rows to ask, and those to show where there are any; by whether they are to be shown."""
    rows = {False: _rows(name, _path(name, folder, shots=False), f"the questions of {name}")}
    if num_fewshot:
        path = _path(name, folder, shots=True)
        rows[True] = _rows(name, path, f"the examples that num_fewshot={num_fewshot} shows before a question of {name}")
        if len(rows[True]) <= num_fewshot:  # lm-eval draws one more, should the question itself be among them
            raise ConfigurationError(
                f"{path} has {len(rows[True])} examples, and num_fewshot={num_fewshot} needs one more than it shows, "
                f"{num_fewshot + 1}; give --num-fewshot {len(rows[True]) - 1} or more examples"
            )
    return rows


def _path(name: str, folder: Path, shots: bool) -> Path:
    return folder / (f"{name}.train.jsonl" if shots else f"{name}.jsonl")


def _rows(name: str, path: Path, purpose: str) -> list[_Row]:
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path} with {purpose}; put it there, or leave {name} out")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also cuts where JSON text may go on
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read as UTF-8 text: {error}") from error
    rows = [_row(name, line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigurationError(f"{path} is empty; it must hold {purpose}, a JSON object a line")
    return rows


def _row(name: str, line: str, place: str) -> _Row:
    row_type = _FORMATS[name].row
    expected = f"a line has the fields {', '.join(row_type.model_fields)}, as in {_FORMATS[name].dataset}"
    try:
        fields = parsed_json(line)
        if not isinstance(fields, dict):
            raise ConfigurationError(f"{place} is no JSON object; {expected}")
        return row_type.model_validate(fields)
    except ValidationError as error:
        raise ConfigurationError(f"{place}: {_problem(error)}; {expected}") from error
    except ValueError as error:
        raise ConfigurationError(f"{place} is no JSON ({error}); {expected}") from error


def _problem(error: ValidationError) -> str:
    """The first of pydantic's findings in a few words."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if not field:
        return first["msg"]
    if first["type"] == "missing":
        return f"the field {field!r} is missing"
    if first["type"] == "string_pattern_mismatch":
        return f"{field} is blank"
    came = repr(first["input"])
    valid = first["msg"].replace("Input ", "it ")
    return f"{field} is {came if len(came) <= 60 else came[:57] + '...'}: {valid}"


def _as_on_the_hub(row: _Row) -> dict[str, Any]:
    """The row's fields with the types that they have on the hub."""
    fields = row.model_dump(mode="json")
    return {**fields, "label": str(fields["label"])} if isinstance(row, _Hellaswag) else fields


def _shipped_config(name: str) -> dict[str, Any]:
    """What lm-eval's own YAML says of a task, its functions imported."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = _FORMATS[name].folder
    for path in sorted((Path(lm_eval.tasks.__file__).parent / folder).glob("*.yaml")):
        if load_yaml(path, resolve_func=False)["task"] == name:
            return dict(load_yaml(path))
    raise ConfigurationError(f"this lm-eval has no task {name!r} in its folder {folder}; leave it out")
