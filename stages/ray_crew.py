"""The crew of a search as Ray's actors: placed, introduced, made ready, replaced when they are lost.

Knows processes and machines, and no score. It never waits for one worker where another could go on: everything that is
under way is waited for at once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from torch import Tensor

from blockpruner.errors import ConfigurationError, ExecutorError
from blockpruner.scoring.micro_batches import BatchRequest, Refused
from blockpruner.scoring.plan import SweepCut, Team
from blockpruner.scoring.spread import Answered, Event, Joined, Lost
from stages.ray_worker import Introduction, Place, Prepared, RayWorker, software
from stages.search_scorer import ScoringJob

logger = logging.getLogger(__name__)

_PLACE_S = 120.0
"""For a worker to be placed and its process to start, importing torch on a busy machine included."""
_GLANCE_S = 1.0
"""Between two looks at the clock while nothing happens."""
_MOST_FALSE_STARTS = 3
"""Workers in a row that end before they are ready."""


@dataclass(frozen=True)
class Share:
    """How many workers there are, and what each has."""

    num_workers: int
    num_cpus: int
    num_gpus: int

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, float]], device: str, num_workers: int | None) -> Share:
        """Divide a cluster.

        Args:
            nodes: the resources of each machine, as Ray counts them ("CPU", "GPU").
            device: 'cuda' or 'cpu'.
            num_workers: as asked for; None: one for each GPU, or on CPUs for each machine.

        Raises:
            ConfigurationError: if there are fewer GPUs or CPUs than workers.
        """
        unit = "GPU" if device.startswith("cuda") else "CPU"
        counts = [int(node.get(unit, 0)) for node in nodes]
        wanted = num_workers or (sum(counts) if unit == "GPU" else sum(count > 0 for count in counts))
        if not 0 < wanted <= sum(counts):
            raise ConfigurationError(
                f"{max(1, wanted)} workers need as many {unit}s, and Ray has {sum(counts)} on {len(counts)} machines; "
                "give fewer --workers, or add machines with `ray start --address`"
            )
        if unit == "GPU":
            return cls(wanted, 1, 1)
        # As many CPUs each as let that many workers find a place.
        each = next(size for size in range(max(counts), 0, -1) if sum(count // size for count in counts) >= wanted)
        return cls(wanted, each, 0)


@dataclass
class _Member:
    name: str
    actor: Any
    since: float
    state: Literal["arriving", "loading", "ready"] = "arriving"
    node: str = ""


@dataclass(frozen=True)
class _Gone:
    """A worker's process, or what it ran in, is no more."""

    reason: str


