"""A study from the scans to the answer: look, time, plan, run the suite, report."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssl3d.api import (
    UsageError,
    count_of,
    duration,
    locks,
    model_folders,
    open_data,
    parse_json,
    read_model_card,
    record_files,
    unpacked_place,
    write_whole,
)
from ssl3d_benchmarks.leaderboard.report.answer import ahead_of_networks
from ssl3d_benchmarks.leaderboard.report.methods import methods_paragraph
from ssl3d_benchmarks.leaderboard.report.output import ReportOptions, report
from ssl3d_benchmarks.leaderboard.report.overview import in_short
from ssl3d_benchmarks.leaderboard.suite.check import check
from ssl3d_benchmarks.leaderboard.suite.commands import Places
from ssl3d_benchmarks.leaderboard.suite.plan import SuitePlan
from ssl3d_benchmarks.leaderboard.suite.run import RunOptions
from ssl3d_benchmarks.leaderboard.suite.run import run as run_suite
from ssl3d_benchmarks.leaderboard.suite.suite import checked_suite, load_suite
from ssl3d_benchmarks.study.draft import STORE, Sources, content_of, imagenet_of, sources_of, suite_text
from ssl3d_benchmarks.study.look import Look, look
from ssl3d_benchmarks.study.measure import do, measure
from ssl3d_benchmarks.study.options import StudyOptions
from ssl3d_benchmarks.study.plan import Design, Time, choose, designs, few_shares, last_designs
from ssl3d_benchmarks.study.recipes import recipes_for
from ssl3d_benchmarks.study.text import ending, plan_lines
from ssl3d_benchmarks.task import say, show

NOTE = ".jobs/study.json"
"""Note of a plan: its options, its words and what it was made of."""
APART = ("out", "workers", "dry_run", "verbose")
"""Options that change nothing of a plan."""


def study(options: StudyOptions) -> int:
    """Plan a study unless it is planned, do what is left of it, and say what came out.

    Returns:
        The exit status: 1 where a job failed, 128 and more where a signal stopped it.

    Raises:
        UsageError: The hours are too few, or the folder holds a study of other scans.
        DataError: The scans cannot be used, or have no target.
    """
    began, out = time.monotonic(), options.out
    suite, note = out / "suite.yaml", out / NOTE
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: not a folder")
    sources = sources_of(options)
    if not suite.exists():
        _hold_and_plan(options, sources, began)
    elif options.dry_run or not note.exists():
        say(f"{suite} is there and stays as it is: delete it to plan anew")
    planned = _read(note)
    _compare(planned, options, suite)
    for line in planned.get("plan", ()):
        show(line)
    if options.dry_run:
        show(f"\n{suite} holds the plan; the same command without --dry-run does it")
        return 0
    show(f"\n{suite} holds the plan, which may be edited; the same command goes on after a stop\n")
    status = run_suite(RunOptions(str(suite), out, report=False, verbose=options.verbose))
    if status < 128 and any(unpacked_place(path).parent.parent == out for path in record_files(out)):
        _conclude(options, suite)
    return status


# Planning -----------------------------------------------------------------------------------------


def _hold_and_plan(options: StudyOptions, sources: Sources, began: float) -> None:
    """Plan, unless another process is doing so: then wait for it."""
    folder = options.out / ".jobs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {options.out}: {error.strerror}") from error
    lock = folder / "plan.lock"
    waiting = False
    while not locks.take(lock):
        if not waiting:
            say("another process plans the study: waiting for it")
        waiting = True
        time.sleep(locks.WAIT)
    with locks.holding(lock):
        if not (options.out / "suite.yaml").exists():
            _plan(options, sources, began)


def _plan(options: StudyOptions, sources: Sources, began: float) -> None:
    """Look at the data, time every part, and write the plan and its suite."""
    out, name = options.out, " ".join(options.scans)
    places = Places(Path(), out / "work", out)
    seen = _look(options, sources, places)
    recipes = recipes_for(seen, options.recipes)
    imagenet = imagenet_of(options)

    def content(design: Design, steps: tuple[int, int]) -> dict[str, Any]:
        return content_of(options, sources, seen, recipes, imagenet[0], design, steps)

    richest = Design(len(recipes.names), max(options.seeds, 1), (), 1)
    say(f"{name}: {count_of(seen.subjects, 'subject')}; timing a step of each part")
    draft = SuitePlan(checked_suite("study", out / "suite.yaml", content(richest, (1, 0))), places)
    check(draft)
    do(draft, ("prepare", "measure"), options.verbose)
    costs, wanted = measure(draft, seen)
    given = Time(options.hours, options.workers, time.monotonic() - began)
    few = few_shares(seen.train[0])
    plan = choose(
        designs(len(recipes.names), few, options.seeds), costs, given, wanted, options.pretrain_steps,
        options.finetune_steps, last_designs(few, options.seeds, bool(options.imagenet)),
    )  # fmt: skip
    lines = plan_lines(seen, recipes, imagenet, plan, costs, options.hours, options.workers, options.spread)
    final = content(plan.design, (plan.pretrain_steps, plan.finetune_steps))
    check(SuitePlan(checked_suite("suite", out / "suite.yaml", final), places))
    note = {"options": _plain(options), "plan": lines, "look": asdict(seen), "costs": asdict(costs),
            "seconds": plan.seconds}  # fmt: skip
    try:
        write_whole(out / NOTE, json.dumps(note, indent=1) + "\n")
        write_whole(out / "suite.yaml", suite_text(final, lines))
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error


def _look(options: StudyOptions, sources: Sources, places: Places) -> Look:
    """Prepare the scans by the suite's own job, and look at them."""
    words: list[str] = shlex.split(sources.data)
    if sources.stores:
        only = {
            "stores": sources.stores, "contestants": {"scratch": f"scratch:{options.encoder}"},
            "tasks": {"look": {"contestants": ["scratch"], "options": f"--data {sources.data}"}},
        }  # fmt: skip
        first = SuitePlan(checked_suite("study", options.out / "suite.yaml", only), places)
        do(first, ("prepare",), options.verbose)
        words = [str(first.commands.store(STORE))]
    return look(open_data(words), options.target, options.folds, " ".join(options.scans))


