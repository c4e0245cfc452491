"""State dicts of other people's networks: read without unpickling code, matched strictly, counted."""

from __future__ import annotations

import re
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.convert.foreign_files import read_file
from ssl3d.errors import CheckpointError

_INSIDE = ("state_dict", "model_state_dict", "model", "network_weights", "net")
_PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")


@dataclass
class Match:
    """Counts of the numbers of a network that came out of a file.

    Attributes:
        modules: Numbers matched and numbers in all, by the name of a top-level module.
        missing: Parameters and statistics that the file lacks.
        unused: Keys of the file that the network has no place for.
        mismatched: Keys with their shape in the file and their shape in the network.
    """

    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def matched(self) -> int:
        """Count of the numbers that came from the file."""
        return sum(matched for matched, _ in self.modules.values())

    @property
    def total(self) -> int:
        """Count of the network's numbers: parameters and running statistics."""
        return sum(total for _, total in self.modules.values())

    @property
    def share(self) -> float:
        """Share of the network's numbers that came from the file."""
        return self.matched / max(1, self.total)

    def __str__(self) -> str:
        width = max((len(name) for name in self.modules), default=4)
        lines = [
            f"{name:{width}}  {matched:>12,} of {total:>12,}"
            for name, (matched, total) in self.modules.items()
        ]
        unused = sorted({key.split(".")[0] for key in self.unused})
        tail = f"; not used: {', '.join(unused)}" if unused else ""
        return "\n".join(
            [*lines, f"{'all':{width}}  {self.matched:>12,} of {self.total:>12,} numbers matched{tail}"]
        )


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights by name, without running its code.

    A dictionary inside, as Lightning and many others keep it, is opened; prefixes that all keys share
    (`module.`) are taken off.

    Raises:
        CheckpointError: There is no such file, it is cut short, or it holds something else.
    """
    contents = read_file(path).contents
    inside = (contents[key] for key in _INSIDE if isinstance(contents.get(key), Mapping))
    weights = next(inside, contents)
    state = {str(key): value for key, value in weights.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no tensors")
    return without_prefix(state)


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers add, where all keys have them."""
    state = dict(state)
    while True:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): value for key, value in state.items()}


def fetch(url: str) -> dict[str, Tensor]:
    """Fetch the weights behind a URL into torch's own folder, with their hash checked.

    Raises:
        CheckpointError: They are not there and cannot be fetched; the message says what to put where.
    """
    name = url.rpartition("/")[2]
    place = Path(torch.hub.get_dir()) / "checkpoints"
    if not (place / name).is_file():
        place.mkdir(parents=True, exist_ok=True)
        hashed = re.search(r"-([a-f0-9]{8,})\.", name)
        try:
            with _patience(20):
                torch.hub.download_url_to_file(
                    url, str(place / name), hashed[1] if hashed else None, progress=False
                )
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{name} cannot be fetched ({' '.join(str(error).split())[:80]}): get {url} and put it "
                f"into {place}, or name a copy with weights=FILE"
            ) from error
    return read_state(place / name)


def fetch_hub(repository: str, network: str) -> tuple[dict[str, Tensor], str]:
    """Fetch the weights of a repository on the Hugging Face hub into its own cache; return their file too.

    Raises:
        CheckpointError: They are not there and cannot be fetched; the message says what to put where.
    """
    name = "model.safetensors"
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(repository, name)
    except Exception as error:  # of the network, of the hub, of its client
        raise CheckpointError(
            f"{network}: weights cannot be fetched ({' '.join(str(error).split())[:80]}): get "
            f"https://huggingface.co/{repository}/resolve/main/{name} and name it with weights=FILE"
        ) from error
    return read_state(path), f"{repository}/{name}"


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def load_matching(
    net: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    keys: set[str] | None = None,
    least: float = 1.0,
) -> Match:
    """Load the tensors that have the same name and shape, and count them.

    Args:
        net: Network, changed in place.
        state: Tensors from `read_state`.
        where: Name of the file, for messages.
        keys: Keys of the network that matter; all by default.
        least: Least share of the numbers that must match.

    Raises:
        CheckpointError: Nothing matches, or less than `least`; or a number is not finite.
    """
    own = {
        key: value
        for key, value in net.state_dict().items()
        if not key.endswith("num_batches_tracked") and (keys is None or key in keys)
    }
    match = Match()
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    taken: dict[str, Tensor] = {}
    for key, value in own.items():
        count = counts[_group(key)]
        count[1] += value.numel()
        if key not in state:
            match.missing.append(key)
        elif state[key].shape != value.shape:
            match.mismatched.append((key, tuple(state[key].shape), tuple(value.shape)))
        else:
            taken[key] = state[key]
            count[0] += value.numel()
    match.modules = {name: (matched, total) for name, (matched, total) in counts.items()}
    match.unused = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    name = type(net).__name__
    if not taken or match.share < least:
        raise CheckpointError(f"{where}: not the weights of {name}: {_lacking(match)}")
    bad = next((key for key, value in taken.items() if not value.isfinite().all()), None)
    if bad is not None:
        raise CheckpointError(f"{where}: {bad} holds numbers that are not finite")
    counters = {
        key: state[key] for key in net.state_dict() if key.endswith("num_batches_tracked") and key in state
    }
    net.load_state_dict({**taken, **counters}, strict=False)
    return match


def _group(key: str) -> str:
    """Return the top-level module of a key, with the number inside a list of them."""
    parts = key.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0]


def _lacking(match: Match) -> str:
    text = f"{match.matched:,} of {match.total:,} numbers match"
    if match.mismatched:
        key, theirs, ours = match.mismatched[0]
        text += f"; {key} has shape {theirs}, needed is {ours}{_and_more(match.mismatched)}"
    if match.missing:
        text += f"; {len(match.missing)} names are missing ({_some(match.missing)})"
    if match.unused and match.missing:
        text += f"; it has {_some(match.unused)}"
    return text + "; --allow-partial (or allow_partial=true) takes what there is"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _and_more(mismatched: list[Any]) -> str:
    return f" (and {len(mismatched) - 1} more such)" if len(mismatched) > 1 else ""
