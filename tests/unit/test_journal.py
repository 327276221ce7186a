"""The search's memory: what was kept comes back bit for bit, and what was damaged is noticed."""

from __future__ import annotations

import errno
import logging
import math
import os
import struct
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.errors import ArtifactError
from blockpruner.journal import SearchJournal
from blockpruner.scoring.table import ScoreTable
from blockpruner.trace import CandidateScore, SearchStep, SearchSummary, read_trace, write_trace

IDENTITY = "a" * 64
FOREIGN = "b" * 64
CANDIDATES = (mha(0), mlp(0), mha(1))
NUM_SEQUENCES = 2


def a_step(step: int, block: Block, score: float = 7.25) -> SearchStep:
    """A step with scores that lose their meaning when they lose a bit, one of them NaN and one infinite."""
    candidates = (
        CandidateScore(block=block, score=score, perplexity=score, rank=1, chosen=True),
        CandidateScore(block=mlp(8), score=math.nan, perplexity=math.nan, rank=2, chosen=False),
        CandidateScore(block=mlp(9), score=math.inf, perplexity=math.inf, rank=3, chosen=False),
    )
    return SearchStep(
        step=step,
        block=block,
        score=score,
        perplexity=score,
        num_parameters_removed=10 * step,
        ratio=step / 3,
        seconds=0.1 + step,
        candidates=candidates,
    )


STEPS = (a_step(1, mha(3), 0.1 + 0.2), a_step(2, mlp(1), 1e300), a_step(3, mha(0), 5e-324))


def journal_of(folder: Path, identity: str = IDENTITY, partial_interval_s: float = 0) -> SearchJournal:
    return SearchJournal(folder, identity, partial_interval_s)


def written(folder: Path) -> SearchJournal:
    journal = journal_of(folder)
    for step in STEPS:
        journal.append(step)
    return journal


def as_json(steps: Iterable[SearchStep]) -> list[str]:
    """Comparable although NaN differs from itself."""
    return [step.model_dump_json() for step in steps]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.fixture
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """No thousand warnings of a thousand damaged files."""
    caplog.set_level(logging.ERROR, logger="blockpruner.journal")


def changed(content: bytes) -> Iterable[tuple[int, bytes]]:
    """The content with one byte changed, for every byte, in ways that turn digits and dtype letters into others."""
    for position in range(len(content)):
        for mask in (0x01, 0x0F, 0x20, 0x80):
            flipped = content[position] ^ mask
            yield position, content[:position] + bytes([flipped]) + content[position + 1 :]


def test_steps_come_back_as_they_were(tmp_path: Path) -> None:
    written(tmp_path)
    assert as_json(journal_of(tmp_path).steps()) == as_json(STEPS)


def test_a_new_journal_is_empty_and_makes_its_folder(tmp_path: Path) -> None:
    journal = journal_of(tmp_path / "deep" / "folder")
    assert journal.steps() == []
    assert journal.dense_nll() is None
    assert journal.load_partial((), CANDIDATES, NUM_SEQUENCES).num_done == 0


