"""What the library logs is heard, whoever has the root logger."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
from prefect.exceptions import MissingContextError

from flows import prune_flow
from flows.library_warnings import heard

LIBRARY = logging.getLogger("blockpruner.scoring.sweep")


def test_warnings_of_our_packages_are_passed_on_a_line_each_while_the_body_runs() -> None:
    said: list[str] = []
    with heard(said.append):
        LIBRARY.warning("the device is out of\nmemory: %d left", 3)
        LIBRARY.info("a detail")
        logging.getLogger("stages.ray_crew").error("a worker was lost")
        logging.getLogger("torch").warning("not ours")
    LIBRARY.warning("too late")
    assert said == ["the device is out of memory: 3 left", "a worker was lost"]


def test_an_error_in_the_body_ends_it_too() -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="body"), heard(said.append):
        raise ValueError("body")
    LIBRARY.warning("too late")
    assert said == []


def test_nobody_else_says_them_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    """As the console that Prefect gives a worker's root logger would."""
    said: list[str] = []
    with heard(said.append):
        with heard(said.append):
            LIBRARY.warning("twice")
        LIBRARY.warning("once")
    assert said == ["twice", "twice", "once"]
    assert caplog.text == ""
    with heard(said.append), caplog.at_level(logging.DEBUG, logger="blockpruner"):
        LIBRARY.debug("a detail")
    assert said == ["twice", "twice", "once"]
    assert "a detail" in caplog.text
    LIBRARY.warning("to the root")
    assert "to the root" in caplog.text


def test_a_warning_that_cannot_be_said_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(line: str) -> None:
        raise RuntimeError("no flow run")

    with heard(broken):
        LIBRARY.warning("memory is short")
    assert "memory is short" in capsys.readouterr().err


def test_a_flow_hears_of_them_from_a_thread_without_prefects_context(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    of_the_flow = SimpleNamespace(info=lambda form, line: said.append(form % line))
    here = threading.get_ident()

    def run_logger() -> SimpleNamespace:
        if threading.get_ident() != here:
            raise MissingContextError
        return of_the_flow

    monkeypatch.setattr(prune_flow, "get_run_logger", run_logger)
    monkeypatch.setattr(prune_flow, "is_quiet", lambda: False)
    with heard(prune_flow.LoggingReporter().warn):
        thread = threading.Thread(target=LIBRARY.warning, args=("going on without our kernel",))
        thread.start()
        thread.join()
        LIBRARY.warning("and from here")
    assert said == ["Warning: going on without our kernel", "Warning: and from here"]
