"""The spread scorer over workers in this process, some of which fail: bit for bit what one scorer alone gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.errors import ConfigurationError, ExecutorError
from blockpruner.scoring.layer_measures import block_influence, relative_magnitude
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.micro_batches import BatchRequest, BatchScores, Reply, TooLittleMemory, answer
from blockpruner.scoring.plan import SweepCut
from blockpruner.scoring.settings import MetricName
from blockpruner.scoring.spread import MOST_LOSSES, Answered, Event, Joined, Lost, SpreadScorer
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter
from tests.scorers import filled, row_of, sweep_scorer
from tests.tiny_models import tiny_model, tiny_token_ids

TOKENS = tiny_token_ids(7, 12, seed=1)
REMOVALS = (mlp(3), mha(2), mlp(1), mha(3))


class ThreadlessCrew:
    """Workers that compute when they are waited for, in an order that is drawn; `fate` may kill one instead."""

    def __init__(
        self,
        make: Callable[[], SweepScorer],
        num_workers: int,
        *,
        seed: int = 0,
        fate: Callable[[str, BatchRequest], bool] = lambda *_: False,
        replaced: bool = True,
    ) -> None:
        self._make, self._draw, self._fate, self._replaced = make, random.Random(seed), fate, replaced
        self.scorers: dict[str, SweepScorer] = {f"worker {number}": make() for number in range(num_workers)}
        self.given: list[tuple[str, BatchRequest]] = []
        self._open: dict[str, BatchRequest] = {}
        self._news: list[Event] = []
        self._num_hired = num_workers

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(self.scorers)

    def give(self, worker: str, request: BatchRequest) -> None:
        assert worker in self.scorers, "a worker that is not there"
        assert worker not in self._open, "a worker that is busy"
        self._open[worker] = request
        self.given.append((worker, request))

    def next_event(self) -> Event:
        if self._news:
            return self._news.pop(0)
        if not self.scorers:
            raise ExecutorError("no worker is left")
        assert self._open, "nobody computes: the step would never end"
        worker = self._draw.choice(sorted(self._open))
        request = self._open.pop(worker)
        if self._fate(worker, request):
            del self.scorers[worker]
            if self._replaced:
                self._num_hired += 1
                newcomer = f"worker {self._num_hired}"
                self.scorers[newcomer] = self._make()
                self._news.append(Joined(newcomer))
            return Lost(worker, "killed")
        return Answered(worker, self.compute(worker, request))

    def compute(self, worker: str, request: BatchRequest) -> Reply:
        return answer(self.scorers[worker], request)


def spread(crew: ThreadlessCrew, metric: MetricName = "perplexity", **more: object) -> SpreadScorer:
    cut = next(iter(crew.scorers.values())).plan.cut
    return SpreadScorer(crew, len(TOKENS), 4, metric_of(metric), cut, Meter(), **more)  # type: ignore[arg-type]


def search_tables(scorer: SweepScorer | SpreadScorer) -> list[ScoreTable]:
    """The tables of some steps of one search."""
    removed: list[Block] = []
    tables = []
    for block in REMOVALS:
        tables.append(filled(scorer, removed, [each for each in all_blocks(4) if each not in removed]))
        removed.append(block)
    return tables


def assert_same_bits(tables: list[ScoreTable], expected: list[ScoreTable]) -> None:
    for table, other in zip(tables, expected, strict=True):
        assert table.candidates == other.candidates
        assert torch.equal(table.nll_CB, other.nll_CB)
        assert torch.equal(table.divergence_CB.nan_to_num(-1.0), other.divergence_CB.nan_to_num(-1.0))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.mark.parametrize("metric", ["perplexity", "kl", "js"])
@pytest.mark.parametrize("snapshot_bytes", [0, 30_000, 10**9])
@pytest.mark.parametrize("num_workers", [1, 3, 6])
def test_workers_together_give_the_bits_of_one_scorer(
    model: PreTrainedModel, metric: MetricName, snapshot_bytes: int, num_workers: int
) -> None:
    def make() -> SweepScorer:
        return sweep_scorer(model, TOKENS, metric, snapshot_bytes=snapshot_bytes)

    alone, crew = make(), ThreadlessCrew(make, num_workers, seed=num_workers)
    together = spread(crew, metric)
    assert torch.equal(together.dense_nll(), alone.dense_nll())
    assert_same_bits(search_tables(together), search_tables(alone))
    assert together.meter.tokens == alone.meter.tokens
    assert (together.meter.flops_saved > 0) == (snapshot_bytes > 0)
    if num_workers == 1:  # who has all micro-batches keeps the very same snapshots
        assert together.meter.flops_saved == alone.meter.flops_saved
        assert together.meter.flops == alone.meter.flops
    assert {worker for worker, _ in crew.given} == set(sorted(crew.workers)[:4])  # there are four micro-batches


@pytest.mark.parametrize("block", [mha(1), mlp(3)])
def test_a_worker_keeps_snapshots_where_the_next_removal_is_expected(model: PreTrainedModel, block: Block) -> None:
    others = tuple(each for each in all_blocks(4) if each != block)
    stream_bytes = TOKENS.numel() * 32 * 4  # of hidden states [B, T, D] in float32
    saved = []
    for ranking in ((block, *others), (*others, block)):
        scorer = sweep_scorer(model, TOKENS, micro_batch=len(TOKENS), snapshot_bytes=8 * stream_bytes)
        for removed, candidates in (((), all_blocks(4)), ((block,), others)):
            request = BatchRequest(scorer.plan.cut, 0, len(TOKENS), removed, candidates, ranking)
            answered = answer(scorer, request)
        assert isinstance(answered, BatchScores)
        saved.append(answered.flops_saved)
    assert saved[0] > saved[1]


@pytest.mark.parametrize("seed", range(3))
def test_what_other_strategies_ask_for_is_spread_as_well(model: PreTrainedModel, seed: int) -> None:
    """The perplexity of one pruned model, measures of layers, and scores of whole layers; with workers that die."""

    def make() -> SweepScorer:
        return sweep_scorer(model, TOKENS, "kl", snapshot_bytes=30_000, whole_layers=True)

    draw = random.Random(seed)
    together = spread(ThreadlessCrew(make, 3, seed=seed, fate=lambda *_: draw.random() < 0.1), "kl")
    alone = make()
    for removed in ((), (mha(1), mlp(1))):
        assert torch.equal(together.nll_without(removed), alone.nll_without(removed))
    for measure in (block_influence, relative_magnitude):
        measured_LB = together.measure_layers(measure)
        assert measured_LB.shape == (4, len(TOKENS))
        assert torch.equal(measured_LB, alone.measure_layers(measure))
    layers = [mha(0), mha(2), mha(3)]
    removed = (mha(1), mlp(1))
    table, expected = (filled(scorer, removed, layers) for scorer in (together, alone))
    assert_same_bits([table], [expected])


def test_a_worker_is_given_the_micro_batches_whose_snapshots_it_has(model: PreTrainedModel) -> None:
    """Also where the number of micro-batches is no multiple of the workers'; so the work saved is that of one."""

    def make() -> SweepScorer:
        return sweep_scorer(model, TOKENS, snapshot_bytes=10**9)

    alone, crew = make(), ThreadlessCrew(make, 3, seed=5)
    together = spread(crew)
    search_tables(alone)
    search_tables(together)
    homes = {(request.start, worker) for worker, request in crew.given}
    assert len(homes) == 4
    assert together.meter.flops == alone.meter.flops


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
@pytest.mark.parametrize("seed", range(4))
def test_lost_workers_change_no_bit(model: PreTrainedModel, metric: MetricName, seed: int) -> None:
    def make() -> SweepScorer:
        return sweep_scorer(model, TOKENS, metric, snapshot_bytes=30_000)

    draw = random.Random(seed)
    deaths = []

    def fate(worker: str, request: BatchRequest) -> bool:
        dies = draw.random() < 0.3 and request.start not in deaths[-2:]
        deaths.extend([request.start] * dies)
        return dies

    together = spread(ThreadlessCrew(make, 3, seed=seed, fate=fate), metric)
    tables = search_tables(together)
    assert len(deaths) > 2
    assert_same_bits(tables, search_tables(make()))