@pytest.mark.parametrize("damage", ["torn", "empty", "changed", "not json", "a list"])
@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_a_damaged_step_is_said_and_the_last_good_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: int, damage: str
) -> None:
    written(tmp_path)
    path = tmp_path / f"step-{damaged:04d}.json"
    content = path.read_bytes()
    replacements = {
        "torn": content[: len(content) // 2],
        "empty": b"",
        "changed": content.replace(b'layer_index\\":8', b'layer_index\\":7'),
        "not json": b"\xff\xfe",
        "a list": b"[]",
    }
    assert replacements[damage] != content
    path.write_bytes(replacements[damage])
    with caplog.at_level(logging.WARNING):
        steps = journal_of(tmp_path).steps()
    assert as_json(steps) == as_json(STEPS[: damaged - 1])
    assert f"step {damaged} " in caplog.text
    # What followed the damaged step rests on it, and must not come back once the step is written anew.
    assert [file.name for file in sorted(tmp_path.glob("step-*"))] == [f"step-000{n}.json" for n in range(1, damaged)]


@pytest.mark.usefixtures("_quiet")
def test_no_changed_byte_of_a_step_goes_unnoticed(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "step-0002.json"
    content = path.read_bytes()
    third = (tmp_path / "step-0003.json").read_bytes()
    for position, damaged in changed(content):
        path.write_bytes(damaged)
        (tmp_path / "step-0003.json").write_bytes(third)
        found = as_json(journal_of(tmp_path).steps())
        assert found in (as_json(STEPS), as_json(STEPS[:1])), f"byte {position} was changed"


def test_a_step_under_another_number_is_not_taken(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "step-0002.json").write_bytes((tmp_path / "step-0003.json").read_bytes())
    assert as_json(journal_of(tmp_path).steps()) == as_json(STEPS[:1])


def test_steps_after_a_gap_are_not_taken_also_when_it_is_filled(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "step-0002.json").unlink()
    assert as_json(journal_of(tmp_path).steps()) == as_json(STEPS[:1])
    other = a_step(2, mha(1))
    journal_of(tmp_path).append(other)  # what follows rests on the step that is gone
    assert as_json(journal_of(tmp_path).steps()) == as_json((STEPS[0], other))


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal, table = journal_of(tmp_path), ScoreTable.empty(CANDIDATES, NUM_SEQUENCES)
    table.fill(slice(0, 3), slice(0, 1), torch.ones(3, 1))
    journal.save_partial((), table)
    table.fill(slice(0, 3), slice(1, 2), torch.ones(3, 1))
    journal.save_partial((), table)
    path = tmp_path / "partial.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        found = journal_of(tmp_path).load_partial((), CANDIDATES, NUM_SEQUENCES)
    assert found.done_CB.tolist() == [[True, False]] * 3
    assert "damaged" in caplog.text


def test_a_foreign_journal_is_refused_by_what_is_different(tmp_path: Path) -> None:
    parts = {"model": "m1", "calibration": "c1", "metric": "perplexity"}
    SearchJournal(tmp_path, IDENTITY, parts=parts).append(STEPS[0])
    with pytest.raises(ArtifactError, match=r"another search \(another metric\)"):
        SearchJournal(tmp_path, FOREIGN, parts={**parts, "metric": "kl"}).steps()
    with pytest.raises(ArtifactError, match="another model and calibration"):
        SearchJournal(tmp_path, FOREIGN, parts={**parts, "model": "m2", "calibration": "c2"}).steps()


def test_the_plan_comes_back_and_only_to_its_search(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert journal_of(tmp_path).plan() is None
    journal_of(tmp_path).keep_plan("a plan")
    assert journal_of(tmp_path).plan() == "a plan"
    assert not caplog.records
    assert journal_of(tmp_path, FOREIGN).plan() is None
    path = tmp_path / "plan.json"
    path.write_bytes(path.read_bytes().replace(b"a plan", b"a plaN"))
    caplog.clear()
    assert journal_of(tmp_path).plan() is None
    assert "the last bits of scores may change" in caplog.text


@pytest.mark.parametrize("name", ["step-0002.json", "plan.json", "dense.safetensors", "partial-previous.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_computed(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(ArtifactError, match=f"{name} is a folder, .*; remove it or move it away") as caught:
        journal_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_foreign_step_costs_none_of_those_before_it(tmp_path: Path) -> None:
    written(tmp_path)
    last = tmp_path / f"step-{len(STEPS):04d}.json"
    journal_of(tmp_path / "other", FOREIGN).append(STEPS[-1])
    (tmp_path / "other" / last.name).replace(last)
    with pytest.raises(ArtifactError, match=f"{last.name} belongs to another search .*; remove it: the steps before"):
        journal_of(tmp_path).steps()
    last.unlink()
    assert as_json(journal_of(tmp_path).steps()) == as_json(STEPS[:-1])


def test_the_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ArtifactError, match="another search") as caught:
        journal_of(tmp_path, FOREIGN).steps()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert as_json(journal_of(tmp_path).steps()) == as_json(STEPS), "it was left as it is"


def a_table() -> ScoreTable:
    """Half-filled, with the values that a round trip is likeliest to lose."""
    table = ScoreTable.empty(CANDIDATES, NUM_SEQUENCES)
    odd_nan = torch.tensor(struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_BEEF))[0], dtype=torch.float64)
    table.fill(slice(0, 1), slice(0, 2), torch.tensor([[0.1 + 0.2, -0.0]], dtype=torch.float64))
    table.fill(slice(1, 2), slice(0, 1), torch.tensor([[math.inf]], dtype=torch.float64))
    table.fill(slice(2, 3), slice(1, 2), odd_nan.reshape(1, 1))
    return table


def test_a_half_filled_table_comes_back_bit_for_bit(tmp_path: Path) -> None:
    table = a_table()
    journal_of(tmp_path).save_partial((mlp(1),), table)
    again = journal_of(tmp_path).load_partial((mlp(1),), CANDIDATES, NUM_SEQUENCES)
    assert bits(again.nll_CB) == bits(table.nll_CB)
    assert torch.equal(again.done_CB, table.done_CB)
    assert again.candidates == CANDIDATES
    assert (again.nll_CB.dtype, again.done_CB.dtype) == (torch.float64, torch.bool)
    again.fill(slice(0, 3), slice(0, 2), torch.zeros(3, 2))  # can be filled further
    assert again.is_complete


def test_the_table_of_another_step_or_search_is_not_taken(tmp_path: Path) -> None:
    journal_of(tmp_path).save_partial((mlp(1),), a_table())
    assert int(journal_of(tmp_path).load_partial((mlp(1),), CANDIDATES, NUM_SEQUENCES).done_CB.sum()) == 4
    others = [
        journal_of(tmp_path).load_partial((), CANDIDATES, NUM_SEQUENCES),
        journal_of(tmp_path).load_partial((mlp(2),), CANDIDATES, NUM_SEQUENCES),
        journal_of(tmp_path).load_partial((mlp(1),), tuple(reversed(CANDIDATES)), NUM_SEQUENCES),
        journal_of(tmp_path).load_partial((mlp(1),), CANDIDATES, NUM_SEQUENCES + 1),
        journal_of(tmp_path, FOREIGN).load_partial((mlp(1),), CANDIDATES, NUM_SEQUENCES),
    ]
    assert [int(table.done_CB.sum()) for table in others] == [0] * len(others)


@pytest.mark.usefixtures("_quiet")
def test_no_changed_byte_of_a_table_goes_unnoticed(tmp_path: Path) -> None:
    table = a_table()
    journal_of(tmp_path).save_partial((), table)
    path = tmp_path / "partial.safetensors"
    content = path.read_bytes()
    noticed = 0
    for position, damaged in changed(content):
        path.write_bytes(damaged)
        found = journal_of(tmp_path).load_partial((), CANDIDATES, NUM_SEQUENCES)
        empty = not bool(found.done_CB.any())
        same = bits(found.nll_CB) == bits(table.nll_CB) and torch.equal(found.done_CB, table.done_CB)
        assert found.nll_CB.dtype == torch.float64, f"byte {position} was changed"
        assert empty or same, f"byte {position} was changed"
        noticed += empty
    assert noticed > 4 * len(content) * 0.9


def test_a_changed_byte_in_the_scores_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal_of(tmp_path).save_partial((), a_table())
    path = tmp_path / "partial.safetensors"
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<d", 0.1 + 0.2))] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = journal_of(tmp_path).load_partial((), CANDIDATES, NUM_SEQUENCES)
    assert found.num_done == 0
    assert "changed bytes" in caplog.text


def test_a_torn_table_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal_of(tmp_path).save_partial((), a_table())
    path = tmp_path / "partial.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        assert journal_of(tmp_path).load_partial((), CANDIDATES, NUM_SEQUENCES).num_done == 0
    assert "damaged" in caplog.text


def test_a_finished_step_ends_its_table(tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    journal.save_partial((), a_table())
    journal.append(STEPS[0])
    assert not (tmp_path / "partial.safetensors").exists()


def test_tables_are_not_written_more_often_than_asked_for(tmp_path: Path) -> None:
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    journal_of(often).save_partial((), a_table())
    journal_of(seldom, partial_interval_s=3600).save_partial((), a_table())
    assert [(often / "partial.safetensors").exists(), (seldom / "partial.safetensors").exists()] == [True, False]


def test_what_a_killed_writer_left_is_swept_and_does_not_count(tmp_path: Path) -> None:
    written(tmp_path)
    torn = tmp_path / f".step-0004.json.{os.getpid() + 1}.tmp"
    torn.write_bytes(b'{"identity": "')
    assert as_json(journal_of(tmp_path).steps()) == as_json(STEPS)
    assert not torn.exists()


def test_nothing_but_its_own_files_is_left_behind(tmp_path: Path) -> None:
    written(tmp_path).keep_dense_nll(torch.ones(2, dtype=torch.float64))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["dense.safetensors", "step-0001.json", "step-0002.json", "step-0003.json"]


def test_the_dense_models_scores_come_back_bit_for_bit_and_only_to_their_search(tmp_path: Path) -> None:
    nll_B = a_table().nll_CB.flatten()
    journal_of(tmp_path).keep_dense_nll(nll_B)
    found = journal_of(tmp_path).dense_nll()
    assert found is not None
    assert bits(found) == bits(nll_B)
    assert journal_of(tmp_path, FOREIGN).dense_nll() is None
    save_file({"nll_B": nll_B.bfloat16()}, tmp_path / "dense.safetensors", {"identity": IDENTITY, "sha256": "0"})
    assert journal_of(tmp_path).dense_nll() is None


def test_a_changed_byte_in_the_dense_models_scores_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal_of(tmp_path).keep_dense_nll(torch.tensor([0.5, 3.5], dtype=torch.float64))
    path = tmp_path / "dense.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert journal_of(tmp_path).dense_nll() is None
    assert "the dense model's scores have changed bytes" in caplog.text


@pytest.mark.usefixtures("_quiet")
def test_no_changed_byte_of_the_dense_models_scores_goes_unnoticed(tmp_path: Path) -> None:
    nll_B = torch.tensor([0.1 + 0.2, 3.5], dtype=torch.float64)
    journal_of(tmp_path).keep_dense_nll(nll_B)
    path = tmp_path / "dense.safetensors"
    for position, damaged in changed(path.read_bytes()):
        path.write_bytes(damaged)
        found = journal_of(tmp_path).dense_nll()
        assert found is None or (found.dtype == torch.float64 and bits(found) == bits(nll_B)), f"byte {position}"


_NO_RECORD = (None, b"{}\n", b"[" * 100, b"\xff\xfe")


@pytest.mark.parametrize(
    ("file", "content"),
    [("search.json", b""), *product(["search.json", "trace.jsonl"], _NO_RECORD)],
    ids=str,
)
def test_what_is_no_trace_is_said_in_one_line(file: str, content: bytes | None, tmp_path: Path) -> None:
    summary = SearchSummary(dense_perplexity=5.0, num_layers=4, num_parameters=100)
    write_trace(tmp_path, summary, STEPS)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ArtifactError, match="holds no trace of a search") as caught:
        read_trace(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_trace_that_cannot_be_read_now_is_not_called_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is to delete a good search because too many files were open."""
    write_trace(tmp_path, SearchSummary(dense_perplexity=5.0, num_layers=4, num_parameters=100), STEPS)

    def too_many(_: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", too_many)
    with pytest.raises(OSError, match="Too many open files"):
        read_trace(tmp_path)


def test_a_finished_trace_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """The files of `trace`, which hold the same steps."""
    summary = SearchSummary(dense_perplexity=math.inf, num_layers=10, num_parameters=1000)
    write_trace(tmp_path, summary, STEPS)
    trace = read_trace(tmp_path)
    assert trace.summary == summary
    assert as_json(trace.steps) == as_json(STEPS)
    assert trace.removed() == (mha(3), mlp(1), mha(0))
    assert trace.removed(2) == (mha(3), mlp(1))
    assert set(trace.removed()) <= set(all_blocks(10))
