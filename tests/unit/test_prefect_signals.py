"""SIGTERM while Prefect's handler is in force, which raises Prefect's error: it is an interruption whatever follows."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
from prefect.exceptions import TerminationSignal
from prefect.utilities.engine import can_ack_control_intent, capture_sigterm
from pydantic import BaseModel, model_serializer
from pydantic_core import PydanticSerializationError

from flows.interruptions import INTERRUPTIONS, Terminated
from flows.prefect_signals import take_note_of_prefects_signals


class Reported(BaseModel):
    """What Prefect's client puts into words when the signal comes."""

    @model_serializer
    def in_words(self) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return ""


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    take_note_of_prefects_signals()
    with INTERRUPTIONS.watched():
        yield


def test_prefect_goes_on_taking_orders_to_cancel() -> None:
    with capture_sigterm():
        assert can_ack_control_intent()


def test_one_that_became_an_error_of_native_code_is_what_it_was() -> None:
    with capture_sigterm():
        with pytest.raises(PydanticSerializationError):
            Reported().model_dump_json()
        with pytest.raises(TerminationSignal), INTERRUPTIONS.kept():
            raise ValueError("what became of it")
        with pytest.raises(TerminationSignal), INTERRUPTIONS.kept():
            Reported().model_dump_json()
    assert isinstance(INTERRUPTIONS.received, Terminated)


def test_prefect_gives_it_on_to_the_handler_before() -> None:
    with pytest.raises(Terminated), capture_sigterm(), INTERRUPTIONS.kept():
        Reported().model_dump_json()


def test_one_that_was_dropped_is_heeded_later() -> None:
    with capture_sigterm():
        with contextlib.suppress(TerminationSignal):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TerminationSignal):
            INTERRUPTIONS.heed()
