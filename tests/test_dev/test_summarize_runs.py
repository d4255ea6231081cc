"""Logs of finished runs, read and averaged."""

import json

import pytest

from dev import summarize_runs as tool


def write_run(folder, seed, first, last, ap):
    log = folder / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    (folder / 'some_config.py').write_text(
        f'randomness = dict(seed={seed})\ntrain_cfg = dict(max_epochs=2)\n'
    )
    records = [
        {'loss': 3.0, 'step': 50},
        {'loss': 2.0, 'mse_pair': first, 'step': 100},
        {'coco/bbox_mAP': 0.0, 'step': 1},
        {'loss': 1.0, 'mse_pair': last, 'step': 150},
        {'coco/bbox_mAP': ap, 'step': 2},
    ]
    log.write_text(''.join(json.dumps(r) + '\n' for r in records))
    return folder


def test_run__is_its_last_evaluation_and_the_ends_of_its_values(tmp_path):
    run = tool.read_run(write_run(tmp_path / 'a', 7, 0.5, 0.25, 0.4), ['mse*'])
    assert run == dict(
        name='a',
        config='some_config',
        seed=7,
        epochs=2,
        metrics={'coco/bbox_mAP': 0.4},
        values=dict(mse_pair=dict(first=0.5, last=0.25)),
    )


def test_run__of_a_test_has_its_metrics(tmp_path):
    folder = write_run(tmp_path / 'a', 7, 0.5, 0.25, 0.4)
    log = next(folder.glob('*/vis_data/scalars.json'))
    log.unlink()
    log.parents[1].joinpath('20260101_000000.json').write_text(
        '{"coco/bbox_mAP": 0.3}'
    )
    assert tool.read_run(folder)['metrics'] == {'coco/bbox_mAP': 0.3}


def test_main__writes_a_line_per_run_and_a_table(tmp_path, capsys):
    folders = [
        str(write_run(tmp_path / name, i, 1.0, 0.5, ap))
        for i, (name, ap) in enumerate([('a', 0.4), ('b', 0.5)])
    ]
    out = tmp_path / 'runs.jsonl'
    assert tool.main([*folders, '--keys', 'mse_*', '--out', str(out)]) == 0
    runs = [json.loads(line) for line in out.open()]
    assert [run['seed'] for run in runs] == [0, 1]
    printed = capsys.readouterr().out
    # Half of it: 12.7062 * sqrt(0.005 / 2) = 0.6353.
    assert '0.4500' in printed
    assert '0.6353' in printed


@pytest.mark.parametrize('what', ['log', 'evaluation', 'key'])
def test_main__says_what_is_missing(what, tmp_path, capsys):
    folder = write_run(tmp_path / 'a', 0, 1.0, 0.5, 0.4)
    log = next(folder.glob('*/vis_data/scalars.json'))
    keys = ['--keys', 'mse_*']
    if what == 'log':
        log.unlink()
    elif what == 'evaluation':
        log.write_text('{"loss": 1.0}\n')
    else:
        keys[1] = 'msee_*'
    out = tmp_path / 'runs.jsonl'
    assert tool.main([str(folder), *keys, '--out', str(out)]) == 1
    error = capsys.readouterr().err
    expected = {
        'log': '1 configs and 0 logs',
        'evaluation': 'Did the run finish?',
        'key': "matches 'msee_*'",
    }
    assert expected[what] in error
    assert not out.exists()
