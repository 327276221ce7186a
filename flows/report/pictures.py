"""The report's pictures as PNG and SVG files, for papers and slides. Needs a Chromium or Chrome on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockpruner.errors import ConfigurationError
from flows.report.picture import Picture
from flows.report.theme import LIGHT

_WIDTH = 900
"""In CSS pixels; half of it for a picture that takes half the page."""
_PNG_SCALE = 2
FORMATS = ("png", "svg")


def write_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write every picture in the light theme into a folder, which is made if need be, and say which files there are.

    Raises:
        ConfigurationError: if there is no browser that can draw.
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(picture, folder / f"{picture.name}.{form}") for picture in pictures for form in FORMATS]
    _draw([_order(picture, path) for picture, path in jobs])
    missing = [path.name for _, path in jobs if not path.is_file()]
    if missing:
        raise ConfigurationError(f"the browser drew no {', '.join(missing)}; try again, or save them from the report")
    return [path for _, path in jobs]


def require_browser() -> None:
    """Make sure that pictures can be drawn, before anything else is done.

    Raises:
        ConfigurationError: saying what to install.
    """
    from choreographer.browsers.chromium import Chromium

    if Chromium.find_browser(skip_local=False) is None:
        raise ConfigurationError(
            "no Chromium or Chrome was found, which draws the pictures; install one (Debian: apt-get install chromium; "
            "elsewhere: plotly_get_chrome), name one in the environment variable BROWSER_PATH, or leave out --figures"
        )


def _order(picture: Picture, path: Path) -> dict[str, Any]:
    """What kaleido needs to draw one file."""
    figure = picture.draw(LIGHT)
    width = _WIDTH if picture.is_wide else _WIDTH // 2
    options = {"format": path.suffix[1:], "width": width, "height": figure["layout"]["height"]}
    return {"fig": figure, "path": path, "opts": {**options, "scale": _PNG_SCALE if path.suffix == ".png" else 1}}


def _draw(orders: list[dict[str, Any]]) -> None:
    import kaleido
    from choreographer.errors import BrowserFailedError

    try:  # MathJax would be fetched from the network
        kaleido.write_fig_from_object_sync(orders, kopts={"mathjax": False})
    except BrowserFailedError as error:
        raise ConfigurationError(
            "the browser that draws the pictures does not start (`choreo_diagnose` says why); or leave out --figures"
        ) from error
