"""Fields of a serialised protobuf message, for what no binding of JAX's gives of a trace."""

from __future__ import annotations

from collections.abc import Iterator

# Bytes of a value by its wire type; a number of any length is 0, what bears its own length 2.
_FIXED = {1: 8, 5: 4}


def fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of each field in order, and stop at what is no field.

    >>> list(fields(bytes([8, 150, 1, 18, 2, 104, 105])))
    [(1, 150), (2, b'hi')]
    """
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in _FIXED:
            length = _FIXED[kind]
        else:
            return
        if place + length > len(message):
            return
        yield tag >> 3, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message):
        byte = message[place]
        value |= (byte & 0x7F) << shift
        shift += 7
        place += 1
        if byte < 0x80:
            break
    return value, place
