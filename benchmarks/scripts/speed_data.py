"""How fast random crops are read: from the store, from NIfTI files read each time, from torchio's Queue.

All three read the same files in the same run with the same number of workers. It also prints what check
sums cost the drawing of batches, and what opening a large collection costs, simulated.

python benchmarks/scripts/speed_data.py [--data FOLDER] [--sizes 32 64] [--workers 2] [--seconds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ssl3d.api import (
    Loader,
    Proxy,
    Record,
    assemble,
    open_data,
    phantom,
    simulated_index,
    write_part,
)

BATCH = 16
REPEATS = 3


class Crop(Proxy):
    """A proxy that draws one random crop of `config` voxels, and is never trained."""

    @classmethod
    def draw(cls, config: tuple[int, int, int], volume: Any, rng: np.random.Generator) -> dict[str, Any]:
        """Draw one random crop of a volume."""
        start = [
            int(rng.integers(max(1, n - s + 1))) for n, s in zip(volume.shape[1:], config, strict=True)
        ]
        return {"crop": volume.read(start, config)}


class ReadEachTime(Dataset[Any]):
    """A data set of one random crop per item, for which the whole file is read."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = list(paths), size

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> torch.Tensor:
        import nibabel

        rng = random.Random(index)
        path = self.paths[rng.randrange(len(self.paths))]
        image = nibabel.nifti1.Nifti1Image.from_filename(path).get_fdata(dtype=np.float32)
        start = [rng.randrange(n - self.size + 1) for n in image.shape[:3]]
        crop = image[tuple(slice(s, s + self.size) for s in start)]
        return torch.from_numpy(np.ascontiguousarray(crop))[None]


def from_store(paths: Sequence[Path], size: int, workers: int) -> Iterator[int]:
    collection = open_data(paths)
    # An endless stream of single crops, as the training loop gets them.
    for batch in Loader(collection, {"crop": (Crop, (size,) * 3)}, BATCH, workers=workers):
        yield sum(len(group.rows) for group in batch.groups)


def from_files(paths: Sequence[Path], size: int, workers: int) -> Iterator[int]:
    loader = DataLoader(ReadEachTime(paths, size), batch_size=BATCH, num_workers=workers)
    for batch in loader:
        yield len(batch)


def from_queue(paths: Sequence[Path], size: int, workers: int) -> Iterator[int]:
    import torchio

    subjects = torchio.SubjectsDataset([torchio.Subject(image=torchio.ScalarImage(p)) for p in paths])
    queue = torchio.Queue(
        subjects,
        max_length=64,
        samples_per_volume=8,
        sampler=torchio.data.UniformSampler(size),
        num_workers=workers,
    )
    while True:
        for batch in torchio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0):
            yield len(batch["image"]["data"])


WAYS = {
    "store": from_store,
    "NIfTI read each time": from_files,
    "torchio Queue": from_queue,
}


def rate(crops: Iterator[int], seconds: float) -> float:
    """Count crops per second after the first batch, which pays for starting the workers."""
    next(crops)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += next(crops)
    return count / (time.perf_counter() - began)


def scans(folder: Path, size: int, limit: int) -> list[Path]:
    """Find the first files under a folder that a crop of this size fits into."""
    import nibabel

    files = []
    for path in sorted(folder.rglob("*.nii*")):
        fits = min(nibabel.nifti1.Nifti1Image.from_filename(path).shape[:3]) >= size
        if fits and not any(word in str(path) for word in ("label", "mask", "seg")):
            files.append(path)
        if len(files) == limit:
            break
    return files