def _plain(options: StudyOptions) -> dict[str, Any]:
    values = {key: value for key, value in asdict(options).items() if key not in APART}
    values["scans"] = [
        scan if scan.startswith("phantoms") else str(Path(scan).resolve()) for scan in options.scans
    ]
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _read(note: Path) -> dict[str, Any]:
    """Read the note of a plan; empty where a person wrote the suite, or it cannot be read."""
    try:
        content = parse_json(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _compare(planned: dict[str, Any], options: StudyOptions, suite: Path) -> None:
    """Refuse other scans than those of the plan, and say which other options do not count."""
    then, now = planned.get("options") or {}, _plain(options)
    if then and then.get("scans") != now["scans"]:
        raise UsageError(
            f"{suite} is a study of {' '.join(then.get('scans', ()))}, not of {' '.join(now['scans'])}; "
            "use another --out"
        )
    other = [f"--{key.replace('_', '-')}" for key in then if then[key] != now.get(key)]
    if other:
        say(
            f"{suite} was planned with another {', '.join(other)} and is done as it stands; delete it to "
            "plan anew"
        )


# The end ------------------------------------------------------------------------------------------


def _conclude(options: StudyOptions, suite: Path) -> None:
    """Write the report, and say the answer, the model to use, and how."""
    out = options.out
    loaded = load_suite(suite)
    title = (
        loaded.description.partition("?")[0].capitalize() + "?" if "?" in loaded.description else "Study"
    )
    page = ReportOptions((out,), out / "report", title, loaded.published)
    boards = report(page).boards
    models = [
        (place, _about(place))
        for task in loaded.tasks
        for place in sorted((out / task.name / "models").glob("*"))
        if place.is_dir()
    ]
    text = ending(
        in_short(boards), models, options.scans, out / "report" / "index.html",
        methods_paragraph(boards, page.resamples), _time(out),
        next((words for board in boards if not board.few and (words := ahead_of_networks(board))), ""),
    )  # fmt: skip
    show(f"\n{text}")
    try:
        write_whole(out / "answer.txt", text + "\n")
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error


def _time(out: Path) -> str:
    """Say how long pretraining and fine-tuning took, beside the plan; empty where neither is known."""
    marks = [
        _read(path) for kind in ("pretrain", "score") for path in (out / ".jobs").glob(f"{kind}__*.json")
    ]
    taken = [float(mark["seconds"]) for mark in marks if mark.get("state") == "done" and "seconds" in mark]
    planned = _read(out / NOTE).get("seconds")
    if not taken or not planned:
        return ""
    return f"its jobs took {duration(sum(taken))}, planned were {duration(float(planned))}"


def _about(place: Path) -> str:
    """Describe the models of a folder: whose they are, and their score on test subjects."""
    folders = model_folders(place)
    card = read_model_card(folders[0])
    main = card["record"]["main"]
    score, ends = card["scores"].get(main), card["intervals"].get(main) or (None, None)
    words = f"{card['contestant']['name']}: {main} {score:.3f}" if score is not None else "no score"
    if None not in ends:
        words += f" [{ends[0]:.3f}, {ends[1]:.3f}]"
    several = f", {len(folders)} folds that predict together" if len(folders) > 1 else ""
    chosen = card["training"]["validation"].get(main) is not None
    how = "the best by validation score" if chosen else "no validation subjects to choose by"
    return f"{words} on test subjects; {how}{several}"
