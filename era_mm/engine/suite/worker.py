"""Runs a phase of a cell, in a separate process.

``python -m era_mm.engine.suite.worker train|test FOLDER`` trains or tests the
cell in a folder, as ``train`` and ``test`` do, and writes train.json or
test.json there.
"""

import argparse
import hashlib
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run a phase; returns the exit status."""
    parser = argparse.ArgumentParser(prog='worker', description=__doc__)
    parser.add_argument('phase', choices=['train', 'test'])
    parser.add_argument('folder', type=Path)
    args = parser.parse_args(argv)
    threading.Thread(target=_end_with_the_suite, daemon=True).start()
    began = time.monotonic()
    run = _train if args.phase == 'train' else _test
    status, found = run(args.folder)
    if status:
        return status
    from .cells import write_json

    found |= _of_this_process()
    found['seconds'] = round(time.monotonic() - began, 1)
    write_json(args.folder / f'{args.phase}.json', found)
    return 0


def _end_with_the_suite() -> None:
    """Stop when stdin is closed, because the suite has ended.

    A suite that was killed cannot stop its runs, and the next one would start
    them again.
    """
    # Not through Python's buffer, whose lock a forked data worker would find
    # taken for ever.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _train(folder: Path) -> tuple[int, dict[str, Any]]:
    from era_mm.cli import run_train
    from era_mm.engine.preflight import find_fault_among

    work_dir = folder / 'train'
    argv = [str(folder / 'config.py'), '--work-dir', str(work_dir)]
    last = work_dir / 'last_checkpoint'
    if last.exists() and not find_fault_among(last.read_text().strip()):
        argv.append('--resume')
    else:
        # A run that was stopped before its first checkpoint.
        shutil.rmtree(work_dir, ignore_errors=True)
    status = run_train(argv)
    if status:
        return status, {}
    file = last.read_text().strip()
    return 0, dict(checkpoint=file, weights=_checksum(file))


def _checksum(file: str) -> str:
    """SHA-256 of the names and values of the weights in a file."""
    import torch

    from era_mm.core.safe_files import load_file

    found = hashlib.sha256()
    for name, value in sorted(load_file(file)['state_dict'].items()):
        found.update(f'{name} {value.dtype} {tuple(value.shape)} '.encode())
        found.update(
            value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
    return found.hexdigest()


def _test(folder: Path) -> tuple[int, dict[str, Any]]:
    from era_mm.cli import run_test

    from .cells import read_json

    work_dir = folder / 'test'
    shutil.rmtree(work_dir, ignore_errors=True)
    given = read_json(folder / 'job.json') or {}
    trained = read_json(folder / 'train.json') or {}
    checkpoint = given.get('checkpoint') or trained['checkpoint']
    argv = [str(folder / 'config.py'), checkpoint]
    return run_test([*argv, '--work-dir', str(work_dir)]), {}


def _of_this_process() -> dict[str, Any]:
    """Versions, machine and peak memory."""
    import torch

    from era_mm.engine.benchmark_report import machine
    from era_mm.hosts import versions

    on_gpu = torch.cuda.is_available()
    # Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = dict(process_mib=round(peak / MIB))
    if on_gpu:
        memory['gpu_mib'] = round(torch.cuda.max_memory_allocated() / MIB)
    return dict(
        versions=versions(),
        machine=machine(torch.device('cuda' if on_gpu else 'cpu')),
        memory=memory,
    )


if __name__ == '__main__':
    sys.exit(main())
