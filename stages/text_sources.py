"""Where rows of text come from: a named recipe, any dataset of the Hugging Face hub, or a local file.

`resolve_text` turns what a user typed into a `TextSource`, which knows its rows and its identity. It chooses no sample
and tokenizes nothing.

What a user may type:
    alpaca                          one of NAMED_TEXTS
    hub://OWNER/NAME?config=C&split=S&column=T&revision=R&data_files=F
                                    any dataset of the hub; every field after the question mark may be left out
                                    (split: train to calibrate, test to evaluate; column: text)
    path/to/file.txt                a local file that ends with .txt, .jsonl, .csv or .parquet
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import Field

from blockpruner.errors import TextSourceError, nearest, one_line
from blockpruner.paths import user_path
from stages.contract import StageConfig
from stages.text_files import SUFFIXES, FileFormat, file_format, missing_column, not_text, parse_rows

Purpose = Literal["calibration", "evaluation"]

DEFAULT_COLUMN = "text"
_HUB_PREFIX = "hub://"
_HUB_FIELDS = ("config", "split", "column", "revision", "data_files")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class FileSource(StageConfig):
    """How the rows of a local file are read. Its path is not part of what it is; its content is."""

    kind: Literal["file"] = "file"
    format: FileFormat
    column: str | None = None
    """Column that holds the text; None for a .txt, which has no columns."""


class HubSource(StageConfig):
    """Rows of a dataset of the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    path: str
    """OWNER/NAME on the hub, or a folder in the hub's layout."""
    config: str | None = None
    """Configuration ('subset') of the dataset."""
    data_files: str | None = None
    """Only these files of the dataset; may hold wildcards."""
    revision: str | None = None
    """Branch, tag or commit; None: the default branch."""
    split: str = "train"
    column: str = DEFAULT_COLUMN
    part: Literal["all", "alpaca-calibration", "alpaca-evaluation"] = "all"
    """Which rows: all; or of the fifth that the paper sets aside (shuffled with seed 42) the first or second half."""


AnySource = Annotated[FileSource | HubSource, Field(discriminator="kind")]


class NamedText(StageConfig):
    """A text that has a name of its own."""

    calibration: HubSource
    evaluation: HubSource


def _named(path: str, evaluation_split: str, **fields: str) -> NamedText:
    calibration = HubSource.model_validate({"path": path, "split": "train", **fields})
    return NamedText(calibration=calibration, evaluation=calibration.model_copy(update={"split": evaluation_split}))


_ALPACA = HubSource(path="tatsu-lab/alpaca", part="alpaca-calibration")
_C4 = HubSource(path="allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz")
# The dataset itself is a loading script, which no current version of `datasets` runs; the hub keeps a parquet copy.
_PTB = HubSource(
    path="ptb-text-only/ptb_text_only",
    revision="refs/convert/parquet",
    data_files="penn_treebank/train/*.parquet",
    column="sentence",
)

NAMED_TEXTS: Mapping[str, NamedText] = {
    "alpaca": NamedText(calibration=_ALPACA, evaluation=_ALPACA.model_copy(update={"part": "alpaca-evaluation"})),
    "wikitext2": _named("Salesforce/wikitext", "test", config="wikitext-2-raw-v1"),
    "c4": NamedText(
        calibration=_C4,
        evaluation=_C4.model_copy(
            update={"data_files": "en/c4-validation.00000-of-00008.json.gz", "split": "validation"}
        ),
    ),
    "ptb": NamedText(
        calibration=_PTB,
        evaluation=_PTB.model_copy(update={"data_files": "penn_treebank/test/*.parquet", "split": "test"}),
    ),
}
"""The named recipes. Calibration on `alpaca` is the paper's own (`tatsu-lab/alpaca`, column `text`)."""


