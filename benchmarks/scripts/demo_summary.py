"""The end of `make demo`: what was learned, what it is worth, and what to type next."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ssl3d.api import read_result, record_files


def summary(run: Path, results: Path) -> list[str]:
    """Return the lines, of a run of `sorting` and of the linear probe's records of it.

    Args:
        run: Folder of the run.
        results: Folder of the records of `ssl3d linear-probe --target masks`.
    """
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = [step for step in steps if "holdout/sorting/kendall_tau" in step]
    lines = []
    if seen:
        tau = seen[-1]["holdout/sorting/kendall_tau"]
        lines.append(
            "learned: without a label, to put slices of people never seen in their order along the body: "
            f"Kendall's tau {tau:.2f} (1 is the right order, guessing is near 0)"
        )
    dice: dict[str, list[float]] = {}
    for path in record_files(results):
        record = read_result(path)
        dice.setdefault(str(record.contestant["kind"]), []).append(record.scores["dice"])
    means = {kind: sum(values) / len(values) for kind, values in dice.items()}
    rows = {
        "encoder": "with this encoder's features",
        "untrained": "with those of untrained networks",
        "trivial": "with intensity and position alone",
    }
    shares = ", ".join(f"{means[kind]:.2f} {words}" for kind, words in rows.items() if kind in means)
    lines.append(f"worth: a linear layer finds the organs with a Dice of {shares}")
    lines.append(
        "next: ssl3d study FOLDER_OF_SCANS --hours 8 --out study asks whether this pays on your own scans; "
        "ssl3d pretrain --proxy sorting --data FOLDER_OF_SCANS --out runs/first trains one encoder"
    )
    pictures = sorted(results.glob("*.png")) or sorted((run / "pictures").glob("*.png"))
    return [*lines, *(f"picture: {path}" for path in pictures[-1:])]


if __name__ == "__main__":
    print("\n".join(["", *summary(Path(sys.argv[1]), Path(sys.argv[2]))]))