def phantom_files(folder: Path, count: int) -> list[Path]:
    import nibabel

    paths = []
    for seed in range(count):
        image = phantom(seed, (96, 128, 128)).image[0]
        stored = np.rint((image + 4) * 200).clip(0, 32767).astype(np.int16)
        paths.append(folder / f"phantom_{seed:03d}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(stored.transpose(2, 1, 0), np.eye(4)), paths[-1])
    return paths


def choose(folder: Path | None, size: int, limit: int, temporary: Path) -> list[tuple[str, list[Path]]]:
    """Choose the files: of the folder asked for, else of the shared data, else phantoms."""
    shared = Path(os.environ.get("SSL3D_DATA") or Path(__file__).parents[3] / "shared" / "data")
    folders = [folder] if folder else [shared / "hippocampus", shared / "brain_tumour"]
    every = [(path.name, scans(path, size, limit)) for path in folders if path.is_dir()]
    enough = [(name, paths) for name, paths in every if len(paths) >= 2]
    if enough:
        return enough
    phantoms = temporary / "phantoms"
    if not phantoms.exists():
        phantoms.mkdir()
        phantom_files(phantoms, 8)
    return [("phantoms", sorted(phantoms.iterdir()))]


def resident() -> float:
    """Read the memory of this process in MB; NaN without /proc."""
    try:
        return (
            int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 1e6
        )
    except OSError:
        return float("nan")


def open_many(temporary: Path, count: int, shards: int) -> None:
    folder = temporary / f"shards-{shards}"
    folder.mkdir()
    for i in range(shards):
        simulated_index(folder / f"{i:05d}.h5", count // shards, i * (count // shards))
    before, began, processor = resident(), time.perf_counter(), time.process_time()
    collection = open_data([folder])
    opened = time.perf_counter() - began
    columns = (collection.subject_codes, collection.dataset_codes, collection.shapes)
    seconds, memory = time.perf_counter() - began, resident() - before
    print(
        f"open {len(collection)} simulated volumes in {shards} shards: {opened:.2f} s; with subjects, data"
        f" sets and shapes {seconds:.2f} s ({time.process_time() - processor:.2f} s of processor time),"
        f" {memory:.0f} MB more in use"
    )
    del columns


def check_sums(temporary: Path, shape: tuple[int, int, int], count: int, batches: int) -> None:
    """Compare the processor's time of drawing batches, with and without check sums, taking turns."""
    parts, plain, summed = (temporary / name for name in ("parts", "plain.h5", "summed.h5"))
    image = phantom(0, shape).image
    for i in range(count):
        write_part(parts, f"{i:03d}", Record(f"{i}", "phantoms", f"{i}"), image)
    assemble(parts, temporary / "written.h5", {}, [])
    for path in (plain, summed):  # both are copies: the system caches a file by how it was written
        shutil.copy(temporary / "written.h5", path)
    with h5py.File(plain, "r+") as file:
        for data in file["images"].values():
            del data.attrs["crc32"]
    for name in ("sorting", "simclr"):
        (point,) = entry_points(group="ssl3d.proxies", name=name)
        cls = point.load()
        streams = [
            iter(Loader(open_data([path]), {name: (cls, cls.Config())}, 8, workers=0))
            for path in (plain, summed)
        ]
        seconds = np.zeros((batches, 2))
        for batch in range(batches):
            for k in (0, 1) if batch % 2 else (1, 0):
                began = time.process_time()
                next(streams[k])
                seconds[batch, k] = time.process_time() - began
        first, rest = seconds[: batches // 4].sum(axis=0), np.median(seconds[batches // 4 :], axis=0)
        print(
            f"check sums, {count} volumes of {'x'.join(map(str, shape))}, {name}, batches of 8:"
            f" {rest[0] * 1e3:.1f} ms without, {rest[1] * 1e3:.1f} ms with ({rest[1] / rest[0]:.3f}x);"
            f" the first {batches // 4} batches {first[1] / first[0]:.3f}x",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of .nii.gz; by default shared data, else phantoms"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per way and size; 0 skips")
    parser.add_argument("--files", type=int, default=40, help="largest number of files")
    parser.add_argument("--batches", type=int, default=80, help="batches to compare check sums by; 0 skips")
    parser.add_argument("--volumes", type=int, default=100_000, help="simulated volumes to open")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 100], help="stores that hold them")
    options = parser.parse_args(argv)

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch"
        f" {torch.__version__}; {options.workers} workers, batches of {BATCH}, warm cache, best of"
        f" {REPEATS} x {options.seconds / REPEATS:.1f} s; crops per second (times the Queue's)"
    )
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        os.environ["SSL3D_CACHE"] = str(temporary / "cache")
        for size in options.sizes if options.seconds else ():
            for source, paths in choose(options.data, size, options.files, temporary):
                with contextlib.redirect_stderr(io.StringIO()):
                    collection = open_data(paths)  # prepared before anything is measured
                rates = {}
                for way, crops in WAYS.items():
                    # The best of several: what else runs on the machine only ever slows it.
                    stream = crops(paths, size, options.workers)
                    rates[way] = max(rate(stream, options.seconds / REPEATS) for _ in range(REPEATS))
                    del stream
                slowest = rates["torchio Queue"]
                figures = ", ".join(f"{way} {r:.0f} ({r / slowest:.1f}x)" for way, r in rates.items())
                shape = "x".join(str(int(n)) for n in np.median(collection.shapes[:, 1:], axis=0))
                print(
                    f"{size}^3 from {len(paths)} files of {source}, median {shape}: {figures}", flush=True
                )
        if options.batches:
            check_sums(temporary / "large", (155, 240, 240), 4, options.batches)
            check_sums(temporary / "small", (36, 50, 38), 32, options.batches)
        if options.volumes:
            for shards in options.shards:
                open_many(temporary, options.volumes, shards)


if __name__ == "__main__":
    main()