def test_the_others_go_on_where_a_lost_worker_is_not_replaced(model: PreTrainedModel) -> None:
    def make() -> SweepScorer:
        return sweep_scorer(model, TOKENS, snapshot_bytes=10**9)

    crew = ThreadlessCrew(make, 3, fate=lambda worker, request: worker != "worker 0", replaced=False)
    assert_same_bits(search_tables(spread(crew)), search_tables(make()))
    assert crew.workers == ("worker 0",)


def test_a_micro_batch_that_takes_every_worker_with_it_is_said_and_ends_the_search(model: PreTrainedModel) -> None:
    crew = ThreadlessCrew(lambda: sweep_scorer(model, TOKENS), 2, fate=lambda _, request: request.start == 4)
    with pytest.raises(ExecutorError, match=f"{MOST_LOSSES} workers in a row .* sequences 4 to 5; the last: killed"):
        filled(spread(crew), (), all_blocks(4))
    assert sum(request.start == 4 for _, request in crew.given) == MOST_LOSSES


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_too_little_memory_of_one_worker_shrinks_the_cut_of_all(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, metric: MetricName
) -> None:
    expected = filled(sweep_scorer(model, TOKENS, metric), (), all_blocks(4))
    crew = ThreadlessCrew(lambda: sweep_scorer(model, TOKENS, metric, micro_batch=3, branches_per_chunk=1), 3)
    compute, shrunk = crew.compute, []

    def small(worker: str, request: BatchRequest) -> Reply:
        if worker == "worker 1" and request.cut.micro_batch > 1:
            return TooLittleMemory(replace_cut(request.cut))
        return compute(worker, request)

    monkeypatch.setattr(crew, "compute", small)
    scorer = spread(crew, metric, on_cut=shrunk.append)
    table = filled(scorer, (), all_blocks(4))
    torch.testing.assert_close(table.nll_CB, expected.nll_CB, rtol=0, atol=1e-5)
    torch.testing.assert_close(table.divergence_CB, expected.divergence_CB, rtol=0, atol=1e-5, equal_nan=True)
    assert [cut.micro_batch for cut in shrunk] == [1]
    assert scorer.cut == shrunk[0]
    removed = (mha(0),)
    again, alone = (
        filled(each, removed, all_blocks(4)[1:])
        for each in (scorer, sweep_scorer(model, TOKENS, metric, micro_batch=1, branches_per_chunk=1))
    )
    assert torch.equal(again.nll_CB, alone.nll_CB), "every worker has taken the new cut over"


