"""Makes what this folder keeps, with the code of before, and holds what its tests repeat: `make.py OUT`.

Every path is relative to the folder that the commands run in, so that nothing knows on which machine, or
where, it was made.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
TIMINGS = {"seconds", "waiting", "volumes_per_s"}

# A narrow encoder whose strides suit volumes of 16 x 24 x 24 voxels.
ENCODER = "--encoder resnet10 --resnet10.width 2 --resnet10.stem-kernel 3 --resnet10.stem-stride 1 1 1"
TRAINING = f"--data store.h5 {ENCODER} --batch-size 4 --threads 1 --workers 0 --precision 32 --holdout 0"
SORTING = "--sorting.slices 4 --sorting.crop 16 16"
SIMCLR = "--simclr.crop 16 16 16 --simclr.hidden 16 --simclr.out 8"

STEPS = 12
RUNS = {
    "sorting": f"--proxy sorting {SORTING} --checkpoint-every 100",
    "several": f"--proxy sorting simclr --balance uncertainty {SORTING} {SIMCLR} --checkpoint-every 3",
    "deepcluster_v2": "--proxy deepcluster_v2 --deepcluster_v2.crop 16 16 16 --deepcluster_v2.hidden 16 "
    "--deepcluster_v2.out 8 --deepcluster_v2.per-volume 2 --deepcluster_v2.every 2 --checkpoint-every 100",
    "intra_inter": "--proxy intra_inter --intra_inter.plane 16 16 --intra_inter.slices 4 "
    "--intra_inter.hidden 16 --intra_inter.out 8 --intra_inter.width 8 --intra_inter.heads 2 "
    "--intra_inter.layers 1 --intra_inter.queue 8 --intra_inter.queue-from 0 --intra_inter.target ema "
    "--checkpoint-every 100",
}
"""Pretraining of each run that was stopped; one is killed, the others save when they are told to stop."""
KILLED = ("several",)

PLAIN = "--data store.h5 --untrained 1 --recalibrate no --folds 3"
TUNING = "--data store.h5 --steps 4 --batch-size 4 --eval-at 1 2 3 4 --lr 1e-3 --threads 1 --workers 0"
SEEN = "resnet=encoders/resnet"
RESULTS = {
    "linear-probe": f"linear-probe {SEEN} {PLAIN} --target classes",
    "linear-probe-masks": f"linear-probe {SEEN} {PLAIN} --target masks --samples 64",
    "knn": f"knn {SEEN} {PLAIN} --target classes",
    "classification": f"finetune encoders/resnet {TUNING} --classification.flip 0.5 "
    "--classification.shift 0.1 --classification.contrast 0.1",
    "segmentation": f"finetune encoders/resnet {TUNING} --task segmentation --segmentation.patch 16 16 16",
    "detection": f"finetune encoders/resnet {TUNING} --task detection --no-scratch true "
    "--detection.patch 16 16 16 --detection.channels 8",
}
"""What follows `ssl3d`, for each folder of records."""

LOCALIZE = "--data store.h5 --crops 2 --share 0.6 0.9"

# Of every proxy the options that make it small, as a run's config.yaml has them.
CROP = {"crop": [16, 16, 16]}
PROXIES = {
    "barlow_twins": {**CROP, "hidden": 16, "out": 8},
    "context_restoration": {**CROP, "width": 4},
    "cube_ordering": {"grid": [1, 2, 2], "crop": [12, 24, 24], "gap": 1, "jitter": 1, "hidden": 16},
    "deepcluster_v2": {**CROP, "hidden": 16, "out": 8, "per_volume": 2},
    "faster_rcnn": {"crop": [24, 24], "channels": 8, "hidden": 8, "rpn_samples": 16, "roi_samples": 8},
    "intra_inter": {"plane": [16, 16], "slices": 4, "hidden": 16, "out": 8, "width": 8, "heads": 2},
    "mae": {**CROP, "width": 4},
    "med3d": CROP,
    "models_genesis": {**CROP, "width": 4},
    "pseudo3d_classification": {"crop": 16},
    "pseudo3d_detection": {"crop": [24, 24], "channels": 8, "hidden": 8, "min_stride": 2, "roi_samples": 8},
    "simclr": {**CROP, "hidden": 16, "out": 8},
    "sorting": {"crop": [16, 16], "slices": 4},
    "swav": {**CROP, "hidden": 16, "out": 8},
    "transvw": {**CROP, "width": 4, "words": 4},
}
IN_PLANE = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2]]
IMAGES = ("pseudo3d_classification", "pseudo3d_detection")
"""Proxies that a deep stride would leave nothing to."""

SUITE = f"""\
description: what a leaderboard was before
encoder: {ENCODER}
budget: {{run: sorting, steps: 4}}
stores: {{people: listed.csv --boxes masks --spacing keep --dataset people}}
runs:
  sorting: --proxy sorting --data {{people}} --batch-size 4 --threads 1 --workers 0 --precision 32 {SORTING}
  simclr: --proxy simclr --data {{people}} --batch-size 4 --threads 1 --workers 0 --precision 32 {SIMCLR}
