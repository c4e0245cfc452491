"""`ssl3d prepare`: folders and files of scans to one store."""

from __future__ import annotations

from collections.abc import Sequence

summary = "make a store of scans: NIfTI, NRRD, MHA, DICOM, MedMNIST, PNG, MSD, BIDS, CSV"

EPILOG = """Sources come first, before options of several words (--channels t1 flair). By default every scan
keeps its spacing: nothing is interpolated, and proxies measure in mm. Call it again after any stop and it
goes on where it was. Files of no use are listed in rejected.csv beside the store. Scans that are given to
--data of another command are prepared by that, into $SSL3D_CACHE, else ~/.cache/ssl3d. Exit status: 1 if
nothing was usable, 2 for wrong input."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 1 if no scan was usable."""
    from ssl3d import config
    from ssl3d.data.preparation.prepare import PrepareOptions, prepare

    options = config.parse("ssl3d prepare", PrepareOptions, argv, epilog=EPILOG).options
    made = prepare(options)
    return 0 if made.volumes or made.empty_shard else 1
