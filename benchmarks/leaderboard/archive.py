"""Archives of the records of a suite, which are read as their folders are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ssl3d.api import pack_records


@dataclass(frozen=True)
class PackOptions:
    """Pack the records below a folder, and the tables beside them, into RESULTS/records.tar.xz.

    Attributes:
        results: Folder of records, as `ssl3d leaderboard run` writes it.
        remove: Whether the packed files are removed after the archive was read back.
    """

    results: Path = field(metadata={"positional": True})
    remove: bool = False


def pack(options: PackOptions) -> Path:
    """Write the archive, say how large it is, and return its path.

    Raises:
        UsageError: There is no such folder, no record in it, or the archive cannot be written.
        DataError: An archive in the folder is damaged, or the records exceed what an archive may hold.
    """
    archive, count = pack_records(options.results, options.remove)
    print(f"{archive}: {count} files, {archive.stat().st_size / 1e3:.0f} kB")
    return archive