contestants: {{untrained: "scratch:resnet10:width=2:stem_kernel=3:stem_stride=1,1,1"}}
tasks:
  neighbours:
    protocol: knn
    runs: ["*"]
    contestants: [untrained]
    options: --data {{people}} --target classes --untrained 1 --recalibrate no --folds 3
  organs:
    runs: [sorting]
    contestants: [untrained]
    options: --data {{people}} --target masks --untrained 1 --recalibrate no --samples 64
  tuned:
    protocol: finetune
    runs: [sorting]
    options: --data {{people}} --steps 3 --batch-size 4 --lr 1e-3 --threads 1 --no-trivial true
"""
BOARD = "leaderboard run mine.yaml --data-root . --out board"
REPORT = "leaderboard report board --out report --title Before --resamples 200 --pictures false"


# What the tests ask, too ----------------------------------------------------------------------------


def ssl3d(words, *more):
    """Runs a command in this process, which must end well."""
    from ssl3d.cli import main

    words = [*words.split(), *map(str, more)]
    status = main(words)
    assert status == 0, f"ssl3d {' '.join(words)}: {status}"


def machine():
    """What decides the last bits of a sum: another processor may run other kernels."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        told = sorted(
            {line for line in lines if line.startswith(("model", "flags", "cpu family", "Features"))}
        )
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "kernels": torch.backends.cpu.get_cpu_capability(),
            "processor": hashlib.sha256("\n".join(told).encode()).hexdigest()[:16],
        }
    return {"torch": torch.__version__, "numpy": np.__version__}


def digest(path):
    """sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def gist(tensor):
    """A tensor in a few numbers: of integers their digest, of others sums and some of the values."""
    tensor = torch.as_tensor(tensor).detach().cpu()
    told = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
    if not tensor.is_floating_point():
        return told | {"sha256": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()}
    flat = tensor.double().reshape(-1)
    some = flat[torch.linspace(0, len(flat) - 1, min(4, len(flat))).long()] if len(flat) else flat
    return told | {"size": float(flat.abs().sum()), "norm": float(flat.norm()), "values": some.tolist()}


def weights(folder):
    """The gist of every tensor of an encoder."""
    from safetensors.torch import load_file

    return {name: gist(value) for name, value in load_file(folder / "encoder.safetensors").items()}


def steps(folder):
    """What a run wrote of every step, but how long it took."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def ended(folder):
    """A finished run in digests, and in numbers for where the bytes may be others."""
    last = steps(folder)[-1]
    return {
        "steps": len(steps(folder)),
        "encoder.safetensors": digest(folder / "encoder" / "encoder.safetensors"),
        "last": hashlib.sha256(json.dumps(last, sort_keys=True).encode()).hexdigest(),
        "numbers": {"last": last, "weights": weights(folder / "encoder")},
    }


def volume(channels=1):
    """Two fixed volumes of noise."""
    return torch.from_numpy(np.random.default_rng(7).normal(size=(2, channels, 16, 24, 24))).float()


def embedding(folder):
    """The embedding of the fixed volumes, and the gist of each feature map."""
    import ssl3d

    encoder = ssl3d.load_encoder(folder).eval()
    x = volume(encoder.config.in_channels)
    with torch.no_grad():
        return {"embedding": encoder.embed(x).tolist(), "maps": [gist(one) for one in encoder(x)]}


def records(folder):
    """What every record of a folder found, by its file's name, and what fine-tuning went through."""
    from ssl3d.api import read_result

    found = {}
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder)
        if path.name != "model.json" and not any(part.startswith(".") for part in name.parts):
            one = read_result(path)
            told = {"scores": one.scores, "intervals": one.intervals, "predictions": one.predictions}
            found[str(name)] = told | {"details": one.compute.get("details")}
    return found


def drawn(name):
    """What a proxy draws of two volumes."""
    from ssl3d.api import numpy_rng, open_data

    cls = entry_points(group="ssl3d.proxies")[name].load()
    config = cls.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in PROXIES[name].items()})
    data = open_data([store_of(name)])
    found = []
    for n in (0, 5):
        example = cls.draw(config, data[n], numpy_rng("made before", name, n))
        found.append({key: gist(value) for key, value in sorted(example.items())})
    return found


