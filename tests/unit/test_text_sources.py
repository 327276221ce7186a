"""Where rows come from: every local format, the hub's names, the paper's Alpaca recipe, and what is refused."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from blockpruner.errors import TextSourceError
from stages.text_sources import NAMED_TEXTS, FileSource, HubSource, NamedText, TextSource, resolve_text

ROWS = [
    "Below is an instruction.\n\n### Response:\nYes, “both”, naïve.",
    "",
    '  she said "no", twice  ',
    "a line\u2028separator and\x0ba tab of the vertical kind",
]


def write_jsonl(path: Path, column: str) -> None:
    records = [{"id": index, column: row} for index, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_csv(path: Path, column: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", column], *([index, row] for index, row in enumerate(ROWS))])


def write_parquet(path: Path, column: str) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(len(ROWS)), column: ROWS}), path)


WRITERS: dict[str, Callable[[Path, str], None]] = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


def resolve(path: Path, column: str | None = None) -> TextSource:
    return resolve_text(str(path), "calibration", column)


def refusal(path: Path, column: str | None = None) -> str:
    """The one line that a file is refused with."""
    with pytest.raises(TextSourceError) as caught:
        _ = resolve(path, column).rows
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_formats_give_the_columns_values_unchanged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, "text")
    assert list(resolve(path).rows) == ROWS
    WRITERS[suffix](path, "instruction")
    assert list(resolve(path, "instruction").rows) == ROWS


def test_a_row_of_a_txt_is_a_line_that_is_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "rows.TXT"
    path.write_bytes("\ufeff one \r\n\r\n  \t\ntwo\rthr\u2028ee\n\nfour".encode())
    with path.open(encoding="utf-8-sig") as file:  # the oracle: Python's own idea of a line
        expected = [line.strip() for line in file if line.strip()]
    assert list(resolve(path).rows) == expected == ["one", "two", "thr\u2028ee", "four"]


def test_a_field_of_a_csv_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    before = csv.field_size_limit()
    assert [len(row) for row in resolve(path).rows] == [200_000]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_that_is_not_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, "text")
    message = refusal(path, "txt")
    assert "has no column 'txt'; its columns: id, text; did you mean 'text'?" in message
    assert str(path) in message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_value_that_is_no_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, "text")
    assert "1: column 'id' holds int, not a string" in refusal(path, "id")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.txt", b"", "is empty"),
        ("rows.txt", b" \n\n\t\n", "is empty"),
        ("rows.jsonl", b"\n", "is empty"),
        ("rows.csv", b"text\n", "is empty"),
        ("rows.parquet", b"", "is empty"),
        ("rows.txt", b"good\nbad \xff\n", "is not UTF-8: byte 0xff at offset 9"),
        ("rows.jsonl", b'{"text": "\xe4"}', "is not UTF-8: byte 0xe4 at offset 10"),
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not valid JSON"),
        ("rows.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is a JSON list"),
        ("rows.jsonl", b'{"text": "a"}\n{"texts": "b"}\n', "line 2 has no column 'text'; its columns: texts"),
        ("rows.jsonl", b'{"text": null}\n', "line 1: column 'text' holds nothing (null); take it out"),
        ("rows.jsonl", b'{"text": "\\ud800"}\n', "line 1: column 'text' holds half a surrogate pair"),
        ("rows.csv", b'id,text\n1,"a" b\n', "line 2 is not valid CSV"),
        ("rows.csv", b"id,text\n1,a\n2\n", "line 3 has fewer fields than the header"),
        ("rows.parquet", b"PAR1 not really PAR1", "is not a valid parquet file"),
        ("rows.json", b"[]", "suffix '.json'; a text file ends with .txt, .jsonl, .csv, .parquet"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    assert words in message
    assert str(path) in message


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "is not a file" in refusal(tmp_path)
    assert "there is no text file" in refusal(tmp_path / "gone.txt")
    assert "did you mean 'alpaca'?" in refusal(Path("alpacca"))
    assert "neither a named text (alpaca, wikitext2, c4, ptb) nor a file" in refusal(Path("shakespeare"))


def test_a_txt_has_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("one\n")
    assert resolve(path).source == FileSource(format="txt")
    assert "a row of a .txt is a line; leave out the column 'body'" in refusal(path, "body")


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "a.txt", tmp_path / "other" / "b.txt", tmp_path / "c.txt"]
    for path, content in zip(paths, ["one\n", "one\n", "one!\n"], strict=True):
        path.write_text(content)
    here, elsewhere, changed = (resolve(path).fingerprint for path in paths)
    assert here == elsewhere != changed


def test_hub_specifications() -> None:
    full = "hub://a/b?config=c&split=d&column=e&revision=refs%2Fpr%2F1&data_files=x/*.parquet"
    assert resolve_text(full, "evaluation").source == HubSource(
        path="a/b", config="c", split="d", column="e", revision="refs/pr/1", data_files="x/*.parquet"
    )
    assert resolve_text("hub://a/b", "calibration").source == HubSource(path="a/b", split="train", column="text")
    assert resolve_text("hub://a/b", "evaluation", "body").source == HubSource(path="a/b", split="test", column="body")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hub://a/b?splitt=train", "'splitt' in 'hub://a/b?splitt=train' is not known; valid are config, split"),
        ("hub://a/b?splitt=train", "did you mean 'split'?"),
        ("hub://a/b?split=", "'split' in 'hub://a/b?split=' is empty"),
        ("hub://a/b?split", "is not well formed"),
        ("hub://", "names no dataset"),
    ],
)
def test_hub_specifications_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(TextSourceError) as caught:
        resolve_text(text, "calibration")
    assert words in str(caught.value)


def test_named_texts_have_other_rows_to_evaluate_on() -> None:
    assert list(NAMED_TEXTS) == ["alpaca", "wikitext2", "c4", "ptb"]
    for name, named in NAMED_TEXTS.items():
        assert resolve_text(name, "calibration").source == named.calibration
        assert resolve_text(name, "evaluation").source == named.evaluation
        assert named.calibration != named.evaluation
        assert named.calibration.path == named.evaluation.path
    assert NAMED_TEXTS["ptb"].calibration.column == "sentence"


@pytest.mark.parametrize("text", ["alpaca", "hub://nobody/nothing"])
def test_the_hub_while_offline(text: str) -> None:
    with pytest.raises(TextSourceError) as caught:
        _ = resolve_text(text, "calibration").rows
    message = str(caught.value)
    assert "is not on this machine and the hub cannot be reached" in message
    assert "run once with a network (and HF_HUB_OFFLINE unset), or give a local file" in message
    assert "\n" not in message


@pytest.fixture
def alpaca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in the hub's layout in the place of tatsu-lab/alpaca, and a cache that goes away."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "alpaca"
    folder.mkdir()
    texts = [f"row {index}" for index in range(103)]
    datasets.Dataset.from_dict({"instruction": texts, "text": texts}).to_parquet(folder / "train-00000.parquet")
    named = NAMED_TEXTS["alpaca"]
    parts = {
        purpose: getattr(named, purpose).model_copy(update={"path": str(folder)})
        for purpose in ("calibration", "evaluation")
    }
    monkeypatch.setitem(NAMED_TEXTS, "alpaca", NamedText(**parts))
    return folder


def test_alpaca_rows_are_the_references(alpaca: Path) -> None:
    import datasets

    # The reference's steps, by hand.
    train = datasets.load_dataset(str(alpaca), split="train")
    held = train.train_test_split(test_size=0.2, seed=42)["test"]
    halves = held.train_test_split(test_size=0.5, seed=42)
    assert list(resolve_text("alpaca", "calibration").rows) == halves["train"]["text"][:]
    assert list(resolve_text("alpaca", "evaluation").rows) == halves["test"]["text"][:]
    assert len(halves["train"]) == 10  # 103 rows: 21 are held


def test_alpaca_keeps_its_identity(alpaca: Path) -> None:
    first, again = resolve_text("alpaca", "calibration"), resolve_text("alpaca", "calibration")
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != resolve_text("alpaca", "evaluation").fingerprint
    assert random.Random(42).sample(list(first.rows), 10) == random.Random(42).sample(list(again.rows), 10)


def test_a_pinned_commit_is_an_identity_that_needs_no_rows() -> None:
    commits = ["0" * 40, "1" * 40]
    texts = [resolve_text(f"hub://a/b?revision={commit}", "calibration") for commit in commits]
    assert texts[0].fingerprint != texts[1].fingerprint


def test_what_a_dataset_lacks(alpaca: Path) -> None:
    def message(**fields: str) -> str:
        with pytest.raises(TextSourceError) as caught:
            _ = TextSource("x", HubSource.model_validate({"path": str(alpaca), **fields})).rows
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no column 'texts'; its columns: instruction, text; did you mean 'text'?" in message(column="texts")
    assert 'Unknown split "test"' in message(split="test")
    assert "cannot be read" in message(config="other")
