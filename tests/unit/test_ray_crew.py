"""The crew over a Ray that is played: who is hired, lost, replaced or dismissed, and which cut is agreed on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import stages.ray_crew
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError, ExecutorError
from blockpruner.scoring.micro_batches import BatchRequest, Refused
from blockpruner.scoring.plan import SweepCut
from blockpruner.scoring.spread import Answered, Joined, Lost
from stages.ray_crew import RayCrew, Share
from stages.ray_worker import Introduction, Place, Prepared, software
from stages.search_scorer import ScoringJob
from tests.tiny_models import tiny_token_ids

JOB = ScoringJob(Checkpoint("m", Path("m"), {}, {}), 4, 1, "float32", "perplexity", "cpu")
HERE = Introduction("node 0", "cpu", software())
CUT = SweepCut(micro_batch=4, branches_per_chunk=8, logit_elements=1000)
REQUEST = BatchRequest(CUT, 0, 4)


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__("a page\nof traceback")
        self.cause = cause


@dataclass(eq=False)
class Script:
    """What one actor's calls come to: a value, or an error to raise; None: never."""

    introduce: Any = HERE
    prepare: Any = field(default_factory=lambda: Prepared(CUT, 2.0))
    score: Any = "scores"


class PlayedRay:
    """As much of Ray as the crew uses. Each actor that is hired follows the next script; calls end in their order."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.hired: list[Script] = []
        self.killed: list[Script] = []
        self.options_given: dict[str, Any] = {}
        self.places: list[tuple[SweepCut | None, Place]] = []

    def put(self, value: object) -> object:
        return value

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "node 0")

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=self._options)

    def _options(self, **options: Any) -> Any:
        self.options_given = options
        return SimpleNamespace(remote=self._hire)

    def _hire(self) -> Any:
        script = self._scripts.pop(0) if self._scripts else Script(introduce=None)
        self.hired.append(script)

        def call(name: str) -> Any:
            def remote(*arguments: Any) -> Any:
                if name == "prepare":
                    self.places.append((arguments[2], arguments[3]))
                return (script, name, object())

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(script=script, **{name: call(name) for name in ("introduce", "prepare", "score")})

    def kill(self, actor: Any, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor.script)

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert refs
        assert num_returns == 1
        assert timeout > 0
        done = [ref for ref in refs if getattr(ref[0], ref[1]) is not None][:1]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: Any) -> Any:
        value = getattr(ref[0], ref[1])
        if isinstance(value, Exception):
            raise value
        return value


def crew_of(*scripts: Script, num_workers: int | None = None) -> tuple[RayCrew, PlayedRay]:
    ray = PlayedRay(*scripts)
    return RayCrew(ray, JOB, tiny_token_ids(8, 4), Share(num_workers or len(scripts), 2, 0)), ray


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds pass with every look."""
    now = iter(range(0, 10**6, 10))
    monkeypatch.setattr(stages.ray_crew.time, "monotonic", lambda: next(now))


def no_cut(_: str) -> None:
    return None


