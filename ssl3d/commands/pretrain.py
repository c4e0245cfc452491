"""`ssl3d pretrain`: trains an encoder on unlabelled volumes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssl3d.training.options import Request

summary = "train an encoder on unlabelled volumes with one proxy task or several"


def main(argv: Sequence[str]) -> int:
    """Start or resume a run; after a signal the exit status is 128 and the signal's number."""
    from ssl3d.training.options import request_of

    asked = request_of(argv)
    if asked.printed is not None:
        print_plan(asked)
        return 0
    from ssl3d.training.pretrain import resume, start
    from ssl3d.training.run_folder import requeued_run

    if asked.plan is None:
        run = resume(Path(str(asked.options.resume)), asked.options, asked.given)
    else:
        again = requeued_run(asked.plan)
        run = resume(again) if again is not None else start(asked.plan)
    return _leave(128 + run.stopped if run.stopped else 0)


def print_plan(asked: Request) -> None:
    """Print the options of a run as a file that `--config` reads back."""
    from ssl3d.config import print_config
    from ssl3d.training.options import PretrainOptions

    words = asked.printed or set()
    if asked.plan is None:
        from ssl3d.checkpoint.snapshot import config_of

        print_config(config_of(Path(str(asked.options.resume))), PretrainOptions, {}, words)
        return
    configs = {name: kind.Config for name, (kind, _) in asked.plan.proxies.items()}
    configs[asked.plan.encoder_name] = asked.plan.encoder.Config
    out = asked.plan.options.out
    values = asked.plan.as_config() | ({"out": str(out)} if out else {})
    print_config(values, PretrainOptions, configs, words)


def _leave(status: int) -> int:
    """End a process of several at once, without Python's own end; let any other go on."""
    import os

    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        # A thread of the process group that outlives the interpreter aborts, one time in many ("terminate
        # called without an active exception"), and torchrun calls a finished run a failed one.
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
