"""`ssl3d zoo`: lists the encoders of an index, and packs one for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl3d.errors import UsageError

summary = "list encoders that can be had by name, or pack one for others"

USAGE = """usage: ssl3d zoo {list,pack} [options]

  list                          list the encoders of the index that $SSL3D_ZOO names
  pack RUN --name NAME ...      pack an encoder into an archive, and write it into the index beside it

An encoder of the index is named zoo:NAME wherever a command takes an encoder:
ssl3d pretrain --init zoo:NAME, ssl3d finetune zoo:NAME.
`ssl3d zoo list --help` and `pack --help` list their options.
"""


@dataclasses.dataclass(frozen=True)
class ZooListOptions:
    """List the encoders of an index: name, size, licence and training.

    Attributes:
        index: URL or path of the index; $SSL3D_ZOO if left out, where zoo:NAME looks.
    """

    index: str = ""


@dataclasses.dataclass(frozen=True)
class ZooPackOptions:
    """Pack an encoder, with what travels beside it, into an archive of at most 15 MB with its entry.

    Attributes:
        encoder: Run, or folder of an encoder.
        name: Name by which others have it, such as heart-mr.
        licence: Licence of the weights, which those of the data must allow.
        out: Folder of the archives and of their index.json, to be put behind a URL.
        overwrite: Permission to replace an encoder of that name.
    """

    encoder: Path = dataclasses.field(metadata={"positional": True})
    name: str = dataclasses.field(kw_only=True)
    licence: str = dataclasses.field(kw_only=True)
    out: Path = Path("zoo")
    overwrite: bool = False


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from ssl3d.config import parse

    if argv and argv[0] in ("-h", "--help", "--help-all"):
        print(USAGE, end="")
        return 0
    word, rest = (argv[0], list(argv[1:])) if argv else ("list", [])
    if word == "list":
        _list(parse("ssl3d zoo list", ZooListOptions, rest).options.index)
        return 0
    if word == "pack":
        pack(parse("ssl3d zoo pack", ZooPackOptions, rest).options)
        return 0
    raise UsageError(f"ssl3d zoo: {' '.join(argv)!r} is neither list nor pack RUN --name NAME")


def _list(index: str) -> None:
    from ssl3d.amounts import printable, size
    from ssl3d.checkpoint.zoo import ZOO, read_index

    entries = read_index(index)
    for entry in entries.values():
        print(printable(f"{ZOO}{entry.name}  {size(entry.bytes)}  {entry.licence}  {entry.about}"))
    if not entries:
        print("the index has no encoder")


def pack(options: ZooPackOptions) -> Path:
    """Pack an encoder and write its entry; return the archive.

    Raises:
        UsageError: The name is none, or taken.
        CheckpointError: There is no encoder, or it is too large.
    """
    from ssl3d.checkpoint.card import encoder_folder, read_card
    from ssl3d.checkpoint.zoo import FORMAT, entries_of, pack_archive
    from ssl3d.files import write_whole
    from ssl3d.json_files import parse_json

    folder = encoder_folder(options.encoder)
    card = read_card(folder)
    index = options.out / "index.json"
    content: dict[str, Any] = {"format": FORMAT, "encoders": {}}
    if index.exists():
        try:
            content = parse_json(index.read_text(encoding="utf-8"))
            entries_of(content)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"{index}: is no index of encoders ({error}); move it away") from error
    if options.name in content["encoders"] and not options.overwrite:
        raise UsageError(f"{index}: has {options.name} already; choose another --name, or --overwrite")
    if not options.licence.strip():
        raise UsageError("--licence: is empty; name the licence of the weights, which the data's allows")
    archive = options.out / f"{options.name}.tar.gz"
    entry = {"file": archive.name, "sha256": "0" * 64, "bytes": 1, "licence": options.licence}
    entry["about"] = _about(card)
    new = {**content, "encoders": {**content["encoders"], options.name: entry}}
    try:
        entries_of(new)
    except ValueError as error:
        raise UsageError(f"--name {options.name}: {error}") from error
    packed = pack_archive(folder, archive)
    entry |= {"sha256": hashlib.sha256(packed).hexdigest(), "bytes": len(packed)}
    write_whole(index, json.dumps(new, indent=1) + "\n")
    print(f"{archive}: {len(packed)} bytes, SHA-256 {entry['sha256']}; its entry is in {index}")
    return archive


def _about(card: dict[str, Any]) -> str:
    """Describe the training of an encoder in one line."""
    data = card.get("data") or {}
    names = ", ".join(map(str, data.get("datasets") or ())) or "unknown data"
    proxies = ", ".join(map(str, card.get("proxies") or ())) or "no proxy"
    travellers = "".join(f" with {name}" for name in card.get("travellers") or ())
    return f"{card['architecture']}{travellers}, {proxies} on {names}, {card.get('steps', 0)} steps"
