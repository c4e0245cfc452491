"""What a conversion did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One layer or function call of a conversion.

    Attributes:
        name: Name of the module in the network, or of the call in its forward pass.
        before: Layer or function of the 2D network.
        after: Layer or function that it became.
        parameters: Count of its parameters now.
        kept: Count of those that are the 2D network's own, or copies of them.
    """

    name: str
    before: str
    after: str
    parameters: int = 0
    kept: int = 0


@dataclass
class Report:
    """Report of one conversion; `print` shows it as a table.

    Attributes:
        kind: Kind of the 3D convolutions.
        entries: Layers and calls that were converted.
        slicewise: Names and kinds of what works on every slice by itself because that was allowed.
        parameters: Count of the network's parameters now.
        before: Count of the 2D network's parameters.
    """

    kind: str
    entries: list[Entry] = field(default_factory=list)
    slicewise: list[tuple[str, str]] = field(default_factory=list)
    parameters: int = 0
    before: int = 0

    def __str__(self) -> str:
        width = max((len(e.name) for e in self.entries), default=4)
        wide = max((len(e.before) for e in self.entries), default=6)
        far = max((len(e.after) for e in self.entries), default=5)
        lines = [
            f"{e.name:{width}}  {e.before:{wide}}  {e.after:{far}}"
            + (f"  {e.kept:>11,} of {e.parameters:>11,} parameters kept" if e.parameters else "").rstrip()
            for e in self.entries
        ]
        lines += [
            f"{name:{width}}  {reason:{wide}}  slice by slice (allowed)" for name, reason in self.slicewise
        ]
        return "\n".join(
            [*lines, f"{self.kind}: {self.before:,} parameters before, {self.parameters:,} after"]
        )
