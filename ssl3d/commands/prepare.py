"""`ssl3d prepare`: one store of the scans in folders and files."""

from __future__ import annotations

from collections.abc import Sequence

summary = "make a store of scans: NIfTI, NRRD, MHA, DICOM, MedMNIST, PNG, MSD, BIDS, CSV"

EPILOG = """Sources come first, before options of several words (--channels t1 flair). By default every scan
keeps its spacing: nothing is interpolated, and proxies measure in mm. After any stop, the same command goes
on where it was. Beside the store, rejected.csv lists files that cannot be used, and left_out.csv files that
were found and are not used. Other commands that get scans with --data prepare them too, into $SSL3D_CACHE,
else ~/.cache/ssl3d. The exit status is 1 if no scan was usable, 2 for wrong input, and 3 if memory, the
disk or the network failed: call again."""


def main(argv: Sequence[str]) -> int:
    """Prepare a store; the exit status is 1 if no scan was usable."""
    from ssl3d import config
    from ssl3d.data.preparation.prepare import prepare
    from ssl3d.data.preparation.shards import QueuedOptions, submit_shards

    options = config.parse("ssl3d prepare", QueuedOptions, argv, epilog=EPILOG).options
    if options.slurm:
        for job in submit_shards(options):
            print(f"submitted {job}")
        return 0
    store = prepare(options.of_part(options.part))
    return 0 if store.volumes or store.empty_shard else 1
