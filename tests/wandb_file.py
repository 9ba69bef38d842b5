"""Reads what a W&B run wrote without a network: ``run-*.wandb``, a log of protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows, with W&B's own ``_step``; nested keys joined by slashes."""
    from wandb.proto import wandb_internal_pb2 as messages

    found = []
    for data in _records(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            found.append(
                {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format: records cut into pieces that do not cross blocks."""
    at, pieces = _FILE_HEADER, b""
    while at + _HEADER <= len(data):
        if (room := _BLOCK - at % _BLOCK) < _HEADER:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEADER
        pieces += data[at : at + length]
        at += length
        if kind in (1, 4):  # the whole of a record, or its last piece
            yield pieces
            pieces = b""
