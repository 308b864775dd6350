#!/usr/bin/env python
"""Measure what the index of image folders costs: time to build it, and memory of it and of each worker that reads it.

    python tools/bench_index.py --images 1300000 14000000

Names are made up, as long as ImageNet's: the time is that of the processor, without listing a disk. Memory of a worker
is its private pages (Linux: smaps_rollup) after it has read every entry, less those of one that has a single entry to
read. The kind `list` is a list of (path, class), which is what torchvision keeps.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone needs no installation

from effbackbones.data.folder import PathIndex

CLASSES = 1000
WORKERS = 4


def listings(images: int) -> Iterator[tuple[int, list[str]]]:
    per_class = images // CLASSES
    for target in range(CLASSES):
        yield target, [f"n{target:08d}_{i}.JPEG" for i in range(per_class)]


def as_list(images: int) -> list[tuple[str, int]]:
    return [
        (f"/data/imagenet/train/n{target:08d}/{name}", target) for target, names in listings(images) for name in names
    ]


def memory(kind: str) -> float:
    """Return megabytes of this process: Private (clean and dirty) or Rss."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def read_all(index: Sequence[tuple[str, int]], private: Any) -> None:
    for i in range(len(index)):
        index[i]
    private.put(memory("Private"))


def worker_memory(index: Sequence[tuple[str, int]], method: str) -> list[float]:
    context = torch.multiprocessing.get_context(method)
    private = context.SimpleQueue()
    workers = [context.Process(target=read_all, args=(index, private)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    result = [private.get() for _ in workers]
    for worker in workers:
        worker.join()
    return result


def measure(kind: str, images: int, method: str) -> str:
    """Return a row of the table."""
    base = min(worker_memory(PathIndex([(0, ["name"])]), method))
    before, start = memory("Rss"), time.process_time()
    index = PathIndex(listings(images)) if kind == "index" else as_list(images)
    seconds, size = time.process_time() - start, memory("Rss") - before
    grown = [private - base for private in worker_memory(index, method)]
    each = f"{min(grown):.1f} to {max(grown):.1f}"
    return f"| {kind} | {len(index):,} | {method} | {seconds:.1f} | {size:.0f} | {each} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=[1_300_000, 14_000_000])
    parser.add_argument("--kinds", nargs="+", choices=["index", "list"], default=["index"])
    parser.add_argument("--methods", nargs="+", choices=["fork", "spawn"], default=["fork", "spawn"])
    args = parser.parse_args()
    print(f"| Kind | Images | Workers by | Build, s of CPU | Memory, MB | Each of {WORKERS} workers, MB |")
    print("|---|--:|---|--:|--:|--:|")
    for images in args.images:
        for kind in args.kinds:
            for method in args.methods:
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    print(fresh.submit(measure, kind, images, method).result(), flush=True)


if __name__ == "__main__":
    main()
