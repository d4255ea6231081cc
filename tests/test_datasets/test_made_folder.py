"""Folders of made data when runs are killed, or make the same at once."""

import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from era_mm.datasets.made_folder import make_folder


def write(folder):
    (folder / 'a.txt').write_text('a')
    return {'a.txt': '0'}


def make(out, write=write):
    return make_folder(out, 'made.json', 'letters', {'seed': 0}, write)


def test_leftovers__go_and_what_another_writes_stays(tmp_path):
    left, at_work = (tmp_path / f'.x.partial-{i}' for i in 'ab')
    for folder in (left, at_work):
        folder.mkdir()
        write(folder)
    lock = os.open(at_work, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert make(tmp_path / 'x')
    assert not left.exists()
    assert (at_work / 'a.txt').exists()
    os.close(lock)


def test_make__at_once_gives_one_folder_to_all(tmp_path):
    # Locks belong to the open folder, so threads meet as processes do.
    number = 8
    start = threading.Barrier(number, timeout=30)
    out = tmp_path / 'x'

    def together(folder):
        start.wait()
        return write(folder)

    with ThreadPoolExecutor(number) as pool:
        made = list(pool.map(lambda _: make(out, together), range(number)))
    assert sum(made) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        'a.txt',
        'made.json',
    ]
    assert [path.name for path in tmp_path.iterdir()] == ['x']
    assert not make(out)


def test_temporary_folder__is_nobodys_leftover_before_its_lock(
    tmp_path, monkeypatch
):
    # Another run looks for leftovers as soon as the folder is there.
    from era_mm.datasets import made_folder

    make_dir, others = made_folder.tempfile.mkdtemp, []

    def mkdtemp(**kwargs):
        folder = make_dir(**kwargs)
        if not others:
            others.append(
                threading.Thread(target=make, args=(tmp_path / 'x',))
            )
            others[0].start()
            others[0].join(timeout=0.3)
        return folder

    monkeypatch.setattr(made_folder.tempfile, 'mkdtemp', mkdtemp)

    def write_late(folder):
        # The other may finish first; this one's own folder is still there.
        others[0].join(timeout=30)
        return write(folder)

    assert not make(tmp_path / 'x', write_late)
    assert (tmp_path / 'x' / 'a.txt').exists()


def test_make__in_a_folder_that_the_caller_has_locked(tmp_path):
    # As the demos lock the folder that their data lies in.
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert make(tmp_path / 'x')
    os.close(lock)