class RayCrew:
    """See `blockpruner.scoring.spread.Crew`. `assemble` comes first, `close` last."""

    def __init__(
        self,
        ray: Any,
        job: ScoringJob,
        token_ids_BT: Tensor,
        share: Share,
        environment: Mapping[str, str] | None = None,
        has_died: Callable[[], bool] = lambda: False,
    ) -> None:
        """Let `share` workers of a connected Ray score the calibration set [B, T].

        `environment` has variables for the workers' processes, beside what these have from whoever started Ray.
        `has_died` says that Ray itself is no more; it is asked every second.
        """
        self._ray, self._job, self._share = ray, job, share
        _ = job.model.fingerprint  # goes with the job: what a worker would read is its own files, which it compares
        self._environment = {"runtime_env": {"env_vars": dict(environment)}} if environment else {}
        self._has_died = has_died
        self._token_ids = ray.put(token_ids_BT)
        self._actor_class = ray.remote(RayWorker)
        self._members: dict[str, _Member] = {}
        self._under_way: dict[Any, _Member] = {}
        self._cut: SweepCut | None = None
        self._num_hired = self._false_starts = 0
        self.peak: float | None = None
        """Operations a second of all workers' matrix products together, if measured."""

    @property
    def workers(self) -> tuple[str, ...]:
        """See `Crew.workers`."""
        return tuple(member.name for member in self._members.values() if member.state == "ready")

    def assemble(self, cut_of: Callable[[str], SweepCut | None]) -> tuple[str, SweepCut]:
        """Have the workers placed and made ready, and agree on a cut: what a search was begun with, or what all can do.

        Args:
            cut_of: the cut so far for a purpose, if there is one.

        Returns:
            The purpose that the cut is for, and the cut.

        Raises:
            ConfigurationError: if a worker cannot do it.
            ExecutorError: if none can be placed.
        """
        for _ in range(self._share.num_workers):
            self._hire()
        found = self._introductions()
        purposes = Counter(each.purpose for each in found.values())
        purpose = purposes.most_common(1)[0][0]
        if len(purposes) > 1:
            logger.warning(
                "the workers' devices differ (%s): the last bits of a score depend on who computes it",
                "; ".join(sorted(purposes)),
            )
        self._cut = cut_of(purpose)
        for name in found:
            self._prepare(self._members[name])
        ready = self._prepared()
        peaks = [each.peak for each in ready]
        self.peak = sum(peak for peak in peaks if peak) if all(peaks) else None
        self._cut = reduce(SweepCut.within, (each.cut for each in ready))
        return purpose, self._cut

    def give(self, worker: str, request: BatchRequest) -> None:
        """See `Crew.give`."""
        member = self._members[worker]
        self._cut = request.cut
        self._under_way[member.actor.score.remote(request)] = member

    def next_event(self) -> Event:
        """See `Crew.next_event`."""
        while True:
            self._require_hope()
            member, result = self._next_result()
            if member is None:
                continue
            if member.state == "ready":
                if not isinstance(result, _Gone):
                    return Answered(member.name, result)
                self._replace(member)
                return Lost(member.name, result.reason)
            if event := self._advanced(member, result):
                return event

    def close(self) -> None:
        """End all workers."""
        for member in self._members.values():
            self._end(member)
        self._members.clear()
        self._under_way.clear()

    def _hire(self) -> None:
        self._num_hired += 1
        options: dict[str, Any] = {
            "num_cpus": self._share.num_cpus,
            "num_gpus": self._share.num_gpus,
            "scheduling_strategy": "SPREAD",
        }
        options |= {"max_restarts": 0, "max_task_retries": 0, **self._environment}
        actor = self._actor_class.options(**options).remote()
        member = _Member(f"worker {self._num_hired}", actor, time.monotonic())
        self._members[member.name] = member
        self._under_way[actor.introduce.remote(self._job.device, self._job)] = member

    def _prepare(self, member: _Member) -> None:
        """Let a placed worker load the model."""
        member.state = "loading"
        nodes = Counter(each.node for each in self._members.values())
        place = Place(
            team=Team(self._share.num_workers, nodes[member.node]),
            num_threads=self._share.num_cpus if not self._share.num_gpus else None,
            is_elsewhere=member.node != self._ray.get_runtime_context().get_node_id(),
        )
        self._under_way[member.actor.prepare.remote(self._job, self._token_ids, self._cut, place)] = member

    def _introductions(self) -> dict[str, Introduction]:
        """Those of all workers, or of those that are placed in time."""
        found: dict[str, Introduction] = {}
        while len(found) < len(self._members) and not (found and self._are_late()):
            self._require_hope()
            member, result = self._next_result()
            if member is not None and self._is_good(member, result):
                found[member.name] = self._placed(member, result)
        if len(found) < self._share.num_workers:
            logger.warning(
                "%d of %d workers found a place; the search begins with them, and others join when they find one",
                len(found),
                self._share.num_workers,
            )
        return found

    def _prepared(self) -> list[Prepared]:
        """What those that are loading can do."""
        ready: list[Prepared] = []
        while any(member.state == "loading" for member in self._members.values()) or not ready:
            self._require_hope()
            member, result = self._next_result()
            if member is None or not self._is_good(member, result):
                continue
            if isinstance(result, Prepared):
                member.state, self._false_starts = "ready", 0
                ready.append(result)
            else:  # in the place of one that was lost meanwhile
                self._placed(member, result)
                self._prepare(member)
        return ready

    def _placed(self, member: _Member, result: Introduction) -> Introduction:
        if result.software != software():
            raise ConfigurationError(
                f"a worker has {', '.join(result.software)}, and here is {', '.join(software())}; install the same "
                "versions on all machines (`pip install -c constraints.txt`)"
            )
        member.node = result.node
        return result

    def _is_good(self, member: _Member, result: Any) -> bool:
        """Whether a worker has come a step further; if it is lost, another is hired.

        Raises:
            ConfigurationError: if it says why it cannot.
        """
        if isinstance(result, Refused):
            raise ConfigurationError(result.reason)
        if isinstance(result, _Gone):
            self._false_start(member, result.reason)
        return not isinstance(result, _Gone)

    def _advanced(self, member: _Member, result: Any) -> Event | None:
        """A worker that comes late has come a step further, or not: without it the others go on."""
        match result:
            case Introduction():
                try:
                    self._placed(member, result)
                except ConfigurationError as error:
                    self._dismiss(member, str(error))
                else:
                    self._prepare(member)
            case Prepared():
                member.state, self._false_starts = "ready", 0
                return Joined(member.name)
            case Refused(reason):
                self._dismiss(member, reason)
            case _Gone(reason):
                self._false_start(member, reason)
        return None

    def _false_start(self, member: _Member, reason: str) -> None:
        self._false_starts += 1
        if self._false_starts >= _MOST_FALSE_STARTS:
            self._dismiss(member, f"{self._false_starts} in a row ended before they were ready, the last: {reason}")
        else:
            self._replace(member)

    def _replace(self, member: _Member) -> None:
        """Ray places the new one where there is room, now or when there is."""
        self._end(self._members.pop(member.name))
        self._hire()

    def _dismiss(self, member: _Member, reason: str) -> None:
        logger.warning("the search goes on with a worker less: %s", reason)
        self._end(self._members.pop(member.name))

    def _end(self, member: _Member) -> None:
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(member.actor, no_restart=True)

    def _are_late(self) -> bool:
        """Whether a worker has waited for its place for too long."""
        waiting = [member.since for member in self._members.values() if member.state == "arriving" and not member.node]
        return any(time.monotonic() - since > _PLACE_S for since in waiting)

    def _require_hope(self) -> None:
        """Make sure that there is a worker, or may be one.

        Raises:
            ExecutorError: if there is none.
        """
        if self._has_died():
            raise ExecutorError(
                "Ray on this machine has ended: it was killed, or there was too little memory. What was finished is "
                "kept: give the same command again, with any executor"
            )
        placed = any(member.state != "arriving" or member.node for member in self._members.values())
        if placed or (self._members and not self._are_late()):
            return
        raise ExecutorError(
            f"no worker is left, and none found a place within {_PLACE_S:.0f} s; see `ray status` for what is free. "
            "What was finished is kept: give the same command again, with any executor"
        )

    def _next_result(self) -> tuple[_Member | None, Any]:
        """The next thing that is done, and who did it; (None, None) after a moment without."""
        done, _ = self._ray.wait(list(self._under_way), num_returns=1, timeout=_GLANCE_S)
        if not done:
            return None, None
        member = self._under_way.pop(done[0])
        try:
            return member, self._ray.get(done[0])
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, RuntimeError | OSError):  # of a device, a driver or a disk
                raise
            return member, _Gone(_one_line(error.cause))
        except self._ray.exceptions.RayError as error:
            return member, _Gone(_one_line(error))


def _one_line(error: BaseException) -> str:
    """The first sentence of what may be a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'without a reason'}"
