"""How things are put into words for people."""

from __future__ import annotations

import errno
import json
import unicodedata

from blockpruner.errors import BlockPrunerError, is_disk_full
from blockpruner.paths import shortened

_REMEDIES = {
    errno.EACCES: "see who may read and write it, or give another path",
    errno.EPERM: "see who may read and write it, or give another path",
    errno.EROFS: "give a path that can be written",
    errno.ENAMETOOLONG: "give a shorter path",
}
_JOINERS = "\u200c\u200d"
"""Characters of category Cf that are parts of words and of emoji."""
_NO_SPACE = "free some space and give the same command again: all that was finished is kept"
_LONGEST_LINE = 4000
"""Characters: every name of a setting, or a path as long as they can be."""
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def in_plain_words(error: BaseException) -> str | None:
    """What went wrong, in one line, if its cause is the user's input or the user's machine; None for a defect of ours.

    An error of the operating system is the machine's where it names a file, or where there is no space for one.
    """
    if isinstance(error, BlockPrunerError):
        return one_line(str(error))
    if is_disk_full(error):
        reason = getattr(error, "strerror", None) or one_line(str(error))
        return f"{_file_of(error) or 'standard output, or a file, cannot be written'}: {reason}; {_NO_SPACE}"
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # the words of `tempfile`
        return f"{error.strerror}; free some space there, or name another folder in the environment variable TMPDIR"
    if isinstance(error, OSError) and (file := _file_of(error)):
        return f"{file}: {error.strerror}; {_REMEDIES.get(error.errno or 0, 'check the path')}"
    return None


def _file_of(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return shortened(one_line(str(name))) if isinstance(name, str) else ""


def one_line(text: str) -> str:
    """The text without its line breaks, fit to be shown; of one that fills screens, the beginning."""
    line = " ".join(text.split())
    return printable(line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}...")


def printable(text: str) -> str:
    """The text with an escape for every character that would steer a terminal; line breaks and tabs stay."""
    if text.isprintable():  # which most are, and says it at once
        return text
    return "".join(_escaped(character) if _steers(character) else character for character in text)


def as_json_escapes(text: str) -> str:
    """JSON with its own escape for every such character: the same JSON."""
    if text.isprintable():
        return text
    return "".join(json.dumps(character)[1:-1] if _steers(character) else character for character in text)


def _steers(character: str) -> bool:
    if character in "\n\t" or character in _JOINERS:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def cancelled(resume_command: str) -> str:
    """Why a run ended that was stopped, and how to go on."""
    return f"cancelled; give the same command again, or `{resume_command}`, to go on"


COMPARISON_CANCELLED = "cancelled; run the same comparison again to go on: what is finished is not done again"


def ended_by_library(exit_call: SystemExit, resume_command: str) -> str:
    """Why a run ended that a library ended with the whole process, as rich does where a line of its finds no reader."""
    nobody_reads = isinstance(exit_call.__context__, BrokenPipeError)
    why = (
        "nobody reads any more what the run says: its terminal, its pipe or its worker of Prefect's is gone"
        if nobody_reads
        else f"a library ended the process (status {exit_call.code})"
    )
    return f"{why}; `{resume_command}` goes on with it"


def in_units(number: float) -> str:
    """The number in the unit that fits, which the word for what it counts follows: '12.5 M', '314 G', '87 '."""
    power = next((power for power in (4, 3, 2, 1) if abs(number) >= 1000**power), 0)
    scaled = number / 1000**power
    digits = 0 if scaled >= 100 or not power else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {('', 'k', 'M', 'G', 'T')[power]}"


def spell_out(seconds: float) -> str:
    """A duration in the two units that matter: '42 s', '3 min 05 s', '2 h 10 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: int, noun: str) -> str:
    """'1 block', '1,234 blocks'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(num_bytes: int) -> str:
    """A number of bytes in the unit that fits: '4.2 MB'."""
    power = min(len(_UNITS) - 1, max(0, len(str(num_bytes)) - 1) // 3)
    return f"{num_bytes / 1000**power:.{1 if power else 0}f} {_UNITS[power]}"