@pytest.mark.parametrize(
    ("nodes", "device", "asked", "expected"),
    [
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}], "cuda", None, Share(6, 1, 1)),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}], "cuda", 3, Share(3, 1, 1)),
        ([{"CPU": 8.0}, {"CPU": 8.0}, {}], "cpu", None, Share(2, 8, 0)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], "cpu", 3, Share(3, 4, 0)),
        ([{"CPU": 8.0}, {"CPU": 3.0}], "cpu", 4, Share(4, 2, 0)),
        ([{"CPU": 8.0}, {"CPU": 3.0}], "cpu", 2, Share(2, 4, 0)),
        ([{"CPU": 2.0}], "cpu", 2, Share(2, 1, 0)),
    ],
)
def test_a_cluster_is_divided(nodes: list[dict[str, float]], device: str, asked: int | None, expected: Share) -> None:
    assert Share.of(nodes, device, asked) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "asked", "said"),
    [
        ([{"CPU": 8.0, "GPU": 1.0}], "cuda", 2, "2 workers need as many GPUs, and Ray has 1 on 1 machines"),
        ([{"CPU": 8.0}], "cuda", None, "1 workers need as many GPUs, and Ray has 0"),
        ([{"CPU": 2.0}, {"CPU": 2.0}], "cpu", 5, "5 workers need as many CPUs, and Ray has 4 on 2 machines"),
    ],
)
def test_more_workers_than_devices_are_refused(
    nodes: list[dict[str, float]], device: str, asked: int | None, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Share.of(nodes, device, asked)


def test_the_smallest_cut_of_all_is_agreed_on() -> None:
    small = SweepCut(micro_batch=2, branches_per_chunk=16, logit_elements=1000)
    elsewhere = Introduction("node 1", "cpu", software())
    crew, ray = crew_of(Script(), Script(prepare=Prepared(small, 3.0)), Script(introduce=elsewhere))
    assert crew.assemble(no_cut) == ("cpu", SweepCut(micro_batch=2, branches_per_chunk=8, logit_elements=1000))
    assert len(crew.workers) == 3
    assert crew.peak == 7.0
    assert sorted((place.team.num_on_machine, place.is_elsewhere) for _, place in ray.places) == [
        (1, True),
        (2, False),
        (2, False),
    ]
    assert {place.team.num_workers for _, place in ray.places} == {3}
    assert ray.options_given["max_restarts"] == 0
    crew.close()
    assert len(ray.killed) == 3


def test_the_cut_that_a_search_was_begun_with_goes_before() -> None:
    crew, ray = crew_of(Script(), Script())
    begun = SweepCut(micro_batch=1, branches_per_chunk=1, logit_elements=7)
    crew.assemble(lambda purpose: begun if purpose == "cpu" else None)
    assert [cut for cut, _ in ray.places] == [begun, begun]


def test_a_lost_worker_is_replaced_and_the_new_one_joins() -> None:
    crew, ray = crew_of(
        Script(score=RayError("the actor died\nwith all that it had.")), Script(), Script(), num_workers=2
    )
    crew.assemble(no_cut)
    first, second = crew.workers
    crew.give(first, REQUEST)
    crew.give(second, REQUEST)
    assert crew.next_event() == Lost(first, "RayError: the actor died")
    assert crew.workers == (second,)
    assert crew.next_event() == Answered(second, "scores")
    event = crew.next_event()
    assert event == Joined("worker 3")
    assert crew.workers == (second, "worker 3")
    assert ray.places[-1][0] == CUT
    assert ray.killed == ray.hired[:1]


def test_the_others_go_on_where_a_lost_worker_finds_no_place() -> None:
    crew, _ = crew_of(Script(score=RayError("gone")), Script(), Script(introduce=None), num_workers=2)
    crew.assemble(no_cut)
    first, second = crew.workers
    crew.give(first, REQUEST)
    assert isinstance(crew.next_event(), Lost)
    for _ in range(10):
        crew.give(second, REQUEST)
        assert crew.next_event() == Answered(second, "scores")


def test_no_worker_left_and_none_to_come_is_one_clear_line() -> None:
    crew, _ = crew_of(Script(score=RayError("gone")), num_workers=1)
    crew.assemble(no_cut)
    crew.give(crew.workers[0], REQUEST)
    assert isinstance(crew.next_event(), Lost)
    with pytest.raises(ExecutorError, match=r"no worker is left, .* give the same command again"):
        crew.next_event()


def test_a_ray_that_has_ended_is_one_clear_line_at_once() -> None:
    """Before Ray notices, for then it ends this process."""
    ray, alive = PlayedRay(Script()), [True]
    crew = RayCrew(ray, JOB, tiny_token_ids(8, 4), Share(1, 2, 0), has_died=lambda: not alive)
    crew.assemble(no_cut)
    crew.give(crew.workers[0], REQUEST)
    alive.clear()
    with pytest.raises(ExecutorError, match=r"Ray on this machine has ended: .* give the same command again"):
        crew.next_event()


def test_a_search_begins_with_those_that_found_a_place(caplog: pytest.LogCaptureFixture) -> None:
    late = Script(introduce=None)
    crew, _ = crew_of(Script(), late)
    with caplog.at_level(logging.WARNING):
        crew.assemble(no_cut)
    assert "1 of 2 workers found a place" in caplog.text
    late.introduce = HERE
    assert crew.next_event() == Joined("worker 2")


def test_none_that_finds_a_place_is_said() -> None:
    crew, _ = crew_of(Script(introduce=None), Script(introduce=None))
    with pytest.raises(ExecutorError, match="none found a place within 120 s"):
        crew.assemble(no_cut)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (Script(introduce=Refused("device 'cuda' is not on this machine")), "device 'cuda' is not on this machine"),
        (Script(prepare=Refused("too little memory")), "too little memory"),
        (
            Script(introduce=Introduction("node 1", "cpu", ("torch 1.0",))),
            "a worker has torch 1.0, and here is",
        ),
    ],
)
def test_what_a_worker_cannot_do_is_said_at_the_start_and_passed_over_later(
    script: Script, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    crew, ray = crew_of(Script(), script)
    with pytest.raises(ConfigurationError, match=said):
        crew.assemble(no_cut)
    crew.close()
    assert len(ray.killed) == 2
    crew, ray = crew_of(Script(score=RayError("gone")), Script(), script, num_workers=2)
    crew.assemble(no_cut)
    first, second = crew.workers
    crew.give(first, REQUEST)
    assert isinstance(crew.next_event(), Lost)
    with caplog.at_level(logging.WARNING):
        crew.give(second, REQUEST)
        assert crew.next_event() == Answered(second, "scores")
        crew.give(second, REQUEST)
        assert crew.next_event() == Answered(second, "scores")
        _until(crew, second, lambda: "a worker less" in caplog.text)
    assert said in caplog.text


def _until(crew: RayCrew, worker: str, holds: Callable[[], bool]) -> None:
    for _ in range(10):
        if holds():
            return
        crew.give(worker, REQUEST)
        crew.next_event()
    raise AssertionError("never")


def test_workers_that_end_before_they_begin_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Three of them; a loop of deaths would have no end."""
    broken = [Script(prepare=RayError("killed for its memory")) for _ in range(9)]
    crew, ray = crew_of(*broken, num_workers=1)
    with caplog.at_level(logging.WARNING), pytest.raises(ExecutorError, match="no worker is left"):
        crew.assemble(no_cut)
    assert len(ray.hired) == 3
    assert "3 in a row ended before they were ready, the last: RayError: killed for its memory" in caplog.text


def test_false_starts_before_a_worker_that_was_ready_are_forgotten() -> None:
    """Two at the beginning and one hours later are not three in a row."""
    ends = [Script(prepare=RayError("killed")) for _ in range(3)]
    crew, ray = crew_of(ends[0], ends[1], Script(score=RayError("gone")), ends[2], Script(), num_workers=1)
    crew.assemble(no_cut)
    crew.give(crew.workers[0], REQUEST)
    assert isinstance(crew.next_event(), Lost)
    assert isinstance(crew.next_event(), Joined)
    assert len(ray.hired) == 5


def test_a_failing_device_is_a_lost_worker_and_a_defect_is_a_defect() -> None:
    crew, _ = crew_of(Script(score=RayTaskError(RuntimeError("CUDA error: uncorrectable ECC error"))), num_workers=1)
    crew.assemble(no_cut)
    crew.give(crew.workers[0], REQUEST)
    event = crew.next_event()
    assert isinstance(event, Lost)
    assert event.reason == "RuntimeError: CUDA error: uncorrectable ECC error"
    crew, _ = crew_of(Script(score=RayTaskError(TypeError("ours"))), num_workers=1)
    crew.assemble(no_cut)
    crew.give(crew.workers[0], REQUEST)
    with pytest.raises(RayTaskError):
        crew.next_event()


def test_devices_that_differ_are_said(caplog: pytest.LogCaptureFixture) -> None:
    crew, _ = crew_of(Script(), Script(introduce=Introduction("node 1", "another GPU", software())), Script())
    with caplog.at_level(logging.WARNING):
        assert crew.assemble(no_cut)[0] == "cpu"
    assert "the workers' devices differ (another GPU; cpu)" in caplog.text
