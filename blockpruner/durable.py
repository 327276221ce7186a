"""Files that are there whole or not at all, whatever happens while they are written, a power cut included.

The order is what does it: the content is made durable before the file has its name, and the name after.
"""

from __future__ import annotations

import os
from pathlib import Path

from blockpruner.paths import naming


def write_durably(path: Path, content: bytes, temporary: Path) -> None:
    """Write a file so that a reader, or a power cut, sees the old content or the new and nothing between.

    `temporary` lies beside `path`, belongs to this call alone, and is gone afterwards.
    """
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
