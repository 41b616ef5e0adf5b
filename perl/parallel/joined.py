"""From what a launcher set in the environment to processes that work together, and out again together.

Libraries that look at the environment themselves (transformers, accelerate) each go their own way: shard what
is sharded already, or deal rows that are dealt already. So inside, the environment is that of a process alone with
one device, and everything between processes is done in this package.
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from perl.errors import MachineError, UserError
from perl.parallel.engine import Engine, engine_asked_for
from perl.parallel.heartbeat import SILENCE, Heartbeat, died
from perl.parallel.processes import ALONE, launched
from perl.system.progress import console
from perl.system.signals import LEAVE

HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
HIDDEN_PREFIXES = ("ACCELERATE_", "FSDP_")
TIMEOUT = timedelta(hours=2)
"""For one process to come to a collective: a dead one is noticed otherwise, a slow one may build a base."""


@contextlib.contextmanager
def joined() -> Iterator[Engine]:
    """Join the processes that a launcher started, and leave together.

    Raises:
        UserError: the launcher asks for an engine that cannot be used; or any that the block raises, in one
            process only: the others leave without a word, with the same status.
        MachineError: another process died.
    """
    processes = launched()
    if processes is ALONE:
        with _as_if_alone(0):
            yield Engine(ALONE)
        return
    with contextlib.ExitStack() as stack:
        engine = engine_asked_for(processes)  # reads the environment
        store, _, _ = next(rendezvous("env://"))
        heartbeat = Heartbeat(store, processes.rank, processes.count)
        stack.enter_context(_as_if_alone(processes.local_rank))
        console.quiet = console.quiet or not processes.main  # to the end: what fails is told once, below
        status = 1
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=store, rank=processes.rank, world_size=processes.count, timeout=TIMEOUT
            )
            yield engine
            status = 0
            processes.barrier()
            heartbeat.leave(0)
            dist.destroy_process_group()
            atexit.register(_exit_at_once)
        except BaseException as error:
            failure = _failure(error, heartbeat)
            status = failure.status if isinstance(failure, UserError) else 1
            if isinstance(failure, KeyboardInterrupt):
                status = 130
            told = heartbeat.first_to_tell()
            heartbeat.leave(status)
            if not told:
                sys.exit(status)
            console.quiet = False
            if failure is error:
                raise
            raise failure from error


def _exit_at_once() -> None:
    """End a process whose work is done and written, before the interpreter ends what libraries left running.

    Their threads (of DeepSpeed, of the launcher's store) may wake while it does, and then abort the process:
    the launcher would call a finished run failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _failure(error: BaseException, heartbeat: Heartbeat) -> BaseException:
    """What has gone wrong: the error itself, or what made a collective fail elsewhere."""
    if isinstance(error, UserError):
        return error
    for number in LEAVE:  # the launcher ends who is left: say why before
        signal.signal(number, signal.SIG_IGN)
    failed = isinstance(error, RuntimeError)  # torch says of a connection what it says of a shape
    cause = heartbeat.cause(SILENCE + 10 if failed and _of_a_connection(error) else 5)
    if isinstance(cause, str):
        what, _, remedy = died(cause).partition("\n  ")
        return MachineError(what, remedy=remedy)
    if isinstance(cause, int) and failed:
        return SystemExit(cause)
    return error


def _of_a_connection(error: BaseException) -> bool:
    said = str(error).lower()
    return any(word in said for word in ("connection", "gloo", "nccl", "socket", "peer"))


@contextlib.contextmanager
def _as_if_alone(device: int) -> Iterator[None]:
    """Inside, the environment says nothing of a launcher, and shows one GPU where there are several."""
    kept = dict(os.environ)
    for name in kept:
        if name in HIDDEN or name.startswith(HIDDEN_PREFIXES):
            del os.environ[name]
    if visible := kept.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))):
        devices = visible.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[device % len(devices)]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
