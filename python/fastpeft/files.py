"""Reading files of others with suspicion, writing our own so that a crash leaves the old or the new
file, never half.

Nothing here unpickles unless asked, unzips, or imports what a file names.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import AdapterError, ConfigError, refuse

MAX_JSON_BYTES = 10_000_000


def open_folder(path: str | os.PathLike[str]) -> Path:
    """`path` as an existing folder, or AdapterError."""
    folder = Path(path)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise refuse(
            AdapterError,
            f"path '{folder}'",
            got,
            "a folder",
            "Give the folder that holds adapter_config.json.",
        )
    return folder


def checked_file(folder: Path, name: str) -> Path:
    """`folder`/`name` as a regular, non-empty file that lies in the folder, or AdapterError.

    A symbolic link may not lead out of the folder, except from a snapshot of the hub's cache to the
    blobs beside it.
    """
    path = folder / name
    label = f"file '{path}'"
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise refuse(AdapterError, label, f"{error}", "a file", "Check the path.") from error
    home = folder.resolve()
    if not real.is_relative_to(home):
        blobs = home.parent.parent / "blobs"
        if home.parent.name != "snapshots" or real.parent != blobs:
            raise refuse(
                AdapterError,
                label,
                f"a link to '{real}'",
                "a file inside the folder",
                "Copy the file into the folder.",
            )
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise refuse(
            AdapterError,
            label,
            kind,
            "a regular file",
            "Give the folder of an adapter as it was saved.",
        )
    if real.stat().st_size == 0:
        raise refuse(
            AdapterError, label, "an empty file", "content", "Save or download the adapter again."
        )
    return real


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder`/`name`. Refuses more than 10 MB, other encodings than UTF-8,
    duplicate keys, NaN.
    """
    path = checked_file(folder, name)
    label = f"file '{folder / name}'"
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise refuse(
            AdapterError,
            label,
            f"{size} bytes",
            f"at most {MAX_JSON_BYTES}",
            "This is no adapter config.",
        )
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(
            AdapterError, label, f"{error}", "UTF-8 text", "Save the file as UTF-8."
        ) from error
    return parse_json(text, label)


def parse_json(text: str, label: str) -> dict[str, Any]:
    """One JSON object without duplicate keys, NaN or Infinity; AdapterError names `label`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise refuse(
                AdapterError, label, f"key '{twice}' twice", "each key once", "Remove one of them."
            )
        return result

    def no_constant(word: str) -> Any:
        raise refuse(AdapterError, label, word, "finite numbers", "Replace the value.")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (json.JSONDecodeError, RecursionError) as error:
        raise refuse(
            AdapterError, label, f"{error}", "JSON", "Save or download the file again."
        ) from error
    if not isinstance(value, dict):
        raise refuse(
            AdapterError,
            label,
            type(value).__name__,
            "a JSON object",
            "Save or download the file again.",
        )
    return value


def read_safetensors(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of `folder`/`name`, on the CPU. A truncated or foreign file is an
    AdapterError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = checked_file(folder, name)
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError, KeyError) as error:
        raise refuse(
            AdapterError,
            f"file '{folder / name}'",
            f"{error}",
            "a whole safetensors file",
            "Download it again.",
        ) from error


def read_pickle(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a torch.save file, read with weights_only: no code runs. The caller has asked
    for it.
    """
    path = checked_file(folder, name)
    label = f"file '{folder / name}'"
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here
        raise refuse(
            AdapterError, label, f"{error}", "a dict of tensors", "Convert it to safetensors."
        ) from error
    good = isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )
    if not good:
        raise refuse(
            AdapterError,
            label,
            type(value).__name__,
            "a dict of tensors",
            "Convert it to safetensors.",
        )
    return value


def make_folder(path: str | os.PathLike[str]) -> Path:
    """`path` as a folder, made if missing; AdapterError where a file lies in the way."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise refuse(
            AdapterError, f"path '{folder}'", "a file", "a folder", "Choose another path."
        ) from error
    return folder


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over
    `path`.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(Path(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(
            temporary, 0o666 & ~umask
        )  # mkstemp makes it private; an adapter is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def replace_folder(path: Path, fill: Callable[[Path], None], overwrite: bool = False) -> None:
    """Let `fill` make a folder beside `path`, flush its files to disk, then rename it to `path`: a
    crash leaves the old folder or the new one.

    Raises:
        ConfigError: something is there already and `overwrite` is not set, or it is a file.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        got = "a file" if path.is_file() else "a folder that is not empty"
        raise refuse(
            ConfigError, f"path '{path}'", got, "a new folder", "Choose another, or --overwrite."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    aside = beside.with_suffix(".old")
    try:
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)  # mkdtemp makes it private
        fill(beside)
        for file in [file for file in beside.rglob("*") if file.is_file()]:
            file.chmod(0o666 & ~umask)  # safetensors writes private files
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        _flush_folder(beside)
        if path.exists():
            os.replace(path, aside)
        os.replace(beside, path)
        _flush_folder(path.parent)
    finally:
        if not path.exists() and aside.exists():
            os.replace(aside, path)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` to `path` with peft's metadata, whole or not at all. Tensors may share
    storage and be on a GPU.
    """
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        if (
            value.untyped_storage().data_ptr() in storages
            or value.untyped_storage().nbytes() != value.nbytes
        ):
            value = (
                value.clone()
            )  # the format knows no shared storage, and a view would drag its whole base along
        storages.add(value.untyped_storage().data_ptr())
        plain[name] = value
    replace_file(path, lambda temporary: save_file(plain, temporary, metadata={"format": "pt"}))


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
