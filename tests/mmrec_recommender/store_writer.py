"""A process whose children write to a store for ever and are killed at random moments.

`store_writer.py FOLDER`: for every line "N SHARE" on stdin it forks a writer, waits for N of its updates, and for SHARE
of the time that an update takes, kills it and answers; with "run" it answers at once, and kills it when stdin ends.
Forked before torch has threads: a child of a process with threads hangs in them.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from store_helpers import items

from mmrec.recommender.store import ItemStore
from mmrec.recommender.store import writer as writer_module


def write_for_ever(folder: str, told: int) -> None:
    torch.set_num_threads(1)
    writer_module._MOST_PATCHED, writer_module._MOST_PATCHED_SHARE = 12, 0.0  # a new base now and then
    store = ItemStore(folder)
    for n in range(10**6):
        with store.writer() as writer:
            writer.upsert(items(["item-3", f"new-{n % 7}"], seed=n))
        os.write(told, b".")
        with store.writer() as writer:
            writer.remove([f"new-{n % 7}"])
        os.write(told, b".")


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def main() -> None:
    running, takes = 0, 0.05
    for line in sys.stdin:
        ours, theirs = os.pipe()
        running = os.fork()
        if not running:
            write_for_ever(sys.argv[1], theirs)
        os.close(theirs)
        if line.strip() == "run":
            print("running", flush=True)
            continue
        updates, share = line.split()
        began = time.monotonic()
        for _ in range(int(updates)):
            os.read(ours, 1)
            began, takes = time.monotonic(), time.monotonic() - began
        time.sleep(float(share) * takes)
        kill(running)
        os.close(ours)
        running = 0
        print("killed", flush=True)
    if running:
        kill(running)


if __name__ == "__main__":
    main()