def first_step(name, out):
    """The losses of the first step of a run with a proxy."""
    import ssl3d

    encoder = {"width": 2, "stem_kernel": 3, "stem_stride": [1, 1, 1]}
    if name in IMAGES:
        encoder["stage_strides"] = IN_PLANE
    run = ssl3d.pretrain(
        name, data=store_of(name), out=out, steps=1, batch_size=4, encoder="resnet10", resnet10=encoder,
        holdout=0.0, eval_every=-1, workers=0, threads=1, precision="32", seed=3, **{name: PROXIES[name]},
    )  # fmt: skip
    return {key: value for key, value in run.metrics[0].items() if key.endswith("loss")}


def store_of(name):
    """The store that a proxy learns from."""
    return "pictures.h5" if name == "pseudo3d_classification" else "store.h5"


def stored(path):
    """What a store holds of every volume, and the digest that runs and records know it by."""
    from ssl3d.api import open_data

    data = open_data([path])
    told = {"digest": data.digest()}
    for one in data:
        about = {
            "subject": one.subject,
            "dataset": one.dataset,
            "label": one.label,
            "spacing": list(one.spacing),
        }
        boxes = None if one.boxes is None else gist(one.boxes)
        mask = gist(one.read_mask()) if one.has_mask else None
        told[one.id] = about | {"image": gist(one.read()), "mask": mask, "boxes": boxes}
    return told


def refused(now):
    """Whether an interval is refused today: one class had fewer than five test subjects."""
    return isinstance(now, list | tuple) and len(now) == 2 and all(end != end for end in now)


def close(now, before, rel=1e-4, abs=1e-5, where=""):
    """Fails, saying where, unless numbers are nearly and all else is exactly what it was.

    Args:
        now: Numbers, words, and lists and dictionaries of them.
        before: The same.
        rel: Largest difference of floats, relative to what they were.
        abs: Largest difference of small ones.
        where: Begins the message.
    """
    if isinstance(before, dict):
        assert isinstance(now, dict) and sorted(now) == sorted(before), f"{where}: {sorted(now)}"
        for key, value in before.items():
            if not refused(now[key]):
                close(now[key], value, rel, abs, f"{where}/{key}")
    elif isinstance(before, list | tuple):
        assert isinstance(now, list | tuple) and len(now) == len(before), f"{where}: {now} not {before}"
        for n, value in enumerate(before):
            close(now[n], value, rel, abs, f"{where}/{n}")
    elif isinstance(before, float):
        same = isinstance(now, int | float) and np.isclose(now, before, rtol=rel, atol=abs, equal_nan=True)
        assert same, f"{where}: {now} not {before}"
    else:
        assert now == before, f"{where}: {now} not {before}"


# Making ---------------------------------------------------------------------------------------------


