"""The prompt of `blockpruner sql`: lines in, whole statements out, dot commands, history. Knows no database.

Who answers a statement is a parameter. Lines come from a terminal, where an error is one line and the prompt goes on,
or from a file or a pipe, where the first error ends it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from blockpruner.errors import ConfigurationError, nearest
from flows.cli_output import put
from flows.interruptions import Terminated
from flows.wording import in_plain_words, one_line
from stages.store_statements import is_blank, split_statements

PROMPT, CONTINUED = "blockpruner> ", "        ...> "
_HELP = """\
.tables         the tables and views
.schema [NAME]  the statements that made them
.help           this
.quit           leave; so does Ctrl-D
A statement ends with a semicolon and may take several lines; Ctrl-C drops it. Nothing can be written."""
_HISTORY_LINES = 1000

Answer = Callable[[str], None]


class Session:
    """What was typed and not answered yet."""

    def __init__(self, answer: Answer, definitions: Mapping[str, str]) -> None:
        """`answer` is called with each statement; `definitions` are the statements that made each table and view."""
        self._answer, self._definitions = answer, definitions
        self.pending = ""
        """The beginning of a statement."""

    def feed(self, line: str) -> bool:
        """Take one line; False if it was the last.

        Raises:
            BlockPrunerError: if a statement or a dot command is wrong; it is forgotten.
        """
        if is_blank(self.pending):
            self.pending = ""
            word = line.strip().rstrip(";").strip()
            if word.startswith(".") or word.lower() in ("quit", "exit"):
                return self._command(*word.lstrip(".").split())
        statements, self.pending = split_statements(f"{self.pending}{line}\n")
        for statement in statements:
            self._answer(statement)
        return True

    def finish(self) -> None:
        """Nothing more comes: what is there is a statement without its semicolon."""
        statement, self.pending = self.pending, ""
        if not is_blank(statement):
            self._answer(statement)

    def _command(self, name: str = "", *names: str) -> bool:
        match name.lower():
            case "quit" | "exit":
                return False
            case "help":
                put(_HELP)
            case "tables":
                put("\n".join(self._definitions))
            case "schema":
                put("\n\n".join(self._definition(name) for name in names or self._definitions))
            case _:
                hint = nearest(name, ("help", "quit", "schema", "tables"))
                raise ConfigurationError(f"no command '.{name}'{hint}; .help lists them")
        return True

    def _definition(self, name: str) -> str:
        found = self._definitions.get(name.lower())
        if found is None:
            raise ConfigurationError(
                f"no table or view {name!r}{nearest(name, self._definitions)}; .tables lists those that exist"
            )
        return found


def run_script(session: Session, lines: Iterable[str]) -> None:
    """Answer what a file or a pipe holds.

    Raises:
        BlockPrunerError: at the first statement that is wrong, or if there is none at all.
    """
    empty = True
    with _text_only():
        for line in lines:
            empty = empty and not line.strip()
            if not session.feed(line.rstrip("\n")):
                return
    if empty:
        raise ConfigurationError('no query; give one, as blockpruner sql "FROM leaderboard", or none in a terminal')
    session.finish()


def converse(session: Session, names: Sequence[str], banner: str) -> None:
    """Answer what a person types, until they leave; `names` are offered at a tab."""
    typer.echo(one_line(banner), err=True)
    with _line_editing(names) as remember, _plain_ctrl_c():
        while True:
            try:
                line = _ask(CONTINUED if not is_blank(session.pending) else PROMPT)
                remember(line)
                if not session.feed(line):
                    return
            except EOFError:
                typer.echo("", err=True)
                return
            except Terminated:
                raise
            except KeyboardInterrupt:
                session.pending = ""
                typer.echo("", err=True)
            except Exception as error:
                words = in_plain_words(error)
                if words is None:
                    raise
                typer.echo(f"Error: {words}", err=True)


def _ask(prompt: str) -> str:
    """One line; the prompt never gets into a file that takes standard output."""
    with _text_only():
        if sys.stdout.isatty():
            return input(prompt)
        typer.echo(prompt, nl=False, err=True)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.rstrip("\n")


@contextmanager
def _text_only() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigurationError("standard input is no text in UTF-8; write it in that") from error


@contextmanager
def _plain_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends a line or a query here and not the command, so that the command line must not take note of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _line_editing(names: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Arrow keys, tab and a history that is kept; gives what remembers a line. Nothing of it where there is none."""
    try:
        import readline
    except ImportError:
        yield lambda line: None
        return
    history = history_file()
    with suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(_HISTORY_LINES)
    readline.set_auto_history(False)
    readline.set_completer_delims(" \t\n,;()=<>'\"*/+-")
    readline.set_completer(lambda text, number: _nth([name for name in names if name.startswith(text)], number))
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    try:
        yield lambda line: readline.add_history(line) if line.strip() else None
    finally:
        readline.set_completer(None)
        with suppress(OSError):  # a home that cannot be written is no reason to end with an error
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def history_file() -> Path:
    """Where the lines of earlier prompts are: the place that XDG names for a user's state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if Path(state).is_absolute() else Path.home() / ".local/state") / "blockpruner" / "sql_history"


def _nth(found: Sequence[str], number: int) -> str | None:
    return found[number] if number < len(found) else None
