"""The measurement of GPUs runs end to end on a CPU, with networks of no size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "scripts" / "speed_gpu.py"
sys.path.append(str(Path(__file__).parents[3] / "docs"))


@pytest.mark.slow
def test_it_measures_both_sides_and_keeps_what_was_measured(tmp_path, monkeypatch):
    pytest.importorskip("monai")
    out = tmp_path / "speed.json"
    out.write_text(json.dumps({"resnet50 96 1 stock": {"seconds": 1}}), encoding="utf-8")
    words = ["--encoders", "tiny_resnet", "tiny_vit", "--sizes", "16", "--sides", "ssl3d", "stock"]
    words += ["--batch", "4", "--steps", "2", "--warmup", "1", "--workers", "0", "--device", "cpu"]
    words += ["--precision", "32", "--volumes", "6", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert kept.pop("resnet50 96 1 stock") == {"seconds": 1}
    assert sorted(kept) == [
        f"{name} 16 1 {side}" for name in ("tiny_resnet", "tiny_vit") for side in ("ssl3d", "stock")
    ]
    for row in kept.values():
        assert row["seconds"] > 0 and row["memory"] > 1e8 and row["flops"] > 1e5
        assert row["volumes_per_s"] == pytest.approx(4 / row["seconds"])
        assert 0 < row["mfu"] < 1
    # Of the same kind of network: the products of a step are as many, heads and all, within a third.
    for name in ("tiny_resnet", "tiny_vit"):
        ours, theirs = (kept[f"{name} 16 1 {side}"]["flops"] for side in ("ssl3d", "stock"))
        assert 0.7 < ours / theirs < 1.4


def test_what_was_not_measured_says_so():
    from generate.speed import _gpu_cell

    assert _gpu_cell(None) == "not measured"
    row = {
        "volumes_per_s": 123.4,
        "mfu": 0.456,
        "memory": 7.1e9,
        "device": "X",
        "precision": "bf16",
        "batch": 8,
    }
    assert _gpu_cell(row) == "123 volumes/s, MFU 0.46, 7.1 GB (X, bf16, 8 a device)"
