"""Orders to end (SIGINT, SIGTERM, SIGHUP) as interruptions of the main thread that no library can lose.

What follows from an interruption need not show it: an import that is interrupted may fail with any error, native code
may put an error of its own in the interruption's place or go on without it, and a terminal that was closed takes no
line any more. What the user did counts, so that what was received is remembered, and whatever comes out of a piece of
work after that is the interruption itself.

Python drops one that is raised in a destructor or a callback of the garbage collector, and that is where a signal is
seen that comes while the collector is at work. Such a one is sent again.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN_AFTER_S = 0.05
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM came, or SIGHUP: the terminal was closed."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


class Interruptions:
    """Those of this process."""

    def __init__(self) -> None:
        self.received: KeyboardInterrupt | None = None
        """The last one; it knows which signal it was."""
        self._raised: BaseException | None = None
        """What was raised for it: the same, or another library's own."""
        self._are_watched = False
        self.resume_command: str | None = None
        """What goes on with the run that was stopped, where there is one."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch while the body runs."""
        if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
            yield
            return
        self._forget()
        before = {number: signal.getsignal(number) for number in _NUMBERS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # `nohup` and background jobs of a script ignore some
                signal.signal(number, self._interrupt)
        hook = sys.unraisablehook
        sys.unraisablehook = lambda dropped: None if self._sent_again(dropped.exc_value) else hook(dropped)
        self._are_watched = True
        try:
            yield
        finally:
            self._are_watched = False
            sys.unraisablehook = hook
            for number, handler in before.items():
                if handler is not None:  # it was set outside of Python, and cannot be set again
                    signal.signal(number, handler)
            self._forget()

    def noted(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """A handler of somebody else's, as one that is taken note of when it raises."""

        def noting(number: int, *arguments: object) -> Any:
            try:
                return handler(number, *arguments)
            except BaseException as raised:
                self._note(number, raised)
                raise

        return noting

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let whatever comes out of the body after an interruption was received be that interruption."""
        try:
            yield
        except BaseException:
            self.heed()
            raise
        self.heed()

    def heed(self) -> None:
        """Raise the interruption that was received, if there is one: what was raised for it may have been lost."""
        if self._raised is not None:
            raise self._raised from None

    def _forget(self) -> None:
        self.received = self._raised = self.resume_command = None

    def _interrupt(self, number: int, _: object) -> None:
        interruption = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
        self._note(number, interruption)
        raise interruption

    def _note(self, number: int, raised: BaseException) -> None:
        self.received = raised if isinstance(raised, KeyboardInterrupt) else Terminated(number)
        self._raised = raised

    def _sent_again(self, dropped: BaseException | None) -> bool:
        """Whether this is an interruption; it then comes once more, when the main thread is out of here."""
        if dropped is None or dropped is not self._raised:
            return False

        def send(number: int) -> None:
            time.sleep(_AGAIN_AFTER_S)
            if self._are_watched:
                signal.pthread_kill(threading.main_thread().ident or 0, number)

        number = self.received.number if isinstance(self.received, Terminated) else signal.SIGINT
        _thread.start_new_thread(send, (number,))  # takes no lock, which the thread that is in here may hold
        return True


INTERRUPTIONS = Interruptions()
"""Of this process: signals belong to it as a whole."""
