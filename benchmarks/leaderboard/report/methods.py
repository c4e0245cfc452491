"""A paragraph on how the numbers of a report were made, to paste into a paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssl3d_benchmarks.leaderboard.report.board import Board
from ssl3d_benchmarks.leaderboard.report.names import METHODS, network_title

PROTOCOLS = {
    "linear-probe": "a linear model on the features of the frozen encoder",
    "knn": "the nearest training subjects in the features of the frozen encoder",
    "finetune": "fine-tuning of all weights",
}


def methods_paragraph(boards: Sequence[Board], resamples: int) -> str:
    """Describe data, contestants, scores and statistics of a report in sentences.

    Args:
        boards: Tables of the report.
        resamples: Number of bootstrap resamples.
    """
    arms = [arm for board in boards for arm in board.of_kind("pretrained", "imagenet")]
    pretrained = [arm for arm in arms if arm.kind == "pretrained"]
    records = [record for board in boards for arm in board.arms for record in arm.records()]
    whole = [board for board in boards if not board.few] or boards
    proxies = _listed(METHODS.get(name, name) for arm in pretrained for name in arm.first.proxies)
    networks = _listed(network_title(arm) for arm in pretrained)
    protocols = _listed(PROTOCOLS.get(name, name) for name in map(_protocol, boards))
    releases = _listed(str(record.result.versions.get("ssl3d", "")) for record in records)
    trivial = (
        "Rows without a network (volumes, shape features, intensities, average masks) were scored on the "
        "same subjects."
    )
    sentences = [
        f"Self-supervised encoders were compared with ssl3d {releases} on {_listed(map(_data, whole))}.",
        f"The proxy tasks were {proxies}; the network was {networks}." if proxies else "",
        f"Encoders were scored by {protocols}; the score was {_listed(b.table.main for b in boards)}.",
        "Every pretrained encoder was compared with the same network with random weights: untrained where "
        "the encoder stays frozen, trained from scratch where all weights are trained.",
        trivial if any(board.of_kind("trivial") for board in boards) else "",
        "Scores are means over seeds and subsets of the training subjects. Their 95 % confidence intervals "
        f"come from a bootstrap over test subjects ({resamples} resamples; bias-corrected and accelerated, "
        "Efron 1987; widened for few subjects, Hesterberg 2015), to which the variance between seeds and "
        "between subsets was added (Zou and Donner 2008). No interval was computed with fewer than five "
        "test subjects of a class.",
        "Gains are differences paired by subject, with intervals of Student's t over subjects, seeds and "
        "subsets; their p-values were corrected for the number of tests of each table (Holm 1979).",
        "Subjects and volumes that an encoder had seen in pretraining were found by hashes of names and, "
        "where its checkpoint has them, of voxels; encoders that had seen test subjects were not ranked.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _protocol(board: Board) -> str:
    return "finetune" if board.table.protocol.startswith("finetune") else board.table.protocol


def _data(board: Board) -> str:
    split = board.arms[0].first.result.split
    train, tested = split.get("train", {}), split.get("test", {})
    people = train.get("of_subjects") or train.get("subjects") or "?"
    counts = f"{people} training and {tested.get('subjects', '?')} test subjects"
    return f"{', '.join(board.table.dataset)} ({counts})"


def _listed(words: Iterable[str]) -> str:
    """Join words as a sentence does, each once."""
    names = sorted({word for word in words if word})
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
