"""What a version says of itself: its format, where it comes from, and the sha256 of each of its files.

The hashes find damage and changes made by hand. They are no signature: who can write the files can write them too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from prerank.errors import BundleError

FORMAT = 2
MANIFEST = "manifest.json"
CONFIG = "funnel.toml"
TRANSFORMS = "transforms.json"
RETRIEVAL = "retrieval.safetensors"
SCORER = "scorer.safetensors"
INDEX = "index/shard-0.safetensors"
"""The index, or its first shard; `shard_file` are those of the others."""
METADATA = "metadata.arrow"
GOLDEN = "golden.safetensors"
FILES = (CONFIG, TRANSFORMS, RETRIEVAL, SCORER, INDEX, METADATA, GOLDEN)
"""Every file of format 2 beside the manifest and, once validated, validation.json; others are not read."""
TARGETING = "targeting.json"
"""One more, where the funnel has rules of targeting: the values that their bitmaps, in SCORER, are of."""
GROUPS = "groups.arrow"
"""One more, where it has rules of diversity: the values that their groups, in SCORER, are of."""
GENERATORS = "generators.safetensors"
"""One more, where it has generators of candidates beside the index: what they know of the items."""
SHARDS = "index/shards.safetensors"
"""One more, where the index is in several shards: in which each row is."""
OPTIONAL = (TARGETING, GROUPS, GENERATORS, SHARDS)
_SHARD_FILE = re.compile(r"index/shard-[1-9]\d*\.safetensors")

VERSIONS = "versions"
VERSION = re.compile(r"\d{8}T\d{4}-[0-9a-f]{12}")
_TYPES: Mapping[str, tuple[type, str]] = {
    "version": (str, "text"),
    "created": (str, "text"),
    "prerank": (str, "text"),
    "torch": (str, "text"),
    "num_items": (int, "a whole number"),
    "parents": (dict, "an object"),
    "schema": (dict, "an object"),
    "metrics": (dict, "an object"),
    "files": (dict, "an object"),
}
_MEND = "restore it from a copy, or delete the version and publish it again"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its sha256 in hex and its size in bytes."""

    sha256: str
    bytes: int

    @property
    def model_id(self) -> str:
        """What an index calls the model whose weights this file holds: 12 hex digits of its content."""
        return self.sha256[:12]

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The file at `path` as it is now."""
        with path.open("rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def content_id(files: Mapping[str, FileEntry]) -> str:
    """12 hex digits of what the files hold; the same content gives the same, whenever it is made."""
    lines = [f"{name} {entry.bytes} {entry.sha256}\n" for name, entry in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def write_manifest(folder: Path, plain: Mapping[str, object], files: Mapping[str, FileEntry]) -> None:
    """Write `folder`'s manifest: the format, `plain`, and the files."""
    said = {"format": FORMAT, **plain, "files": {name: asdict(entry) for name, entry in files.items()}}
    (folder / MANIFEST).write_text(json.dumps(said, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict[str, object]:
    """The manifest of the version in the folder `path`, its keys and types checked.

    Raises BundleError where there is none, it is not JSON, or a newer prerank wrote it.
    """
    where = path / MANIFEST
    try:
        plain = json.loads(where.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{where}: no such file; {path} is no version, or was never wholly published") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: expected JSON, but it cannot be read: {error}; {_MEND}") from None
    if not isinstance(plain, dict):
        raise BundleError(f"{where}: expected a JSON object, found {type(plain).__name__}; {_MEND}")
    written = plain.get("format")
    if type(written) is int and written > FORMAT:
        raise BundleError(
            f"{where}: written in format {written} by prerank {plain.get('prerank')}, and this one reads {FORMAT}; "
            "upgrade prerank"
        )
    if type(written) is not int or written != FORMAT:
        raise BundleError(f"{where}: expected format {FORMAT}, found {written!r}; {_MEND}")
    for key, (kind, word) in _TYPES.items():
        if not isinstance(plain.get(key), kind):
            raise BundleError(f"{where}: expected {word} as {key!r}, found {plain.get(key)!r}; {_MEND}")
    return plain


def shard_file(number: int) -> str:
    """The file of the index's shard `number`, from 0."""
    return f"index/shard-{number}.safetensors"


def files_of(path: Path, manifest: Mapping[str, object]) -> dict[str, FileEntry]:
    """The files a manifest lists. Raises BundleError unless they are exactly the format's."""
    listed = manifest["files"]
    assert isinstance(listed, dict)
    others = {name for name in listed if not _SHARD_FILE.fullmatch(name)}
    missing, extra = sorted(set(FILES) - others), sorted(others - {*FILES, *OPTIONAL})
    if missing or extra:
        raise BundleError(f"{path / MANIFEST}: its files lack {missing} and list unknown {extra}; {_MEND}")
    try:
        return {name: FileEntry(str(entry["sha256"]), int(entry["bytes"])) for name, entry in listed.items()}
    except (KeyError, TypeError, ValueError):
        raise BundleError(f"{path / MANIFEST}: expected sha256 and bytes of each file; {_MEND}") from None


def verify(path: Path, only: Collection[str] | None = None) -> dict[str, object]:
    """The manifest of the version in the folder `path`, once every file, or those of `only`, is as it lists it.

    Reads every byte and loads nothing. Raises BundleError naming the first file that is missing or not as published.
    """
    manifest = read_manifest(path)
    files = files_of(path, manifest)
    for name, expected in files.items():
        if only is None or name in only:
            _verify_file(path / name, expected)
    version = manifest["version"]
    if not isinstance(version, str) or version[-12:] != content_id(files):
        raise BundleError(
            f"{path / MANIFEST}: version {version} does not hold the files of that version, but content "
            f"{content_id(files)}; {_MEND}"
        )
    if path.resolve().name != version:
        raise BundleError(f"{path}: the folder holds version {version}; name it so")
    return manifest


def _verify_file(path: Path, expected: FileEntry) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: the manifest lists it, and there is no such file; {_MEND}")
    size = path.stat().st_size
    if size != expected.bytes:
        raise BundleError(
            f"{path}: expected {expected.bytes} bytes, found {size}: it was cut or changed after publishing; {_MEND}"
        )
    found = FileEntry.of(path)
    if found.sha256 != expected.sha256:
        raise BundleError(
            f"{path}: expected sha256 {expected.sha256[:12]}..., found {found.sha256[:12]}...: it was changed after "
            f"publishing; {_MEND}"
        )
