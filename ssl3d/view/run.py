"""The work of `ssl3d view`: what a path holds decides which page is written."""

from __future__ import annotations

from pathlib import Path

from ssl3d.data.store.remote import is_address
from ssl3d.errors import DataError, UsageError, is_full, not_written, reason_of
from ssl3d.files import write_whole
from ssl3d.view.options import ViewOptions


def view(options: ViewOptions) -> str:
    """Write the page, and return a line that says what is in it.

    Raises:
        UsageError: The file is there already, or it cannot be written.
        TransientError: The disk is full.
        DataError: The path holds nothing that can be looked at.
    """
    out = options.out
    if out.is_dir():
        raise UsageError(f"--out {out}: a folder; name a file, such as {out / 'page.html'}")
    if out.exists() and not options.overwrite:
        raise UsageError(f"--out {out}: exists; --overwrite replaces it")
    content, said = _page(options)
    try:
        write_whole(out, content)
    except OSError as error:
        why = "no space left on the disk" if is_full(error) else reason_of(error)
        raise not_written(error, f"--out {out}: {why}") from error
    return said


def _page(options: ViewOptions) -> tuple[str, str]:
    place = Path(options.path)
    kind = _kind(options.path, place)
    if options.data and kind != "predictions":
        raise UsageError(f"--data: {place} holds no predictions, so there is nothing to compare with scans")
    if kind == "predictions":
        from ssl3d.view.predictions import predictions_page

        return predictions_page(place, options.data, options.volumes)
    if kind == "run":
        from ssl3d.view.training import run_page

        return run_page(place)
    if kind == "results":
        from ssl3d.view.tuning import tuning_page

        return tuning_page(place)
    from ssl3d.view.store import store_page

    return store_page(options.path, options.volumes)


def _kind(path: str, place: Path) -> str:
    """Return what a path holds.

    Raises:
        DataError: There is nothing, or nothing that has a page.
    """
    if path == "phantoms" or path.startswith("phantoms:") or is_address(path):
        return "store"
    if not place.exists():
        raise DataError(f"{place}: no such file or folder")
    if place.is_dir():
        for name, kind in (("predict.json", "predictions"), ("config.yaml", "run")):
            if (place / name).is_file():
                return kind
        from ssl3d.evaluation.record_archive import result_files

        if result_files(place):
            return "results"
    from ssl3d.data.open import holds_scans

    if holds_scans([path]):
        raise DataError(
            f"{place}: no store, run or predictions; make a store of the scans with ssl3d prepare"
        )
    return "store"