def scans():
    """Phantoms as NIfTI with their masks, and a list of them; pictures in folders by class."""
    import nibabel
    from PIL import Image

    from ssl3d.api import phantom

    Path("scans").mkdir()
    lines = ["path,subject,label,mask"]
    for n in range(14):
        made = phantom(n, (16, 24, 24), label=n % 2)
        image = np.round((made.image[0] - made.image.min()) * 40).astype(np.uint8)
        affine = np.diag([*made.spacing[::-1], 1.0])
        for kind, voxels in (("image", image), ("mask", made.mask)):
            # D H W run to superior, anterior and right: x y z of NIfTI from last to first.
            nibabel.save(nibabel.Nifti1Image(voxels.transpose(2, 1, 0), affine), f"scans/{kind}-{n}.nii.gz")
        lines.append(
            f"scans/image-{n}.nii.gz,person-{n // 2 if n < 4 else n},{n % 2},scans/mask-{n}.nii.gz"
        )
    Path("listed.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for n in range(9):
        name = ("lie", "stand", "chequer")[n % 3]
        bars = np.indices((16, 20)) // 4 % 2
        pattern = (bars[0], bars[1], bars.sum(0) % 2)[n % 3]
        colours = np.stack([pattern * (120 + 10 * n), pattern * 60, 200 - pattern * 20 * (n % 4)], -1)
        Path("pictures", name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours.astype(np.uint8)).save(f"pictures/{name}/{n}.png")


def stop(name):
    """Starts a run in a process of its own and stops it in the middle."""
    folder = Path("stopped", name)
    words = [sys.executable, "-m", "ssl3d", "pretrain", *pretraining(name).split(), "--out", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, wanted = folder / "metrics.jsonl", 5 if name in KILLED else 3
    while process.poll() is None:
        if lines.exists() and lines.read_bytes().count(b"\n") >= wanted:
            process.send_signal(signal.SIGKILL if name in KILLED else signal.SIGTERM)
            break
        time.sleep(0.0005)
    said = process.communicate()[0]
    assert not (folder / "encoder").exists(), f"{name} came to its end:\n{said}"
    (checkpoint,) = (folder / "checkpoints").glob("*.pt")
    print(name, len(steps(folder)), "steps,", checkpoint)


def pretraining(name):
    """What follows `ssl3d pretrain` for one of the runs."""
    return f"{TRAINING} {RUNS[name]} --steps {STEPS} --eval-every 5"


def encoders():
    """Encoders as they are exported: of a run, with its aggregator, and converted from a 2D network."""
    from ssl3d.api import network_2d

    for name, run in (("resnet", "sorting"), ("intra_inter", "intra_inter")):
        shutil.copytree(Path("whole", run, "encoder"), Path("encoders", name))
    # Weights of few values, which take little room packed.
    network, rng = network_2d("timm/test_efficientnet"), np.random.default_rng(0)
    state = network.state_dict()
    for key, value in state.items():
        if value.ndim > 1:
            scale = 2.0 ** round(np.log2((2 / value[0].numel()) ** 0.5))
            state[key] = torch.from_numpy(rng.choice([-1.0, 0.0, 1.0], value.shape) * scale).float()
    torch.save(state, "network.pth")
    ssl3d("convert timm/test_efficientnet --weights network.pth --kind acs --out encoders/converted")


def board():
    """A suite, done; what no later command reads is left out."""
    Path("mine.yaml").write_text(SUITE, encoding="utf-8")
    ssl3d(BOARD)
    ssl3d(REPORT)


def tidy():
    """Leaves what a test reads, and nothing that tells of the machine."""
    for pattern in ("**/events.*", "**/*.log", "**/*.png", "**/table.txt", "board/work/people*"):
        for path in Path().glob(pattern):
            path.unlink()
    for pattern in (
        "board/work/*/encoder-at-*",
        "board/work/*/checkpoints",
        "board/report",
        "**/pictures",
        "**/tensorboard",
    ):
        for path in Path().glob(pattern):
            shutil.rmtree(path)
    for path in Path("board", ".jobs").glob("*.json"):
        mark = json.loads(path.read_text(encoding="utf-8")) | {"host": "elsewhere"}
        path.write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")


def make():
    """All of it, in the folder that the process is in."""
    os.environ["SSL3D_CACHE"] = "cache"
    torch.set_num_threads(1)
    scans()
    ssl3d("prepare listed.csv --boxes masks --spacing keep --dataset people --workers 0 --out store.h5")
    ssl3d("prepare pictures --colour rgb --workers 0 --out pictures.h5")
    kept = {"machine": machine(), "stores": {}, "runs": {}}
    for name in ("store.h5", "pictures.h5"):
        kept["stores"][name] = stored(name)
    for name in RUNS:
        stop(name)
        ssl3d(f"pretrain {pretraining(name)} --out whole/{name}")
        shutil.copytree(f"stopped/{name}", f"again/{name}")
        ssl3d(f"pretrain --resume again/{name}")
        kept["runs"][name] = ended(Path("whole", name))
        assert ended(Path("again", name)) == kept["runs"][name], f"{name}: resumed to other bytes"
    encoders()
    kept["encoders"] = {
        name: embedding(Path("encoders", name)) for name in ("resnet", "converted", "intra_inter")
    }
    ssl3d("embed encoders/intra_inter --data store.h5 --pool aggregator --out features.h5")
    kept["aggregated"] = {"intra_inter": features("features.h5")}
    for name, words in RESULTS.items():
        ssl3d(words, "--out", f"results/{name}")
    ssl3d(f"localize whole/sorting {LOCALIZE} --out results/localize")
    board()
    kept["proxies"] = {
        name: {"drawn": drawn(name), "loss": first_step(name, f"one/{name}")} for name in PROXIES
    }
    Path("kept.json").write_text(laid_out(kept), encoding="utf-8")
    tidy()


def laid_out(kept):
    """JSON with a line for each thing, as people compare files by lines."""
    parts = []
    for name, value in kept.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items()]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def features(path):
    """The embeddings that `ssl3d embed` wrote."""
    import h5py

    with h5py.File(path) as file:
        return file["embeddings"][:].tolist()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True)
    os.chdir(sys.argv[1])
    make()
