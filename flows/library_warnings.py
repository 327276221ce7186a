"""What the library and the stages log while a run is under way, said as the run's own warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flows.wording import one_line

_PACKAGES = ("blockpruner", "stages")


@contextmanager
def heard(warn: Callable[[str], None]) -> Iterator[None]:
    """Pass on, a line each, what is logged as a warning or worse while the body runs.

    Without it Python would print it bare; or nobody would hear of it, where Prefect has the root logger and is quiet.
    Where Prefect is not, its console would say it a second time: the root logger hears nothing of it meanwhile.
    """
    handler = _Handler(warn)
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = not any(isinstance(other, _Handler) for other in logger.handlers)


class _Handler(logging.Handler):
    def __init__(self, warn: Callable[[str], None]) -> None:
        super().__init__()
        self._warn = warn

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, if it is a warning or worse, and leave what is less to the root logger.

        Where it cannot be said that way, print it bare: nothing that a log says may end the work.
        """
        if record.levelno < logging.WARNING:
            logging.getLogger().callHandlers(record)
            return
        try:
            self._warn(one_line(record.getMessage()))
        except Exception:  # noqa: BLE001  # whatever the terminal or Prefect makes of it
            if logging.lastResort is not None:
                logging.lastResort.handle(record)
