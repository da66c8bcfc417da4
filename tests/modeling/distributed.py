"""Runs a function in processes that form a group, as torchrun would start them."""

import os
import socket
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

PATIENCE = 120  # seconds until processes count as hung


def _process(rank, world_size, port, function, folder, arguments):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def in_processes(world_size, function, *arguments, patience=PATIENCE):
    """What `function(rank, *arguments)` returns in each; it must stand at the top of a module.

    Raises:
        TimeoutError: where one of them is not done after `patience` seconds; all are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, port, function, folder, arguments)
        started = multiprocessing.spawn(_process, args=arguments, nprocs=world_size, join=False)
        end = time.monotonic() + patience
        while not started.join(timeout=1):
            if time.monotonic() > end:
                for process in started.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__}: processes hang after {patience} seconds")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
