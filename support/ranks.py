"""Several processes, a GPU each: torchrun --nproc-per-node 8 outer_loop.py ...

Every rank is the whole program. It takes its share of a phase's work, keeps what it finishes on
disk at once, and hears of the others' at the phase's end; rank 0 writes the run's files. No draw
depends on who makes it. Without torchrun there is rank 0 alone, and all of this does nothing. On
several machines the run's folder must be one that all of them see.
"""
import os
import signal
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from support.files import UserError

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: str):
    """Meet the other ranks; on CUDA this process uses the GPU of its number. UserError if there are
    fewer GPUs."""
    if SIZE == 1 or dist.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs, and each process "
                            "takes one: --nproc-per-node is too high")
        torch.cuda.set_device(local)
    end_when_told()
    # gloo, as only records are exchanged. A rank may work for hours while the others wait; torchrun
    # sees to it that none waits for a dead one.
    dist.init_process_group("gloo", timeout=timedelta(days=30))


def end_when_told():
    """torchrun ends the others when one rank has died: then one line says so. In a thread of its
    own, as the main one may be waiting in C++."""
    def wait_for_it():
        signal.sigwait([signal.SIGTERM])
        if RANK == 0:
            print("error: another rank has ended, or this one was told to; nothing is lost: the "
                  "same command resumes, with any number of ranks", file=sys.stderr, flush=True)
        os._exit(1)

    if hasattr(signal, "pthread_sigmask"):      # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=wait_for_it, daemon=True).start()


def share_of(costs: list[float]) -> list[int]:
    """The numbers of the items that this rank works on: the dearest first, each to the rank that
    has the least to do so far."""
    loads, owner = [0.0] * SIZE, {}
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += costs[i]
    return [i for i in range(len(costs)) if owner[i] == RANK]


def gather(x) -> list:
    """The x of every rank, in their order."""
    if SIZE == 1:
        return [x]
    everyone = [None] * SIZE
    try:
        dist.all_gather_object(everyone, x)
    except RuntimeError as e:
        why = str(e).splitlines()[0][:100]
        raise UserError(f"another rank has ended ({why}); nothing is lost: the same command "
                        "resumes") from None
    return everyone


def wait():
    """Until all ranks are here."""
    gather(None)
