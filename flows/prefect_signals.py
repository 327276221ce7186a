"""SIGTERM while a flow runs: Prefect has a handler of its own then, and what that raises is taken note of here.

Prefect asks whether the handler in force is its own before it takes an order to cancel, so that no other can be put
over it; what is put in its place here is what Prefect calls its own from then on. Its name is private: look again when
Prefect is upgraded, and `test_prefect_signals` does. Knows no flow.
"""

from __future__ import annotations

import flows.prefect_settings  # noqa: F401  # isort: skip  # before Prefect is imported

from prefect.utilities import engine

from flows.interruptions import INTERRUPTIONS

_PREFECTS = engine._prefect_sigterm_handler


def take_note_of_prefects_signals() -> None:
    """From the next flow on."""
    engine._prefect_sigterm_handler = INTERRUPTIONS.noted(_PREFECTS)
