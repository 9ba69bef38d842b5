"""Reads the file of an offline W&B run: ``run-*.wandb``, a log of protocol buffers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7


def rows(path: Path, patience: float = 60.0) -> list[dict[str, Any]]:
    """All rows, with W&B's own ``_step``; nested keys joined by slashes.

    Another process writes them, possibly until after ``wandb.finish`` has returned.
    """
    found = []
    for record in _messages(path, patience):
        if record.WhichOneof("record_type") == "history":
            found.append(
                {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return found


def artifacts(path: Path, patience: float = 60.0) -> list[tuple[str, str]]:
    """Type and name of all artifacts."""
    found = (message.artifact for message in _messages(path, patience) if message.artifact.name)
    return [(artifact.type, artifact.name) for artifact in found]


def _messages(path: Path, patience: float) -> list[Any]:
    from wandb.proto import wandb_internal_pb2 as messages

    deadline = time.monotonic() + patience
    while True:
        read = [messages.Record.FromString(data) for data in records(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in read):
            return read
        assert time.monotonic() < deadline, f"{path} has no end, {len(read)} records"
        time.sleep(0.2)


def records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format: records cut into pieces that do not cross blocks.

    The last piece is skipped if it is incomplete.
    """
    at, pieces = _FILE_HEADER, b""
    while at + _HEADER <= len(data):
        if (room := _BLOCK - at % _BLOCK) < _HEADER:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEADER
        if at + length > len(data):
            return
        pieces += data[at : at + length]
        at += length
        if kind in (1, 4):  # the whole of a record, or its last piece
            yield pieces
            pieces = b""
