"""Who computes a search: this process, or workers that Ray places on GPUs and machines. Plain data and cheap checks.

None of it changes a number, so none of it is part of a fingerprint. Imports nothing heavy, and never Ray.
"""

from __future__ import annotations

import os
import re
import socket
from importlib.util import find_spec
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from blockpruner.errors import ConfigurationError

ExecutorName = Literal["local", "ray"]

_ANSWER_S = 3.0
"""For a cluster's address to take a connection."""
_HTTP2_SETTINGS = 4
_FRAME_HEAD_BYTES = 9
_HTTP2_OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0))
"""The connection preface of RFC 9113, 3.4: a fixed text and a frame of settings, which each side sends first."""
_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")


class ExecutorSettings(BaseModel):
    """Where a search's scores are computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    executor: ExecutorName = "local"
    """This process, or Ray's workers."""
    workers: PositiveInt | None = None
    """Workers of Ray, each with the model on a GPU or a share of the CPUs; None: one for each GPU, or each machine."""
    ray_address: str | None = None
    """HOST:PORT of a Ray cluster that this machine is part of; None: Ray is started here for the one search."""


def check_address(address: str) -> tuple[str, int]:
    """The host and port of a Ray cluster's address.

    Raises:
        ConfigurationError: if it is none.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 2**16:
        raise ConfigurationError(
            f"ray_address is {address!r}; give HOST:PORT as `ray start --head` prints it, such as 127.0.0.1:6379"
        )
    return match["host"].strip("[]"), int(match["port"])


def require_ray(settings: ExecutorSettings) -> None:
    """Make sure, before anything is computed, that Ray is installed and its address answers, where it is asked for.

    Raises:
        ConfigurationError: saying what to do.
    """
    if settings.executor != "ray":
        return
    if find_spec("ray") is None:
        raise ConfigurationError(
            "--executor ray needs Ray, which is not installed; install it with "
            '`pip install -c constraints.txt -e ".[ray]"`, or leave --executor out'
        )
    if settings.ray_address is not None:
        host, port = check_address(settings.ray_address)
        try:
            with socket.create_connection((host, port), timeout=_ANSWER_S) as connection:
                speaks_ray = _may_speak_grpc(connection)
        except OSError as error:
            raise ConfigurationError(
                f"no Ray cluster answers at {settings.ray_address} ({error.strerror or error}); start one with "
                "`ray start --head`, or leave --ray-address out to use this machine alone"
            ) from error
        if not speaks_ray:
            raise ConfigurationError(
                f"what answers at {settings.ray_address} is no Ray cluster; give HOST:PORT as `ray start --head` "
                "prints it, such as 127.0.0.1:6379"
            )


def _may_speak_grpc(connection: socket.socket) -> bool:
    """Whether the other side opens as HTTP/2 does, over which Ray speaks; or is silent, or would have TLS first.

    Ray itself tries for half a minute and says so in twenty lines.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    connection.sendall(_HTTP2_OPENING)
    try:
        frame = b""
        while len(frame) < _FRAME_HEAD_BYTES and (more := connection.recv(_FRAME_HEAD_BYTES - len(frame))):
            frame += more
    except TimeoutError:  # busy
        return True
    return len(frame) == _FRAME_HEAD_BYTES and frame[3] == _HTTP2_SETTINGS
