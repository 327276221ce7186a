"""What the library logs is heard, whoever has the root logger."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest

from flows import library_warnings, prefect_settings
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


@pytest.mark.parametrize("is_quiet", [True, False])
def test_where_prefect_speaks_it_says_them_itself(is_quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect", ModuleType("prefect"))
    monkeypatch.setattr(library_warnings, "is_quiet", lambda: is_quiet)
    said: list[str] = []
    with heard(said.append):
        LIBRARY.warning("twice is too often")
    assert said == (["twice is too often"] if is_quiet else [])


def test_quiet_is_what_the_command_line_makes_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", raising=False)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    assert not prefect_settings.is_quiet()
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    assert prefect_settings.is_quiet()
