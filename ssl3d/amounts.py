"""Amounts and names as people read them: durations, sizes, counts, text on one line."""

from __future__ import annotations

import re

# Control characters, breaks of lines and paragraphs, marks that turn the direction of text, and surrogates,
# which no encoding knows: Python has one in place of each byte of a file's name that is not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def duration(seconds: float) -> str:
    """Return a duration in words.

    Example:
        >>> duration(45), duration(720), duration(12000)
        ('45 s', '12 min', '3 h 20 min')
    """
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes in words.

    Example:
        >>> size(512), size(1.2e9)
        ('512 B', '1.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parameters(count: int) -> str:
    """Return a number of parameters in words, however small a network is.

    Example:
        >>> parameters(64), parameters(191_016), parameters(11_700_000)
        ('64 parameters', '191 k parameters', '11.7 M parameters')
    """
    for least, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * least:
            return f"{count / least:.3g} {unit} parameters"
    return f"{count} parameters"


def count_of(number: int, thing: str) -> str:
    """Return a number of things in words.

    Example:
        >>> count_of(1, "scan"), count_of(1200, "scan")
        ('1 scan', '1,200 scans')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    r"""Return a text from a file's name or header that any file and any terminal takes, on one line.

    What cannot stand there is escaped as in Python's source; all else, a backslash too, stays as it is.

    Example:
        >>> print(printable("Müller\tno. 1"))
        Müller\x09no. 1
        >>> print(printable(b"caf\xe9.nii".decode("utf-8", "surrogateescape")))
        caf\xe9.nii
    """
    return text if text.isascii() and text.isprintable() else _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{byte:02x}" if byte < 256 else f"\\u{code:04x}"
