"""Whether a page can be written where it is to go: asked before hours of computing."""

from __future__ import annotations

import os
from pathlib import Path

from blockpruner.errors import ConfigurationError

PAGE_SUFFIXES = (".html", ".htm")


def check_place(page: Path) -> None:
    """Make sure that a comparison's report has somewhere to go.

    Raises:
        ConfigurationError: saying what is wrong with it.
    """
    folder = page.absolute().parent
    if page.is_dir():
        problem = "is a folder"
    elif page.suffix.lower() not in PAGE_SUFFIXES:
        raise ConfigurationError(f"the report {page} does not end in .html; give the page a name that does")
    elif not folder.is_dir():
        problem = f"cannot be written: there is no folder {page.parent}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"cannot be written: the folder {page.parent} cannot"
    else:
        return
    raise ConfigurationError(f"the report {page} {problem}; give it a file in a folder that is there and yours")
