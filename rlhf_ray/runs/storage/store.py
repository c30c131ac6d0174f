"""Files on an object store or a file system, by names below one URI.

Invariants: an object is seen whole or not at all; credentials come from the environment or the machine's role and stand in no
message; whatever goes wrong on the way is a `StoreFailed` that names the object.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, GcsFileSystem, LocalFileSystem

from rlhf_ray.errors import InputError
from rlhf_ray.runs.storage.location import check_uri

_CHUNK = 8 << 20
_GCS_RETRIES = timedelta(seconds=20)
"""Google's client would try for 15 minutes before it says that credentials are missing; callers try again themselves."""
_PART = ".part"
"""Ends the name of a file of a file system that is not whole yet."""


class StoreFailed(InputError, RuntimeError):
    """A store could not be reached, or refused what it was asked for."""


class Store:
    """What lies below a URI. It holds no open connection that a pickle would lose."""

    def __init__(self, uri: str) -> None:
        """Look at nothing yet.

        Raises:
            NotAStore: no such scheme, or credentials in the URI.
            StoreFailed: the client does not start.
        """
        check_uri(uri)
        self.uri = uri.rstrip("/")
        with self._failing(""):
            self._fs, root = _file_system(self.uri)
        self._root = root.rstrip("/")

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    def put_text(self, name: str, text: str) -> None:
        """Replace an object by UTF-8 text."""
        with self._failing(name), self._writing(name) as file:
            file.write(text.encode())

    def put_file(self, path: Path, name: str) -> None:
        """Replace an object by what a file holds now; one that grows meanwhile is cut where it ended."""
        with open(path, "rb") as source, self._failing(name), self._writing(name) as file:
            left = os.fstat(source.fileno()).st_size
            while left and (chunk := source.read(min(_CHUNK, left))):
                file.write(chunk)
                left -= len(chunk)

    def text(self, name: str) -> str | None:
        """What an object holds, as UTF-8; None where there is none."""
        if self.written(name) is None:
            return None
        with self._failing(name), self._fs.open_input_stream(self._path(name)) as file:
            return file.read().decode()

    def get_file(self, name: str, path: Path) -> None:
        """Write an object to a file, which is there whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
        try:
            with (
                self._failing(name),
                self._fs.open_input_stream(self._path(name)) as file,
                open(temporary, "wb") as out,
            ):
                shutil.copyfileobj(file, out, _CHUNK)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def names(self, below: str = "") -> list[str]:
        """Of all objects, or of those below a name, sorted."""
        return sorted(self.marks(below))

    def marks(self, below: str = "") -> dict[str, tuple[int, float]]:
        """Of all objects, or of those below a name: size in bytes, and when they were written, in seconds since the epoch."""
        with self._failing(below):
            found = self._fs.get_file_info(FileSelector(self._path(below), allow_not_found=True, recursive=True))
        return {
            info.path.removeprefix(f"{self._root}/"): (info.size, info.mtime.timestamp())
            for info in found
            if info.type == FileType.File and not info.path.endswith(_PART)
        }

    def written(self, name: str) -> datetime | None:
        """When an object was written, by the store's clock; None where there is none."""
        with self._failing(name):
            info = self._fs.get_file_info(self._path(name))
        return info.mtime if info.type == FileType.File else None

    def delete(self, name: str) -> None:
        """Remove an object, where there is one."""
        with self._failing(name):
            if self._fs.get_file_info(self._path(name)).type == FileType.File:
                self._fs.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _writing(self, name: str) -> Iterator[pa.NativeFile]:
        """An object store shows nothing before the end; on a file system, which shows all, the file gets its name at the end."""
        path = self._path(name)
        if self._fs.type_name not in ("local", "hdfs"):
            with self._fs.open_output_stream(path) as file:
                yield file
            return
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        temporary = f"{path}.{os.getpid()}{_PART}"
        with self._fs.open_output_stream(temporary) as file:
            yield file
        if not isinstance(self._fs, LocalFileSystem):  # only there does a move replace what is there
            self.delete(name)
        self._fs.move(temporary, path)

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            what = f"{self.uri}/{name}" if name else self.uri
            raise StoreFailed(f"{what}: {error}") from error


def _file_system(uri: str) -> tuple[FileSystem, str]:
    """Of a URI, and the path in it; `gs://` at `STORAGE_EMULATOR_HOST`, as for Google's own clients, where that is set."""
    scheme, _, place = uri.partition("://")
    if scheme not in ("gs", "gcs"):
        return FileSystem.from_uri(uri)
    emulator = urlsplit(os.environ.get("STORAGE_EMULATOR_HOST", ""))
    there = {"anonymous": True, "scheme": emulator.scheme, "endpoint_override": emulator.netloc}
    return GcsFileSystem(retry_time_limit=_GCS_RETRIES, **(there if emulator.netloc else {})), place
