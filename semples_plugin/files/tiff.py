"""What a TIFF says of its pixels, read from its first directory without decoding anything. Flow: **tiff** -> `images`."""

from __future__ import annotations

import struct
from typing import Any, Dict, NamedTuple, Optional, Tuple

__all__ = ["TiffHeader", "read_tiff_header"]

_WIDTH, _HEIGHT, _BITS, _ORIENTATION, _BANDS, _EXTRA, _FORMAT = 256, 257, 258, 274, 277, 338, 339
_KINDS = {1: "whole numbers from 0", 2: "whole numbers with sign", 3: "floating point"}
_MOST_VALUES = 64  # that are read of a field
_BYTES = {1: 1, 3: 2, 4: 4, 16: 8}  # of the field types of whole numbers
_LETTERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


class TiffHeader(NamedTuple):
    """Of the first image of a TIFF.

    Attributes:
        size: height and width as stored, before any rotation.
        bits: of the widest band.
        bands: number of bands.
        alpha: whether one of them is transparency.
        kind: what the numbers are, in words.
        orientation: position of the orientation in the file and the two bytes that stand for none, if it has one.
    """

    size: Tuple[int, int]
    bits: int
    bands: int
    alpha: bool
    kind: str
    orientation: Optional[Tuple[int, bytes]]

    def __str__(self) -> str:
        return f"a TIFF of {self.bands} band{'s' * (self.bands != 1)} of {self.bits} bits, {self.kind}"


def read_tiff_header(file: Any) -> Optional[TiffHeader]:
    """The header of an open file; None if it is no TIFF, or a damaged one."""
    try:
        return _read(file)
    except (struct.error, OSError, KeyError, IndexError, OverflowError):
        return None


def _read(file: Any) -> Optional[TiffHeader]:
    file.seek(0)
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None:
        return None
    (version,) = struct.unpack(f"{order}H", start[2:4])
    if version not in (42, 43):
        return None
    big = version == 43
    word = "Q" if big else "I"  # of counts and positions
    (place,) = struct.unpack(f"{order}{word}", start[8:16] if big else start[4:8])
    width = struct.calcsize(word)
    file.seek(place)
    (count,) = struct.unpack(f"{order}{'Q' if big else 'H'}", file.read(8 if big else 2))
    first = file.tell()
    fields: Dict[int, Tuple[int, ...]] = {}
    orientation = None
    for i in range(min(count, 4096)):
        entry = first + i * (4 + 2 * width)
        file.seek(entry)
        tag, kind, number = struct.unpack(f"{order}HH{word}", file.read(4 + width))
        if tag not in (_WIDTH, _HEIGHT, _BITS, _ORIENTATION, _BANDS, _EXTRA, _FORMAT) or kind not in _LETTERS or not number:
            continue
        number = min(number, _MOST_VALUES)
        if number * _BYTES[kind] > width:
            (place,) = struct.unpack(f"{order}{word}", file.read(width))
            file.seek(place)
        fields[tag] = struct.unpack(f"{order}{number}{_LETTERS[kind]}", file.read(number * _BYTES[kind]))
        if tag == _ORIENTATION and kind == 3:
            orientation = entry + 4 + width, struct.pack(f"{order}H", 1)
    bands = fields.get(_BANDS, (1,))[0]
    extra = fields.get(_EXTRA, ())
    formats = fields.get(_FORMAT, (1,))
    kinds = " and ".join(sorted({_KINDS.get(one, "of an unknown kind") for one in formats}))
    size, bits = (fields[_HEIGHT][0], fields[_WIDTH][0]), max(fields.get(_BITS, (1,)))
    return TiffHeader(size, bits, bands, 1 in extra or 2 in extra, kinds, orientation)
