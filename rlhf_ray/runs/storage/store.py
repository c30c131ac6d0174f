"""Files on an object store or a file system, addressed by names below one URI.

Invariants: readers see an object completely or not at all; credentials come from the environment or the machine's role and never
appear in a message; every failure is raised as `StoreFailed` and names the object.
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
"""Google's client would retry for 15 minutes before it reports missing credentials. Callers retry by themselves."""
_PART = ".part"
"""Suffix of incomplete files on file systems."""


class StoreFailed(InputError, RuntimeError):
    """A store could not be reached, or refused a request."""


class Store:
    """The objects below a URI. It holds no open connection, so it can be pickled."""

    def __init__(self, uri: str) -> None:
        """Create the client; the store is not contacted yet.

        Raises:
            NotAStore: the URI has an unknown scheme or credentials.
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
        """Write text to an object as UTF-8, replacing it."""
        with self._failing(name), self._writing(name) as file:
            file.write(text.encode())

    def put_file(self, path: Path, name: str) -> None:
        """Upload a file, replacing the object. What is appended to the file during the upload is left out."""
        with open(path, "rb") as source, self._failing(name), self._writing(name) as file:
            left = os.fstat(source.fileno()).st_size
            while left and (chunk := source.read(min(_CHUNK, left))):
                file.write(chunk)
                left -= len(chunk)

    def text(self, name: str) -> str | None:
        """Read an object as UTF-8; None if it does not exist."""
        if self.modified_at(name) is None:
            return None
        with self._failing(name), self._fs.open_input_stream(self._path(name)) as file:
            return file.read().decode()

    def get_file(self, name: str, path: Path) -> None:
        """Download an object to a file, which appears only when it is complete."""
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
        """Names of all objects, or of those below a name, sorted."""
        return sorted(self.stats(below))

    def stats(self, below: str = "") -> dict[str, tuple[int, float]]:
        """Size in bytes and modification time in seconds since the epoch, of all objects or of those below a name."""
        with self._failing(below):
            found = self._fs.get_file_info(FileSelector(self._path(below), allow_not_found=True, recursive=True))
        return {
            info.path.removeprefix(f"{self._root}/"): (info.size, info.mtime.timestamp())
            for info in found
            if info.type == FileType.File and not info.path.endswith(_PART)
        }

    def modified_at(self, name: str) -> datetime | None:
        """When an object was last written, by the store's clock; None if it does not exist."""
        with self._failing(name):
            info = self._fs.get_file_info(self._path(name))
        return info.mtime if info.type == FileType.File else None

    def delete(self, name: str) -> None:
        """Delete an object if it exists."""
        with self._failing(name):
            if self._fs.get_file_info(self._path(name)).type == FileType.File:
                self._fs.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _writing(self, name: str) -> Iterator[pa.NativeFile]:
        """Object stores show an object only when it is complete. On file systems the file is renamed when it is complete."""
        path = self._path(name)
        if self._fs.type_name not in ("local", "hdfs"):
            with self._fs.open_output_stream(path) as file:
                yield file
            return
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        temporary = f"{path}.{os.getpid()}{_PART}"
        with self._fs.open_output_stream(temporary) as file:
            yield file
        if not isinstance(self._fs, LocalFileSystem):  # only local moves replace an existing file
            self.delete(name)
        self._fs.move(temporary, path)

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StoreFailed(f"{f'{self.uri}/{name}' if name else self.uri}: {error}") from error


def _file_system(uri: str) -> tuple[FileSystem, str]:
    """The file system of a URI, and the path in it. `gs://` uses `STORAGE_EMULATOR_HOST` if set, like Google's clients."""
    scheme, _, place = uri.partition("://")
    if scheme not in ("gs", "gcs"):
        return FileSystem.from_uri(uri)
    emulator = urlsplit(os.environ.get("STORAGE_EMULATOR_HOST", ""))
    options = {"anonymous": True, "scheme": emulator.scheme, "endpoint_override": emulator.netloc}
    return GcsFileSystem(retry_time_limit=_GCS_RETRIES, **(options if emulator.netloc else {})), place
