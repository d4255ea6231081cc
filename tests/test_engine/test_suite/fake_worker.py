"""Stands for the worker: leaves at once what a run would leave.

Two epochs of two steps. In the working directory, a file ``slow`` makes the
third step last, ``broken`` breaks the cells whose name it holds, and every
call is noted in ``calls``.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

EPOCHS = 2


def end_with_the_suite():
    sys.stdin.read()
    os._exit(1)


def train(folder, seed):
    work_dir = folder / 'train'
    last = work_dir / 'last_checkpoint'
    begun = int(last.read_text()[-5]) if last.exists() else 0
    # Attempts sort by their names, which are times.
    log = work_dir / f'attempt{begun}' / 'vis_data'
    log.mkdir(parents=True, exist_ok=True)
    for epoch in range(begun, EPOCHS):
        for step in (1, 2):
            entry = dict(
                loss=1.0,
                time=0.5,
                iter=2 * epoch + step,
                step=2 * epoch + step,
                epoch=epoch + 1,
            )
            with (log / 'scalars.json').open('a') as stream:
                stream.write(json.dumps(entry) + '\n')
            if epoch and Path('slow').exists():
                time.sleep(60)
        file = work_dir / f'epoch_{epoch + 1}.pth'
        # What a checkpoint begins with.
        file.write_bytes(b'\x80' + str(folder).encode() + b'%d' % seed)
        last.write_text(str(file))
    return dict(checkpoint=str(file), weights=f'{folder.name} {seed}')


def test(folder, seed):
    era = 3 + (seed or 0) % 2
    bonus = {'plain': 0, 'teacher': 9, 'plain_x2': 1, 'era': era, 'half': era}
    value = 0.4 + 0.01 * (seed or 0) + 0.01 * bonus[folder_name(folder)]
    log = folder / 'test' / '1'
    log.mkdir(parents=True, exist_ok=True)
    metrics = {'m/ap': value, 'T/m/ap': value + 0.01, 'time': 0.1}
    if 'era' not in folder.parts:
        del metrics['T/m/ap']
    (log / '1.json').write_text(json.dumps(metrics))
    return {}


def folder_name(folder):
    seeded = folder.name.startswith('seed')
    return folder.parent.name if seeded else folder.name


def main():
    threading.Thread(target=end_with_the_suite, daemon=True).start()
    phase, folder = sys.argv[1], Path(sys.argv[2])
    with Path('calls').open('a') as calls:
        calls.write(f'{phase} {folder}\n')
    broken = Path('broken')
    if broken.exists() and broken.read_text() in str(folder):
        print('ValueError: broken on purpose')
        sys.exit(3)
    name = folder.name
    seed = int(name.removeprefix('seed')) if name.startswith('seed') else 0
    found = (train if phase == 'train' else test)(folder, seed)
    found |= dict(
        versions=dict(torch='2'),
        machine=dict(device='cpu', cpu='abacus', threads=1),
        memory=dict(process_mib=100 + seed),
        seconds=1.0,
    )
    (folder / f'{phase}.json').write_text(json.dumps(found))


if __name__ == '__main__':
    main()
