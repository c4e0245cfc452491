"""`ssl3d pretrain`: trains an encoder on unlabelled volumes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

summary = "train an encoder on unlabelled volumes with one proxy task or several"


def main(argv: Sequence[str]) -> int:
    """Start or resume a run; after a signal the exit status is 128 and the signal's number."""
    from ssl3d.training.options import request_of

    asked = request_of(argv)
    if asked.print_only:
        import yaml

        from ssl3d.checkpoint.snapshot import config_of

        values = asked.plan.as_config() if asked.plan else config_of(Path(str(asked.options.resume)))
        yaml.safe_dump(values, sys.stdout, sort_keys=False)
        return 0
    from ssl3d.training.pretrain import resume, start
    from ssl3d.training.run_folder import requeued_run

    if asked.plan is None:
        run = resume(Path(str(asked.options.resume)), asked.options, asked.given)
    else:
        again = requeued_run(asked.plan)
        run = resume(again) if again is not None else start(asked.plan)
    return _leave(128 + run.stopped if run.stopped else 0)


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