def replace_cut(cut: SweepCut) -> SweepCut:
    return SweepCut.model_validate({**cut.model_dump(), "micro_batch": 1})


def test_what_a_worker_refuses_is_the_users_error(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    def no_device(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError("out of memory. Try less.")

    crew = ThreadlessCrew(lambda: sweep_scorer(model, TOKENS, micro_batch=1, branches_per_chunk=1), 2)
    scorer = spread(crew)
    monkeypatch.setattr(type(row_of(model).decoder_layers(model)[2]), "forward", no_device)
    with pytest.raises(ConfigurationError, match="--memory-budget"):
        filled(scorer, (), all_blocks(4))


def test_a_half_filled_table_is_completed_and_not_begun_anew(model: PreTrainedModel) -> None:
    candidates = all_blocks(4)
    whole = filled(sweep_scorer(model, TOKENS), (), candidates)
    table = ScoreTable.empty(candidates, len(TOKENS))
    table.fill(slice(None), slice(2, 4), whole.nll_CB[:, 2:4])
    crew = ThreadlessCrew(lambda: sweep_scorer(model, TOKENS), 2)
    done: list[int] = []
    spread(crew).fill((), table, lambda table: done.append(int(table.done_CB[0].sum())))
    assert torch.equal(table.nll_CB, whole.nll_CB)
    assert sorted(request.start for _, request in crew.given) == [0, 4, 6]
    assert len(done) == 3
    assert done[-1] == 7


def test_a_worker_that_comes_late_takes_a_share(model: PreTrainedModel) -> None:
    def make() -> SweepScorer:
        return sweep_scorer(model, TOKENS, snapshot_bytes=10**9)

    crew = ThreadlessCrew(make, 1)
    scorer = spread(crew)
    expected = make()
    candidates = all_blocks(4)
    assert torch.equal(filled(scorer, (), candidates).nll_CB, filled(expected, (), candidates).nll_CB)
    crew.scorers["late"] = make()
    after = (mha(0),), candidates[1:]
    assert torch.equal(filled(scorer, *after).nll_CB, filled(expected, *after).nll_CB)
    assert 1 <= sum(worker == "late" for worker, _ in crew.given) <= 2


def test_a_worker_keeps_snapshots_of_its_share_only(model: PreTrainedModel) -> None:
    """In the memory for all sequences' snapshots, a worker that has a quarter of them keeps more of each."""
    candidates, budget = all_blocks(4), 40_000
    kept = {}
    for num_workers in (1, 4):
        scorer = sweep_scorer(model, TOKENS, snapshot_bytes=budget, num_workers=num_workers)
        for start in (0, 2, 4):
            request = BatchRequest(scorer.plan.cut, start, start + 2, (), candidates)
            answer(scorer, request)
            if num_workers == 4:
                assert not scorer.snapshots.positions(start - 2, (), candidates)
        kept[num_workers] = len(scorer.snapshots.positions(4, (), candidates))
        assert scorer.snapshots.device_bytes <= budget
    assert kept[4] > kept[1]


def test_a_request_is_cut_as_it_says(model: PreTrainedModel) -> None:
    scorer = sweep_scorer(model, TOKENS, snapshot_bytes=10**9)
    cut = SweepCut(micro_batch=1, branches_per_chunk=2, logit_elements=2**12)
    reply = answer(scorer, BatchRequest(cut, 3, 4, (), all_blocks(4)))
    alone = sweep_scorer(model, TOKENS, micro_batch=1, branches_per_chunk=2)
    assert torch.equal(reply.nll_Cb[:, 0], filled(alone, (), all_blocks(4)).nll_CB[:, 3])  # type: ignore[union-attr]
    assert scorer.plan == replace(scorer.plan, cut=cut)
