"""DICOM files as GDCM reads them right: complete, and rewritten where it reads their kind wrongly or not.

GDCM takes the size of an image from the header and reads past the end of pixels that are fewer.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d import memory
from ssl3d.data.scans.itk import image_of, information, quiet_sitk
from ssl3d.data.scans.streams import copy_of, is_zipped
from ssl3d.errors import DataError, is_transient

if TYPE_CHECKING:
    from pydicom import Dataset

_IO = "GDCMImageIO"
_DEFLATED, _RLE, _BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.2"
_NATIVE = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", _DEFLATED, _BIG_ENDIAN)
_MOST = 1 << 31  # bytes of a file inflated: an element of DICOM holds no more than twice that
_ROOM = 1 << 28  # bytes that GDCM may take for a header, beside those of the file
_UNKNOWN = 0xFFFFFFFF  # a length
_ITEM, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_PIXELS = (
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "BitsAllocated",
    "NumberOfFrames",
    "PhotometricInterpretation",
)
# Kinds of values whose length is written in four bytes, after two that are not used.
_LONG = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN", b"SQ", b"UT", b"UC", b"UR")
_KINDS = (*_LONG, *b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())


def looks_like_dicom(path: Path) -> bool:
    """Tell by its first bytes whether a file is DICOM, with its preamble of 128 bytes or without.

    Raises:
        OSError: Disk, descriptors or network failed, which says nothing of the file.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError as error:
        if is_transient(error):
            raise
        return False
    if head[128:] == b"DICM":
        return True
    # An element of the first groups, of few bytes: with its kind of value, or 4 bytes of length.
    group, kind, length = head[:2], head[4:6], head[4:8]
    if group not in (b"\x02\0", b"\x08\0") or head[3:4] != b"\0":
        return False
    return kind in _KINDS or (head[2:4] <= b"\x18\0" and 0 < int.from_bytes(length, "little") <= 64)


def dicom_information(path: Path) -> Any:
    """Read a file's header by GDCM; see `information` of `ssl3d.data.scans.itk`.

    Raises:
        DataError: A compressed file is damaged.
        RuntimeError: GDCM cannot read the header.
    """
    quiet_sitk()  # the library alone, some 300 MB, is more than the limit below
    # Of a damaged element GDCM takes as many bytes as it asks for, up to 4 GB.
    with plain_dicom(path) as plain, memory.bounded(_ROOM + 4 * plain.stat().st_size):
        return information(plain, _IO)


def dicom_image(path: Path) -> Any:
    """Read a file whole by GDCM, after a look at whether its pixels are all there.

    Raises:
        DataError: There are fewer pixels than the header says, or they are of another size.
        RuntimeError: GDCM cannot decode the file.
    """
    with plain_dicom(path) as plain:
        bits = check_pixels(plain)
        with plain_dicom(plain, decoded=(_RLE,)) as decoded:
            image = image_of(decoded, _IO)
    return image // 255 if bits == 1 else image  # single bits are 0 and 255 to GDCM


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[Any]:
    """Open a file for pydicom so that a damaged header makes it read no more than there is.

    Raises:
        TooLarge: It is longer than this process has addresses for.
    """
    memory.check_mapping(path.stat().st_size)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


