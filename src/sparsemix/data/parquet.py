"""Parquet files -> the fields of rows that are asked for, no others being read."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from sparsemix.config import ConfigError
from sparsemix.data.files import one_line, shown

# Decoded rows are held so many bytes at a time, by their mean size.
_BATCH_BYTES, _BATCH_ROWS = 1 << 22, 1024
_BUFFER = 1 << 20


def parquet_fields(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The `columns` of each row that the file has; a dot leads into a column of fields. Strings and bytes come out as
    strings. Where a column is missing, the names of all are there too, without values, so that an error can name them;
    of a file that has none of the columns, one row. Raises ConfigError."""
    try:
        # By Python's own file: pyarrow's takes no name that is not UTF-8.
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw, buffer_size=_BUFFER) as file:
            schema = file.schema_arrow
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            held = [name for name in dict.fromkeys(columns) if _has(leaves, name)]
            blank = dict.fromkeys(schema.names) if len(held) < len(columns) else {}
            if not held:
                yield from [blank] if file.metadata.num_rows else []
                return
            if twice := [name for name in held if schema.names.count(name) > 1]:
                raise ConfigError(f"{shown(path)}: there are two fields `{twice[0]}`; rename the one that is no text")
            done = 0
            for batch in file.iter_batches(columns=held, batch_size=_rows_at_once(file.metadata, held)):
                names = batch.schema.names
                values = [_values(path, done, *one) for one in zip(names, batch.columns, strict=True)]
                done += batch.num_rows
                for row in zip(*values, strict=True):
                    yield {**blank, **dict(zip(names, row, strict=True))}
    except pyarrow.ArrowException as error:
        raise ConfigError(
            f"{shown(path)} is truncated or corrupt parquet ({one_line(error)}); fetch it again"
        ) from None


def _has(leaves: Sequence[str], name: str) -> bool:
    return any(leaf == name or leaf.startswith(f"{name}.") for leaf in leaves)


def _rows_at_once(about: Any, held: Sequence[str]) -> int:
    """So few rows that the largest row group's are small together."""
    largest = 1
    for g in range(about.num_row_groups):
        group = about.row_group(g)
        parts = (group.column(c) for c in range(group.num_columns))
        size = sum(
            part.total_uncompressed_size for part in parts if any(_has([part.path_in_schema], name) for name in held)
        )
        largest = max(largest, size // max(1, group.num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // largest))


def _values(path: Path, done: int, name: str, column: Any) -> list[Any]:
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind):
        # As bytes: pyarrow would not say which row is not UTF-8.
        column = column.cast(pyarrow.large_binary())
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError) as error:
        # Such as a date after the year 9999.
        why = f"is {kind}, not a string ({one_line(error)})"
        raise ConfigError(f"{shown(path)}: `{name}` {why}; rename the field that holds the text") from None
    return [_text(path, done + i, name, v) if isinstance(v, bytes) else v for i, v in enumerate(values, 1)]


def _text(path: Path, number: int, name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{shown(path)}:{number}: `{name}` is not UTF-8 at its byte {error.start}"
        raise ConfigError(f"{where}; convert it to UTF-8 or leave the row out") from None
