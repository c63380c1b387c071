"""Statements for many rows at once.

`executemany` gives Python's lock away and takes it again for each row; where other threads compute, each
taking may wait milliseconds. So rows go in blocks, of one size, that SQLite prepares once.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final, TypeAlias

Value: TypeAlias = "int | float | str | bytes | None"
_ROWS: Final = 64


def insert(
    connection: sqlite3.Connection, into: str, rows: Sequence[Sequence[Value]], *, or_ignore: bool = False
) -> None:
    """Inserts rows.

    Args:
        connection: In a transaction.
        into: A table, and its columns in parentheses; ours, never a user's.
        rows: All of the same width.
        or_ignore: Pass over those that are there already.
    """
    verb = "INSERT OR IGNORE" if or_ignore else "INSERT"
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        marks = f"({', '.join('?' * len(block[0]))})"
        connection.execute(f"{verb} INTO {into} VALUES {', '.join([marks] * len(block))}", _flat(block))


def delete_where(
    connection: sqlite3.Connection, table: str, columns: Sequence[str], rows: Sequence[Sequence[Value]]
) -> None:
    """Deletes the rows whose columns have given values.

    Args:
        connection: In a transaction.
        table: Ours, never a user's.
        columns: With an index on them.
        rows: A value for each column.
    """
    one = f"({' AND '.join(f'{column} = ?' for column in columns)})"
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        connection.execute(f"DELETE FROM {table} WHERE {' OR '.join([one] * len(block))}", _flat(block))


def _flat(rows: Iterable[Sequence[Value]]) -> list[Value]:
    return list(chain.from_iterable(rows))