@contextlib.contextmanager
def plain_dicom(path: Path, decoded: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a file that GDCM reads: this one, or a copy of it, which goes again.

    A copy is made of what is gzipped, deflated or without its preamble.

    Args:
        path: File.
        decoded: Transfer syntaxes whose pixels are to be decoded in the copy too.

    Raises:
        DataError: A compressed file is damaged.
    """
    with copy_of(path, _MOST) if is_zipped(path) else contextlib.nullcontext(path) as whole:
        syntax = _syntax(whole)
        if syntax is not None and syntax not in (_DEFLATED, *decoded):
            yield whole
            return
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder, "scan")
            _rewrite(whole, plain, inflate=syntax == _DEFLATED, decode=syntax in decoded)
            yield plain


def check_pixels(path: Path) -> int:
    """Refuse a file whose pixels are fewer than its header says, or others, before a decoder reads them.

    Returns:
        Bits of a value in the file.

    Raises:
        DataError: The pixels are missing, cut short, or not those of the header.
    """
    from pydicom import dcmread

    with mapped(path) as file, warnings.catch_warnings(action="ignore"):
        header = dcmread(file, stop_before_pixels=True, specific_tags=list(_PIXELS))
        syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
        tag, length = _element(file, syntax == _BIG_ENDIAN)
        if tag != (0x7FE0, 0x0010):
            raise DataError("no pixels in the file")
        if length == _UNKNOWN or syntax not in _NATIVE:
            _check_fragments(file, header, length)
        else:
            _check_length(file, header, length)
    return int(header.BitsAllocated)


# ------------------------------------------------------------------------------------------------


def _syntax(path: Path) -> str | None:
    """Return the transfer syntax; None of a file without a preamble."""
    from pydicom.filereader import read_partial

    with mapped(path) as file:
        if file.read(132)[128:] != b"DICM":
            return None
        file.seek(0)
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception):
            return str(
                read_partial(file, lambda tag, kind, length: tag.group > 2).file_meta.TransferSyntaxUID
            )
    return ""  # damaged: GDCM says so


def _rewrite(path: Path, plain: Path, *, inflate: bool, decode: bool) -> None:
    """Write a file again by pydicom, with its preamble, and inflated or decoded where asked for.

    Raises:
        DataError: The file is damaged.
    """
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    try:
        with warnings.catch_warnings(action="ignore"):
            memory.check(2 * (_inflated(path) if inflate else path.stat().st_size))
            with mapped(path) as file:
                dataset = dcmread(file, force=True)
            if decode:
                dataset.decompress()
            meta = dataset.file_meta
            if inflate:
                meta.TransferSyntaxUID = ExplicitVRLittleEndian
            elif "TransferSyntaxUID" not in meta:
                implicit, little = dataset.original_encoding
                known = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
                meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else known
            meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7")
            meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", "1.2.3")
            dataset.save_as(plain, enforce_file_format=True)
    except DataError:
        raise
    except Exception as error:  # pydicom raises nearly anything on damaged files
        if is_transient(error):
            raise
        raise DataError(f"damaged DICOM: {' '.join(str(error).split())[:150]}") from error


def _inflated(path: Path) -> int:
    """Count the bytes of a deflated file once it is inflated.

    Raises:
        DataError: They are too many, or the file is cut short.
    """
    from pydicom.filereader import _read_file_meta_info as read_meta
    from pydicom.filereader import read_preamble

    with open(path, "rb") as file:
        read_preamble(file, False)
        read_meta(file)
        stream, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not stream.eof:
            block = stream.unconsumed_tail or file.read(1 << 20)
            if not block:
                raise DataError("cut short: its deflated part does not end")
            count += len(stream.decompress(block, 1 << 24))
            if count > _MOST:
                raise DataError(f"inflates to more than {_MOST:,} bytes")
    return count


def _element(file: Any, big: bool = False) -> tuple[tuple[int, int], int]:
    """Read the tag and the length of the element that begins here, whose kind may be told or not."""
    order: Any = "big" if big else "little"

    def take(size: int) -> bytes:
        data = file.read(size)
        if len(data) < size:
            raise DataError("cut short: its pixels do not end")
        return data

    tag = int.from_bytes(take(2), order), int.from_bytes(take(2), order)
    length = take(4)
    if length[:2] in _LONG:
        length = take(4)
    return tag, int.from_bytes(length, order)


def _check_length(file: Any, header: Dataset, length: int) -> None:
    rows, columns, samples, bits, frames = _size(header)
    values = rows * columns * samples * frames
    if header.get("PhotometricInterpretation") == "YBR_FULL_422":  # two pixels share their colours
        values = values * 2 // 3
    needed = -(-values * bits // 8)
    left = file.size() - file.tell()
    here = min(length, left)
    spare = -(-columns * samples * bits // 8) + 1  # some pad: less than a row
    if not needed <= here <= needed + spare:
        fault = "cut short" if left < length else "damaged"
        raise DataError(
            f"{fault}: {here:,} bytes of pixels, but its header promises {needed:,} ({frames} x {rows} x "
            f"{columns} of {samples} x {bits} bits)"
        )


def _check_fragments(file: Any, header: Dataset, length: int) -> None:
    """Refuse compressed pixels that do not end, or whose own headers tell of another size."""
    rows, columns, samples, _, frames = _size(header)
    size = file.size()
    end = size if length == _UNKNOWN else min(size, file.tell() + length)
    count = -1  # the first item is a table of offsets
    while length == _UNKNOWN or file.tell() < end:
        tag, own = _element(file)
        if tag == _END:
            break
        begin = file.tell()
        if tag != _ITEM or begin + own > end:
            raise DataError("cut short: its compressed pixels do not end")
        count += 1
        code = file.read(own) if count else b""
        held = _coded_size(code)
        if held is not None:
            _check_coded(held, (rows, columns, samples))
        elif count and header.file_meta.TransferSyntaxUID == _RLE:
            _check_runs(code, rows * columns)
        file.seek(begin + own)
    if count < frames:
        raise DataError(f"{frames} frames in its header, but {count} pieces of compressed pixels")


def _size(header: Dataset) -> tuple[int, int, int, int, int]:
    """Return rows, columns, values of a pixel, bits of a value, and frames."""
    try:
        rows, columns, bits = int(header.Rows), int(header.Columns), int(header.BitsAllocated)
        samples, frames = (int(header.get(name) or 1) for name in ("SamplesPerPixel", "NumberOfFrames"))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError("its header does not tell the size of its pixels") from error
    return rows, columns, samples, bits, frames


def _check_coded(held: tuple[int, int, int, int], wanted: tuple[int, int, int]) -> None:
    if held[:3] != wanted:
        rows, columns, samples = wanted
        raise DataError(
            f"damaged: its compressed pixels are {held[0]} x {held[1]} of {held[2]} values, its header "
            f"says {rows} x {columns} of {samples}"
        )
    if held[3] < 8:
        raise DataError(
            f"JPEG-LS of {held[3]} bits a value, which GDCM does not decode; dcmdjpls of DCMTK "
            "decompresses it"
        )


def _check_runs(code: bytes, needed: int) -> None:
    """Refuse run lengths (RLE) of which a part does not decode to a byte for each pixel."""
    count = int.from_bytes(code[:4], "little")
    starts = [int.from_bytes(code[at : at + 4], "little") for at in range(4, 4 + 4 * min(count, 15), 4)]
    for begin, end in zip(starts, [*starts[1:], len(code)], strict=True):
        at, held = begin, 0
        while at < min(end, len(code)) and held < needed:
            run = code[at]
            at += run + 2 if run < 128 else 2 if run > 128 else 1
            held += run + 1 if run < 128 else 257 - run if run > 128 else 0
        if held != needed or at > len(code) or end - at > 1:  # one byte of padding
            raise DataError(f"damaged: run lengths of {held:,} pixels, its header promises {needed:,}")


def _coded_size(code: bytes) -> tuple[int, int, int, int] | None:
    """Read rows, columns, values of a pixel and bits from a JPEG's own header; None where there is none."""

    def number(at: int, size: int = 2) -> int:
        return int.from_bytes(code[at : at + size], "big")

    if code[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000
        return number(12, 4) - number(20, 4), number(8, 4) - number(16, 4), number(40), 8
    if code[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 9 < len(code) and code[at] == 0xFF:
        marker = code[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits = code[at + 4] if marker == 0xF7 else 8
            return number(at + 5), number(at + 7), code[at + 9], bits
        at += 1 if marker == 0xFF else 2 + number(at + 2)
    return None
