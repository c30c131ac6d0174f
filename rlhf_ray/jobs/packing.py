"""The files that are sent to the cluster: this package, the config, and the directory that a run is submitted from.

Invariants: secrets, virtual environments, version control and run folders are never packed, even if the config names them;
symbolic links never lead out of the directory.
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
"""Maximum size of all files. Ray stores packages of up to 512 MiB in the head's memory."""
LEFT_OUT = (
    ".git", ".hg", ".svn", ".ssh", ".aws", ".azure", ".kube", ".docker", ".gnupg", ".ray", ".netrc", ".terraform",
    "__pycache__", "node_modules", ".*_cache", ".hypothesis", "*.egg-info", ".DS_Store", ".gitignore", ".rayignore",
)  # fmt: skip
"""Names of files and folders. They include ignore files: Ray would apply those to the package again, also to files that the
config names and to this project's package."""
SECRETS = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.token", "auth_token",
    ".pypirc", ".npmrc", ".pgpass", ".htpasswd", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*credential*", "*secret*", "kubeconfig*", "*.tfstate*", "service-account*.json", "service_account*.json",
)  # fmt: skip
"""Names of files that may contain secrets. Files that end in .py are exempt."""
LARGEST_TEXT = 4 << 20
"""Maximum size in bytes of files that are searched for known secrets."""
PRIVATE_KEY = b"PRIVATE KEY-----"
"""A file that begins with this is not packed, whatever its name is."""
CONFIG = PurePath(".rlhf-ray", "config.yaml")
"""Path of the resolved config in the package."""


class PackageTooLarge(InputError, ValueError):
    """The files are larger than a job's package may be."""


@dataclass(frozen=True)
class Package:
    """A folder that is ready to be sent."""

    folder: Path
    files: tuple[PurePath, ...]
    bytes: int
    left_out: tuple[PurePath, ...] = ()
    """Files that were left out because they contain a secret value."""


def files_to_pack(root: Path, named: Iterable[str] = ()) -> list[PurePath]:
    """The files of `root` to pack, as sorted relative paths.

    In a git work tree, files that git ignores are left out. `named` are relative paths that the config mentions: they are packed
    with everything below them, even if git ignores them.
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
    """Whether a path is excluded by its name."""
    if any(fnmatch.fnmatchcase(part, pattern) for part in path.parts for pattern in LEFT_OUT):
        return True
    name = path.name.lower()
    return path.suffix != ".py" and any(fnmatch.fnmatchcase(name, pattern) for pattern in SECRETS)


def pack(root: Path, config: str | None, named: Iterable[str], into: Path, secrets: Sequence[str] = ()) -> Package:
    """Copy the files and the config, if there is one, to `into`, an empty folder. Files with one of the `secrets` are left out.

    Raises:
        PackageTooLarge: listing the largest files.
    """
    every = files_to_pack(root, named)
    files = [path for path in every if not _holds(root / path, secrets)]
    sizes = {path: (root / path).stat().st_size for path in files}
    if (total := sum(sizes.values())) > LIMIT_MB << 20:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        listing = "\n".join(f"  {sizes[path] / (1 << 20):8.1f} MiB  {path}" for path in largest)
        raise PackageTooLarge(
            f"{root} has {total / (1 << 20):.0f} MiB to send with the job, at most {LIMIT_MB} are allowed; put models and data "
            f"where all nodes can read them and use absolute paths, or let git ignore them. The largest:\n{listing}"
        )
    for path in files:
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, into / path)
    package = Path(rlhf_ray.__file__).parent
    # Replaces a copy from `root`, and is imported before an installed one: both sides run the same version.
    shutil.rmtree(into / package.name, ignore_errors=True)
    shutil.copytree(package, into / package.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    if config is not None:
        (into / CONFIG).parent.mkdir()
        (into / CONFIG).write_text(config)
    return Package(into, tuple(files), total, tuple(path for path in every if path not in sizes))


def _visible_to_git(root: Path) -> list[PurePath] | None:
    """Files that git does not ignore; None if `root` is not in a git work tree, or git is not installed."""
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
    """Folders below `root` that contain one of the marks."""
    folders = {parent for path in files for parent in path.parents} - {PurePath(".")}
    return {folder for folder in folders if any((root / folder / mark).exists() for mark in marks)}


def _holds(path: Path, secrets: Sequence[str]) -> bool:
    """Whether a file of moderate size contains one of the secrets."""
    if not secrets or path.stat().st_size > LARGEST_TEXT:
        return False
    text = path.read_bytes()
    return any(secret.encode() in text for secret in secrets)


def _is_harmless(path: Path, root: Path) -> bool:
    """Whether a file is inside `root`, links followed, and does not begin like a private key."""
    real = path.resolve()
    inside = real.is_relative_to(root.resolve())
    if not inside or (path.is_symlink() and is_left_out(real.relative_to(root.resolve()))):
        return False
    with open(path, "rb") as file:
        return PRIVATE_KEY not in file.read(200)
