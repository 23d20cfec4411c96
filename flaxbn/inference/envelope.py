"""What surrounds the program of a module, counted before jax reads it: a small file can name one thing a billion times.

A module is a flatbuffer, whose parts point to each other, and jax builds a part each time that it is pointed to. Here
they are walked as jax will walk them, up to a limit. Fields have the numbers of jax's schema, which never change their
meaning. Those that are not listed are single numbers, the program itself (bytes, which are not looked at), and what
newer versions of jax add.
"""

import re
import struct
from typing import Any

_MOST_PARTS = 100_000
"""Of tables, texts and entries of lists: a thousand arrays that go in and come out take some 10 000."""
_MOST_TEXT = 1 << 20
"""Bytes of all texts together."""
_DEEPEST = 100
"""Of tables in tables; Python itself stops at a thousand."""
_DIMENSION = re.compile(r"[\w ,()*+-]{1,100}|(?:[\w *+-]|\^\d{1,2}(?!\d)){1,100}")
"""A polynomial that is short when it is multiplied out: no powers of parentheses."""

_TEXT, _NUMBERS, _CUSTOM = "text", "numbers", "custom"
"""What a field may be; or a dictionary, which is a table, or a list of what its entries are."""
_SHAPE = "shape"
_ARRAY = {6: [_SHAPE]}
_TREE: dict[int, Any] = {8: [_TEXT], 10: _CUSTOM}
_TREE[6] = [_TREE]
_MESH = {4: _NUMBERS, 6: [_TEXT], 8: _NUMBERS, 10: {4: _TEXT, 8: _TEXT}}
_NAMED_SHARDING = {4: _MESH, 6: {4: [{4: [_TEXT]}], 6: [_TEXT], 8: [_TEXT]}, 8: _TEXT}
_SHARDINGS = [{6: _NUMBERS, 8: _NAMED_SHARDING}]
_MODULE: dict[int, Any] = {
    **{6: _TEXT, 8: _TREE, 10: [_ARRAY], 12: _TREE, 14: [_ARRAY], 18: _SHARDINGS, 20: _SHARDINGS, 22: [_TEXT]},
    **{24: [{4: _TEXT}], 26: [{4: _TEXT}], 28: [{6: _TEXT}], 34: _NUMBERS},
    **{42: [_ARRAY], 44: [_MESH], 46: [_NAMED_SHARDING], 48: _NUMBERS, 50: _NUMBERS, 52: _NUMBERS, 54: _NUMBERS},
}


def check_envelope(module: bytes) -> None:
    """Refuses a module from which jax would build much more than what its program takes and returns needs.

    Raises:
        ValueError: if it has too many parts, too much text, containers of anybody's own classes, or a dimension that is
            no short polynomial.
        struct.error: if it points to places outside itself.
    """
    walk = _Walk(module)
    walk.table(_MODULE, walk.number("<I", 0), 0)


class _Walk:
    """A walk through a flatbuffer, which counts what it meets."""

    def __init__(self, content: bytes) -> None:
        self._content, self._parts, self._text = content, 0, 0

    def table(self, fields: dict[int, Any], at: int, depth: int) -> None:
        """The table at this place, of which only these fields are known."""
        if depth > _DEEPEST:
            raise ValueError(f"A module must have tables in tables at most {_DEEPEST} deep: got more.")
        offsets = at - self.number("<i", at)
        size = self.number("<H", offsets)
        for field, kind in fields.items():
            offset = self.number("<H", offsets + field) if field < size else 0
            if offset:
                self._value(kind, at + offset, depth)

    def number(self, form: str, at: int) -> int:
        """The number at this place, which must be inside."""
        if at < 0:
            raise struct.error(f"a place must be at least 0: got {at}")
        return struct.unpack_from(form, self._content, at)[0]

    def _value(self, kind: Any, at: int, depth: int) -> None:
        at += self.number("<I", at)
        self._count(1)
        if isinstance(kind, dict):
            self.table(kind, at, depth + 1)
            return
        length, begin = self.number("<I", at), at + 4
        if isinstance(kind, list):
            self._count(length)
            for i in range(length):
                self._value(kind[0], begin + 4 * i, depth)
        elif kind is _NUMBERS:
            self._count(length)
        elif kind is _CUSTOM:
            raise ValueError("A module must have no containers but dictionaries, lists and tuples: got another class.")
        else:
            self._text += length
            if self._text > _MOST_TEXT:
                raise ValueError(f"A module must have at most {_MOST_TEXT} bytes of text: got more.")
            if kind is _SHAPE and not _DIMENSION.fullmatch(self._content[begin : begin + length].decode()):
                raise ValueError("A dimension must be a number or a short polynomial: got another one.")

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > _MOST_PARTS:
            raise ValueError(f"A module must have at most {_MOST_PARTS} parts around its program: got more.")
