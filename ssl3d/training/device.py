"""Where a run computes: Fabric with its ranks, the precision, the threads."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ssl3d.errors import UsageError
from ssl3d.training.options import PretrainOptions

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["auto", "32", "tf32", "bf16", "16"]
Layout = Literal["auto", "channels_last", "contiguous"]

_FABRIC = {"32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
_FAST_BF16 = ("avx512_bf16", "amx_bf16")


def make_fabric(options: PretrainOptions, precision: str) -> Fabric:
    """Return the Fabric of this process and of those that torchrun or SLURM started beside it.

    Args:
        options: Options of the run.
        precision: Precision of the run: 32, tf32, bf16 or 16.

    Raises:
        UsageError: The devices asked for are not there, or cannot do what is asked.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    accelerator = accelerator_of(options)
    devices, nodes = ranks(options, accelerator)
    if precision == "16" and accelerator != "cuda":
        raise UsageError(
            f"--precision 16 needs a CUDA device, but the device is {accelerator}; use bf16 or 32"
        )
    if precision == "tf32":
        if accelerator != "cuda" or torch.cuda.get_device_capability() < (8, 0):
            raise UsageError(
                f"--precision tf32 needs a CUDA device of compute capability 8 or more, but the device is "
                f"{accelerator}; use bf16 or 32"
            )
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    # What it would say here, the run's first line says.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: Any = "auto"
    if options.strategy == "fsdp":
        if accelerator == "mps" or precision == "16":
            cause = f"the device is {accelerator}" if accelerator == "mps" else "the precision is 16"
            raise UsageError(f"--strategy fsdp needs CUDA or a CPU, and bf16 or 32, but {cause}; use ddp")
        strategy = ModelParallelStrategy(_shard, devices * nodes, 1, save_distributed_checkpoint=False)
    elif devices * nodes > 1 or options.strategy == "ddp":
        # Buffers stay as they are on each rank: broadcasting them would overwrite memory banks.
        strategy = DDPStrategy(broadcast_buffers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Fabric(
                accelerator=accelerator,
                devices=devices,
                num_nodes=nodes,
                strategy=strategy,
                precision=_FABRIC[precision],  # type: ignore[arg-type]
            )
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f"--devices {devices} --nodes {nodes}: {' '.join(str(error).split())}"
            ) from error
        except Exception as error:
            if type(error).__name__ != "MisconfigurationException":
                raise
            raise UsageError(f"--devices {devices}: {' '.join(str(error).split())}") from error


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Give each rank its part of all weights, gradients and moments; a step gathers the weights at once.

    Not layer by layer: proxies call parts of an encoder, and an encoder reads weights of its layers, beside
    the calls that would gather them.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # torch 2.4 and 2.5
        from torch.distributed._composable.fsdp import fully_shard

    fully_shard(module, mesh=mesh["data_parallel"])
    return module


def launch(options: PretrainOptions, precision: str) -> Fabric:
    """Start what makes a run of several processes, and return its Fabric.

    Raises:
        UsageError: The devices are not there, or the batch size cannot be shared out among them.
    """
    fabric = make_fabric(options, precision)
    if fabric.world_size > 1:
        _meet_again(fabric.device)
    if fabric.world_size > 1 or fabric.strategy.launcher is not None:
        fabric.launch()
    if options.batch_size % (options.accumulate * fabric.world_size):
        raise UsageError(
            f"--batch-size {options.batch_size}: must be a multiple of --accumulate {options.accumulate} "
            f"times {fabric.world_size} processes"
        )
    return fabric


