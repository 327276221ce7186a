"""How things are put into words for people."""

from __future__ import annotations

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def one_line(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


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
