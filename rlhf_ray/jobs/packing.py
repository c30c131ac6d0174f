"""What travels to the cluster: this package, the config, and the files of the directory that a run is submitted from.

Invariants: nothing that looks like a secret, no virtual environment, no version control and no run's folder is packed, whoever
names it; symbolic links never lead out of the directory.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import rlhf_ray
from rlhf_ray.errors import InputError

LIMIT_MB = 400
"""Of all files. Ray stores packages of up to 512 MiB in the head's memory."""
LEFT_OUT = (
    ".git", ".hg", ".svn", ".ssh", ".aws", ".azure", ".kube", ".docker", ".gnupg", ".ray", ".netrc", ".terraform",
    "__pycache__", "node_modules", ".*_cache", ".hypothesis", "*.egg-info", ".DS_Store", ".gitignore", ".rayignore",
)  # fmt: skip
"""Names of files and folders. Ignore files: Ray would apply them to the package again, to what the config names and to this
package, too; which files travel has been decided by then."""
SECRETS = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.token", "auth_token",
    ".pypirc", ".npmrc", ".pgpass", ".htpasswd", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*credential*", "*secret*", "kubeconfig*", "*.tfstate*", "service-account*.json", "service_account*.json",
)  # fmt: skip
"""Names of files; of those that end in .py only the first few would be meant."""
LARGEST_TEXT = 4 << 20
"""Bytes up to which a file is searched for secrets that are known."""
PRIVATE_KEY = b"PRIVATE KEY-----"
"""In the first bytes of a file, whatever its name."""
CONFIG = PurePath(".rlhf-ray", "config.yaml")
"""The resolved config, in the package."""


class PackageTooLarge(InputError, ValueError):
    """More than can be sent with a job."""


@dataclass(frozen=True)
class Package:
    """A folder to send."""

    folder: Path
    files: tuple[PurePath, ...]
    bytes: int
    left_out: tuple[PurePath, ...] = ()
    """What would be there but for a value in it."""


def files_to_pack(root: Path, named: Iterable[str] = ()) -> list[PurePath]:
    """Files of `root`, relative to it, in order.

    In a git work tree those that git does not ignore. `named` are relative paths that the config mentions: they are packed though
    git ignores them, with everything below them.
    """
    chosen = set(_visible_to_git(root) or _below(root, root))
    for name in named:
        path = root / name
        chosen |= {PurePath(os.path.relpath(path, root))} if path.is_file() else set(_below(path, root))
    runs = _marked(root, chosen, ("events.jsonl",)) | _marked(root, chosen, ("pyvenv.cfg", "conda-meta"))
    return sorted(
        p for p in chosen if not runs & set(p.parents) and not is_left_out(p) and _is_harmless(root / p, root)
    )


def is_left_out(path: PurePath) -> bool:
    """Whether a path's name says that it is not for others."""
    if any(fnmatch.fnmatchcase(part, pattern) for part in path.parts for pattern in LEFT_OUT):
        return True
    name = path.name.lower()
    return path.suffix != ".py" and any(fnmatch.fnmatchcase(name, pattern) for pattern in SECRETS)


def pack(root: Path, config: str | None, named: Iterable[str], into: Path, secrets: Sequence[str] = ()) -> Package:
    """Copy what travels to `into`, an empty folder; the config, too, where there is one. No file that holds one of the `secrets`.

    Raises:
        PackageTooLarge: with the largest files.
    """
    every = files_to_pack(root, named)
    files = [path for path in every if not _holds(root / path, secrets)]
    sizes = {path: (root / path).stat().st_size for path in files}
    if (total := sum(sizes.values())) > LIMIT_MB << 20:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        listing = "\n".join(f"  {sizes[path] / (1 << 20):8.1f} MiB  {path}" for path in largest)
        raise PackageTooLarge(
            f"{root} holds {total / (1 << 20):.0f} MiB to send with the job, and {LIMIT_MB} is the most; put models and data "
            f"where all nodes see them and name them by absolute paths, or let git ignore them. The largest:\n{listing}"
        )
    for path in files:
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, into / path)
    package = Path(rlhf_ray.__file__).parent
    # Both sides run the same version, whatever the nodes have installed and whatever lies in `root`.
    shutil.rmtree(into / package.name, ignore_errors=True)
    shutil.copytree(package, into / package.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    if config is not None:
        (into / CONFIG).parent.mkdir()
        (into / CONFIG).write_text(config)
    return Package(into, tuple(files), total, tuple(path for path in every if path not in sizes))


def _visible_to_git(root: Path) -> list[PurePath] | None:
    """None where `root` is in no work tree, or there is no git."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    names = (PurePath(os.fsdecode(name)) for name in listed.split(b"\0") if name)
    return [name for name in names if (root / name).is_file()]


def _below(folder: Path, root: Path) -> Iterator[PurePath]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_left_out(PurePath(name))]
        yield from (PurePath(os.path.relpath(os.path.join(parent, name), root)) for name in files)


def _marked(root: Path, files: Iterable[PurePath], marks: tuple[str, ...]) -> set[PurePath]:
    """Folders, other than `root`, in which one of the marks lies."""
    folders = {parent for path in files for parent in path.parents} - {PurePath(".")}
    return {folder for folder in folders if any((root / folder / mark).exists() for mark in marks)}


def _holds(path: Path, secrets: Sequence[str]) -> bool:
    """Whether a file that people could have written has one of the texts in it."""
    if not secrets or path.stat().st_size > LARGEST_TEXT:
        return False
    text = path.read_bytes()
    return any(secret.encode() in text for secret in secrets)


def _is_harmless(path: Path, root: Path) -> bool:
    """A file inside `root`, also where links lead, that does not begin like a private key."""
    real = path.resolve()
    inside = real.is_relative_to(root.resolve())
    if not inside or (path.is_symlink() and is_left_out(real.relative_to(root.resolve()))):
        return False
    with open(path, "rb") as file:
        return PRIVATE_KEY not in file.read(200)