@dataclass(frozen=True)
class TextSource:
    """A text that was named by a user: how to read it, its rows and its identity. Reads when first asked."""

    name: str
    """For display: the recipe's name, the dataset, or the file's name."""
    source: FileSource | HubSource
    file: Path | None = None
    """The local file of a `FileSource`."""

    @cached_property
    def rows(self) -> Sequence[str]:
        """All rows, in order.

        Raises:
            TextSourceError: if the text cannot be read, has no rows, or lacks the column.
        """
        if isinstance(self.source, HubSource):
            return _hub_rows(self.source)
        column = self.source.column or DEFAULT_COLUMN
        return parse_rows(self._content, self.source.format, column, str(self.file))

    def check(self) -> None:
        """Read a local file, so that one that cannot be used is refused at once.

        A dataset of the hub waits for the stage that needs it: it may be large, or the hub out of reach for a moment.

        Raises:
            TextSourceError: if the file cannot be read, has no rows, or lacks the column.
        """
        if isinstance(self.source, FileSource):
            _ = self.rows

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content: of a file's bytes, or of a dataset's rows (or the commit, where one is pinned).

        Rows, and not whatever commit a branch is at: the same whether or not the hub can be reached.
        """
        if isinstance(self.source, FileSource):
            return hashlib.sha256(self._content).hexdigest()
        if self.source.revision and _COMMIT.fullmatch(self.source.revision):
            return hashlib.sha256(f"{self.source.path}@{self.source.revision}".encode()).hexdigest()
        return _rows_digest(self.rows)

    @cached_property
    def _content(self) -> bytes:
        assert self.file is not None
        try:
            return self.file.read_bytes()
        except OSError as error:
            raise TextSourceError(f"{self.file} cannot be read ({error.strerror or error}); check the file") from error


def resolve_text(text: str, purpose: Purpose, column: str | None = None) -> TextSource:
    """The source of what a user typed (see the module's docstring); reads no rows yet.

    Args:
        text: a recipe's name, hub://..., or a file.
        purpose: which rows a recipe gives; a dataset has other rows to calibrate on than to evaluate on.
        column: the column that holds the text, where it is not the default one.

    Raises:
        TextSourceError: if there is no such recipe or file, or it is not a file that can be read.
    """
    if text.startswith(_HUB_PREFIX):
        return _resolve_hub(text, purpose, column)
    if text in NAMED_TEXTS:
        named: HubSource = getattr(NAMED_TEXTS[text], purpose)
        return TextSource(text, named.model_copy(update={"column": column}) if column else named)
    return _resolve_file(text, column)


def _resolve_hub(text: str, purpose: Purpose, column: str | None) -> TextSource:
    path, _, query = text.removeprefix(_HUB_PREFIX).partition("?")
    try:
        fields = dict(parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True))
    except ValueError as error:
        raise TextSourceError(f"{text!r} is not well formed; write hub://OWNER/NAME?split=train&column=text") from error
    for field, value in fields.items():
        if field not in _HUB_FIELDS or not value:
            problem = "is empty" if field in _HUB_FIELDS else "is not known"
            valid = ", ".join(_HUB_FIELDS)
            raise TextSourceError(f"{field!r} in {text!r} {problem}; valid are {valid}{nearest(field, _HUB_FIELDS)}")
    if not path.strip("/. "):
        raise TextSourceError(f"{text!r} names no dataset; write hub://OWNER/NAME?split=train&column=text")
    chosen = {"split": "train" if purpose == "calibration" else "test", **({"column": column} if column else {})}
    return TextSource(path, HubSource.model_validate({"path": path, **chosen, **fields}))


def _resolve_file(text: str, column: str | None) -> TextSource:
    path = user_path(text)
    known = ", ".join(NAMED_TEXTS)
    if not path.exists():
        if "/" in text or path.suffix.lower() in SUFFIXES:
            raise TextSourceError(f"there is no text file {text}; give a file, hub://OWNER/NAME, or one of {known}")
        hint = nearest(text, NAMED_TEXTS)
        raise TextSourceError(f"{text!r} is neither a named text ({known}) nor a file, nor hub://OWNER/NAME{hint}")
    if not path.is_file():
        raise TextSourceError(f"{text} is not a file; give one that ends with {', '.join(SUFFIXES)}")
    form = file_format(path)
    if form == "txt" and column not in (None, DEFAULT_COLUMN):
        raise TextSourceError(f"{text} has no columns: a row of a .txt is a line; leave out the column {column!r}")
    source = FileSource(format=form, column=None if form == "txt" else column or DEFAULT_COLUMN)
    return TextSource(path.name, source, path.resolve())


def _hub_rows(source: HubSource) -> list[str]:
    dataset = _part(_load_dataset(source), source.part)
    if source.column not in dataset.column_names:
        raise missing_column(source.path, source.column, list(dataset.column_names))
    rows = list(dataset[source.column])
    for number, value in enumerate(rows, start=1):
        if not isinstance(value, str):
            raise not_text(source.path, f"row {number}", source.column, value)
    if not rows:
        raise TextSourceError(f"{source.path}, split {source.split!r}, has no rows; choose another split")
    return rows


def _load_dataset(source: HubSource) -> Any:
    """The dataset; from the hub's own cache, where it is kept after the first time."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _quiet_hub():
            return datasets.load_dataset(
                source.path,
                source.config,
                data_files={source.split: source.data_files} if source.data_files else None,
                revision=source.revision,
                split=source.split,
            )
    except (ConnectionError, HfHubHTTPError) as error:
        raise TextSourceError(
            f"the dataset {source.path} is not on this machine and the hub cannot be reached ({one_line(error)}); "
            "run once with a network (and HF_HUB_OFFLINE unset), or give a local file"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise TextSourceError(f"the dataset {source.path} cannot be read: {one_line(error)}") from error


def _part(dataset: Any, part: str) -> Any:
    """The rows that the paper's Alpaca recipe leaves: a fifth is set aside, and halved (facts/paper.md)."""
    if part == "all":
        return dataset
    held = dataset.train_test_split(test_size=0.2, seed=42)["test"]
    halves = held.train_test_split(test_size=0.5, seed=42)
    return halves["train" if part == "alpaca-calibration" else "test"]


def _rows_digest(rows: Sequence[str]) -> str:
    """sha256 of rows, each with its length, so that no other rows run together to the same bytes."""
    digest = hashlib.sha256()
    for row in rows:
        encoded = row.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub client's line for every retry: the error that follows says it once."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
