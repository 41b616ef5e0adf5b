"""The process group defined by the launcher's environment variables.

transformers and accelerate also read these variables and would shard a second time. So inside the group the
environment is that of a single process with one device, and this package does all communication.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from perl.errors import MachineError, UserError
from perl.parallel.engine import Engine, engine_from_environment
from perl.parallel.heartbeat import SILENCE, Heartbeat, death
from perl.parallel.launcher import ranks
from perl.parallel.processes import ALONE, Processes
from perl.system.progress import console
from perl.system.signals import LEAVE

HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
HIDDEN_PREFIXES = ("ACCELERATE_", "FSDP_")
TIMEOUT = timedelta(hours=2)
"""Timeout of collectives: the heartbeat detects dead processes, and a slow one may be building a base."""


@contextlib.contextmanager
def process_group() -> Iterator[Engine]:
    """Enter the group of the processes that a launcher started, if any, and yield their engine.

    Raises:
        UserError: the launcher requests an engine that cannot be used; or the block raised it, in which case only
            one process raises, and the others exit silently with the same status.
        MachineError: another process died.
    """
    processes = Processes(*ranks())
    if processes.count == 1:
        with _single_process_environment(0):
            yield Engine(ALONE)
        return
    engine = engine_from_environment(processes)
    store, _, _ = next(rendezvous("env://"))
    heartbeat = Heartbeat(store, processes.rank, processes.count)
    with _single_process_environment(processes.local_rank):
        console.quiet = console.quiet or not processes.main  # until exit: a failure is reported only once, below
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=store, rank=processes.rank, world_size=processes.count, timeout=TIMEOUT
            )
            yield engine
            processes.barrier()
            heartbeat.leave(0)
            dist.destroy_process_group()
        except BaseException as error:
            failure = _failure(error, heartbeat)
            status = failure.status if isinstance(failure, UserError) else 1
            status = 130 if isinstance(failure, KeyboardInterrupt) else status
            first = heartbeat.first_to_report()
            heartbeat.leave(status)
            if not first:
                sys.exit(status)
            console.quiet = False
            if failure is error:
                raise
            raise failure from error


def _failure(error: BaseException, heartbeat: Heartbeat) -> BaseException:
    """Return the error itself, or the cause of a failed collective in another process."""
    if isinstance(error, UserError):
        return error
    for number in LEAVE:  # the launcher terminates the processes; this one first reports the cause
        signal.signal(number, signal.SIG_IGN)
    failed = isinstance(error, RuntimeError)  # torch raises it for both a lost connection and a wrong shape
    cause = heartbeat.cause(SILENCE + 10 if failed and _is_connection_error(error) else 5)
    if isinstance(cause, str):
        what, remedy = death(cause)
        return MachineError(what, remedy=remedy)
    if isinstance(cause, int) and failed:
        return SystemExit(cause)
    return error


def _is_connection_error(error: BaseException) -> bool:
    message = str(error).lower()
    return any(word in message for word in ("connection", "gloo", "nccl", "socket", "peer"))


@contextlib.contextmanager
def _single_process_environment(device: int) -> Iterator[None]:
    """Hide the launcher's variables, and all GPUs but one, inside the context."""
    with mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name in HIDDEN or name.startswith(HIDDEN_PREFIXES):
                del os.environ[name]
        every = ",".join(map(str, range(torch.cuda.device_count())))
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES", every):
            devices = visible.split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[device % len(devices)]
        yield