def _meet_again(device: torch.device) -> None:
    """Bring processes together that torchrun started again, under names of this attempt.

    They meet in the store of the agent that started the first ones, where those' addresses still stand: a
    process that is earlier than the others would wait for one that is gone (torch 2.15).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    import torch.distributed as dist

    place, world = os.environ["MASTER_ADDR"], int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(place, int(os.environ["MASTER_PORT"]), world, is_master=False)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"ssl3d/attempt-{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=world,
    )


def device_words(fabric: Fabric, options: PretrainOptions) -> str:
    """Return where a run computes, in words, as in `cpu, 2 threads, precision 32, contiguous`."""
    if fabric.device.type == "cuda":
        where = torch.cuda.get_device_name(fabric.device)
    else:
        where = f"{fabric.device.type}, {options.threads} threads"
    ranks = f"{fabric.world_size} processes on " if fabric.world_size > 1 else ""
    return f"{ranks}{where}, precision {options.precision}, {options.memory_format}"


def device_of(choice: str, flag: str = "--device", auto: Sequence[str] = ("cuda", "cpu")) -> str:
    """Return the kind of device that a choice means here: cpu, cuda or mps.

    Args:
        choice: One of auto, cpu, cuda, mps, and gpu for cuda.
        flag: Option of the command line that holds the choice, for the message.
        auto: Kinds that auto tries, the best first.

    Raises:
        UsageError: The device that was chosen is not there.

    Example:
        >>> device_of("cpu")
        'cpu'
    """
    choice = "cuda" if choice == "gpu" else choice
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if choice == "auto":
        return next(name for name in auto if there[name])
    if not there.get(choice):
        known = [name for name, here in there.items() if here]
        raise UsageError(
            f"{flag} {choice}: torch sees no such device here; use auto or {' or '.join(known)}"
        )
    return choice


def accelerator_of(options: PretrainOptions) -> str:
    """Return the accelerator of a run: cpu, cuda or mps.

    Raises:
        UsageError: The accelerator that was chosen is not there.
    """
    return device_of(options.device, auto=("cuda", "mps", "cpu"))


def ranks(options: PretrainOptions, accelerator: str) -> tuple[int, int]:
    """Count devices per node, and nodes: those that the user or the launcher says, or all that are here.

    Raises:
        UsageError: The user says another number than the launcher started.
    """
    environ = os.environ
    devices, nodes = options.devices, options.nodes
    if "LOCAL_WORLD_SIZE" in environ and "WORLD_SIZE" in environ:  # torchrun
        local = int(environ["LOCAL_WORLD_SIZE"])
        started = local, int(environ["WORLD_SIZE"]) // local
    elif "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        hosts = int(environ.get("SLURM_NNODES", "1"))
        started = int(environ["SLURM_NTASKS"]) // hosts, hosts
    else:
        return devices or (torch.cuda.device_count() if accelerator == "cuda" else 1), nodes or 1
    for flag, asked, count in (("devices", devices, started[0]), ("nodes", nodes, started[1])):
        if asked not in (0, count):
            raise UsageError(
                f"--{flag} {asked}: the launcher started {count}; leave --{flag} out, or start {asked}"
            )
    return started


def resolve_precision(options: PretrainOptions, cpuinfo: Path = Path("/proc/cpuinfo")) -> Precision:
    """Choose 32, tf32, bf16 or 16: what the options say, or for auto bf16 where the device is fast at it.

    Args:
        options: Options of the run.
        cpuinfo: File in which Linux lists what the CPU can do; elsewhere two matrix products are timed.
    """
    if options.precision != "auto":
        return options.precision
    accelerator = accelerator_of(options)
    if accelerator == "cuda":
        # Not including emulation: bf16 below compute capability 8 is slower than fp32.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    if accelerator == "mps":
        return "32"
    try:
        flags = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return "bf16" if _bf16_gain() > 1.3 else "32"
    if "flags" in flags:
        return "bf16" if any(flag in flags.split() for flag in _FAST_BF16) else "32"
    return "bf16" if _bf16_gain() > 1.3 else "32"


def _bf16_gain(size: int = 768) -> float:
    """Time how many times faster a bf16 matrix product is than an fp32 one."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds(torch.float32) / max(seconds(torch.bfloat16), 1e-9)


def set_threads(options: PretrainOptions) -> int:
    """Set the number of torch's threads, and return it; another number gives other last bits."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return torch.get_num_threads()


def default_workers(options: PretrainOptions, accelerator: str, local_ranks: int) -> int:
    """Count the processes that read: by the options, else by the cores that are left.

    They are few where the CPU also computes.
    """
    if options.workers >= 0:
        return options.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(local_ranks, 1)
    return max(1, min(share - 1, 8)) if accelerator == "cuda" else max(1, min(share // 4, 4))


def check_descriptors(workers: int) -> None:
    """Check that the processes that read may open the files they need, and raise a low limit if allowed.

    Too few would not fail: torch waits for ever for a tensor that it cannot receive.

    Raises:
        UsageError: The limit is too low.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return
    needed = 128 + 64 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not workers or soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    raise UsageError(
        f"--workers {workers}: {workers} processes that read need {needed} open files, but the limit is "
        f"{hard}; raise it (ulimit -n {needed}), or give --workers 0"
    )


def apply_layout(module: nn.Module, encoder: Any, device: torch.device, choice: Layout) -> Layout:
    """Bring kernels into the memory format that is faster, and return its name."""
    from ssl3d.encoders import memory_format, to_memory_format

    if choice == "auto":
        fast = memory_format(encoder, device)
        choice = "channels_last" if fast is torch.channels_last_3d else "contiguous"
    if choice == "channels_last":
        to_memory_format(module, torch.channels_last_3d)
    return choice


BACKEND = "inductor"
"""Compiler of `torch.compile`."""


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile works on a device, by compiling next to nothing.

    Raises:
        UsageError: It does not, as where there is no C++ compiler (CPU) or no Triton (CUDA).
    """
    try:
        torch.compile(torch.square, backend=BACKEND)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds, by backend and version
        reason = " ".join(str(error).split())[:200]
        needed = "Triton" if device.type == "cuda" else "a C++ compiler, such as g++"
        raise UsageError(
            f"--compile: torch.compile does not work here ({type(error).__name__}: {reason}); it needs "
            f"{needed}: install that, or leave --compile out"
        ) from error


def compile_encoders(module: nn.Module) -> None:
    """Replace the forward pass of every encoder in a module by a compiled one; names of weights stay.

    A copy of the module is not compiled. Hooks before a forward pass run as they did, uncompiled: what one
    of them notes in Python would else be compiled in.
    """
    from ssl3d.encoder import Encoder

    inner: set[int] = set()
    for encoder in module.modules():
        if not isinstance(encoder, Encoder) or id(encoder) in inner:
            continue
        inner |= {id(part) for part in encoder.modules()}  # compiled with it
        _compile(encoder)


def _compile(encoder: nn.Module) -> None:
    compiled = torch.compile(encoder.forward, backend=BACKEND)

    def call(*inputs: Any, **named: Any) -> Any:
        for hook in encoder._forward_pre_hooks.values():
            hook(encoder, inputs)
        return compiled(*inputs, **named)

    # As nn.Module.compile does; a copy is made without it.
    encoder._compiled_call_impl = call


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of forward passes in a precision: bfloat16 for bf16, else the weights' own."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def peak_memory(device: torch.device) -> int:
    """Return the bytes at the peak so far: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
