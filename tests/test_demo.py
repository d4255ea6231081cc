"""The demo's stages: what is repeated, and what an interruption leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo import models, report, stages
from demo.classification import ClassificationDemo
from demo.detection import DetectionDemo

ROOT = Path(__file__).resolve().parents[1]


class Work:
    """A stage that counts its runs."""

    def __init__(self, name='work', keeps=False):
        self.calls = []
        self.fails = False
        self.there = True
        self.inputs = {'seed': 0}
        self.stage = stages.Stage(
            name,
            'work',
            10.0,
            lambda: self.inputs,
            self.run,
            lambda result: self.there,
            keeps,
        )

    def run(self, folder, goes_on, screen):
        self.calls.append(goes_on)
        (folder / 'half').write_text('')
        screen.update(0.5, 'half')
        if self.fails:
            raise stages.StageError('broken')
        return {'answer': len(self.calls)}

    def __call__(self, folder):
        with stages.open_screen([self.stage]) as screen:
            return stages.run_stage(self.stage, folder, screen)['result']


def test_run_stage__unchanged_stage_is_not_repeated(tmp_path):
    work = Work()
    assert work(tmp_path) == work(tmp_path) == {'answer': 1}
    assert work.calls == [False]


def test_run_stage__changed_inputs_start_afresh(tmp_path):
    work = Work(keeps=True)
    work(tmp_path)
    work.inputs = {'seed': 1}
    assert work(tmp_path) == {'answer': 2}
    assert work.calls == [False, False]


def test_run_stage__lost_result_starts_afresh(tmp_path):
    work = Work(keeps=True)
    work(tmp_path)
    work.there = False
    assert work(tmp_path) == {'answer': 2}
    assert work.calls == [False, False]


@pytest.mark.parametrize('keeps', [False, True])
def test_run_stage__interrupted_stage_goes_on(tmp_path, keeps):
    work = Work(keeps=keeps)
    work.fails = True
    with pytest.raises(stages.StageError, match='broken'):
        work(tmp_path)
    work.fails = False
    work(tmp_path)
    assert work.calls == [False, keeps]


def test_run_stage__interrupted_stage_with_other_inputs_starts_afresh(
    tmp_path,
):
    work = Work(keeps=True)
    work.fails = True
    with pytest.raises(stages.StageError):
        work(tmp_path)
    work.fails = False
    work.inputs = {'seed': 1}
    work(tmp_path)
    assert work.calls == [False, False]


def test_run_stage__counts_the_seconds_of_every_attempt(tmp_path):
    work = Work(keeps=True)
    work.fails = True
    with pytest.raises(stages.StageError):
        work(tmp_path)
    file = tmp_path / 'work' / 'stage.json'
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, 'seconds': 100.0}))
    work.fails = False
    work(tmp_path)
    assert json.loads(file.read_text())['seconds'] >= 100.0


def test_run_logged__failure_shows_the_end_of_the_log(tmp_path):
    code = 'import sys; print("the reason"); sys.exit(3)'
    log = tmp_path / 'a.log'
    with pytest.raises(stages.StageError, match='the reason') as caught:
        stages.run_logged(
            [sys.executable, '-c', code], log, lambda: None, threads=1
        )
    assert 'status 3' in str(caught.value)
    assert str(log) in str(caught.value)


def test_run_logged__interruption_ends_the_program(tmp_path):
    def stop():
        raise KeyboardInterrupt

    code = 'import time; print("started", flush=True); time.sleep(60)'
    with pytest.raises(KeyboardInterrupt):
        stages.run_logged(
            [sys.executable, '-c', code], tmp_path / 'a.log', stop, threads=1
        )


def test_alone__second_demo_is_refused(tmp_path):
    with (
        stages.alone(tmp_path),
        pytest.raises(stages.StageError, match='Another demo'),
        stages.alone(tmp_path),
    ):
        pass
    with stages.alone(tmp_path):
        pass


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, as a list with one number."""
    found = [0.0]
    monkeypatch.setattr(stages.time, 'monotonic', lambda: found[0])
    return found


@pytest.fixture
def shown(monkeypatch):
    """What a screen has shown: share, seconds left, and those of the demo."""
    found = []
    monkeypatch.setattr(
        stages.Screen,
        '_show',
        lambda self, share, left, left_all, text: found.append(
            (round(share, 3), round(left, 3), round(left_all, 3))
        ),
    )
    return found


def test_screen__time_left_follows_the_pace(now, shown):
    first, second = Work('first').stage, Work('second').stage
    with stages.open_screen([first, second]) as screen:
        screen.begin(first)
        assert shown[-1] == (0.0, 10.0, 20.0)
        screen.update(0.0, '')
        # Half of a stage of 10 s took 20 s: 20 s are left of this one, and
        # the next will take 40 s.
        now[0] = 20.0
        screen.update(0.5, '')
        assert shown[-1] == (0.5, 20.0, 60.0)
        now[0] = 40.0
        screen.update(1.0, '')
        screen.finish(40.0)
        screen.begin(second)
        assert shown[-1] == (0.0, 40.0, 40.0)


def test_screen__stage_that_finds_its_work_done_says_nothing_of_the_pace(
    now, shown
):
    first, second, third = (Work(name).stage for name in ('a', 'b', 'c'))
    with stages.open_screen([first, second, third]) as screen:
        screen.begin(first)
        screen.finish(0.1)
        screen.begin(second)
        assert shown[-1][1] == 10.0
        screen.update(0.0, '')
        now[0] = 0.2
        screen.update(1.0, '')
        screen.finish(0.2)
        screen.begin(third)
        assert shown[-1][1] == 10.0


def test_screen__resumed_stage_is_timed_from_where_it_went_on(now, shown):
    stage = Work().stage
    with stages.open_screen([stage]) as screen:
        screen.begin(stage)
        screen.update(0.5, '')
        # A quarter took 10 s, so the last quarter will too.
        now[0] = 10.0
        screen.update(0.75, '')
    assert shown[-1][1] == 10.0


@pytest.fixture
def detection():
    return DetectionDemo.table


@pytest.fixture
def classification():
    return ClassificationDemo.table


STOCK = {'missing': [], 'unexpected': [], 'AP': 0.312}


def records(metrics, *modes):
    variants = ('teacher', 'plain', 'era_S', *(f'era_{m}' for m in modes))
    of_modes = {
        f'{mode}/{key}': value * (1.1 + 0.1 * number)
        for number, mode in enumerate(modes)
        for key, value in metrics.items()
    }
    results = {
        'test_teacher': {key: 2 * value for key, value in metrics.items()},
        'test_plain': {key: value / 2 for key, value in metrics.items()},
        'test_era': metrics | of_modes,
        'measure': {
            'num_images': 10,
            'image_size': 128,
            'timed_images': 200,
            'variants': {
                name: {'parameters': 250_000, 'ms_per_image': 9.876}
                for name in variants
            },
        },
    }
    return {
        name: {'result': result, 'seconds': 30.0, 'resumed': False}
        for name, result in results.items()
    }


AP = {'coco/bbox_mAP': 0.312, 'coco/bbox_mAP_50': 0.5}


def test_report__writes_the_table(tmp_path, capsys, detection):
    report.report(records(AP, 'T', 'ST'), STOCK, tmp_path, detection)
    table = json.loads((tmp_path / 'table.json').read_text())
    assert table['minutes'] == 2.0
    assert table['stock_mmdet'] == STOCK
    assert [(row['detector'], row['AP']) for row in table['rows']] == [
        ('teacher', 62.4),
        ('plain student', 15.6),
        ('ERA student, S', 31.2),
        ('ERA student, T', 34.3),
        ('ERA student, ST', 37.4),
    ]
    lines = (tmp_path / 'table.md').read_text().splitlines()
    assert '| ERA student, T | 34.3 | 55.0 | 0.25 M | 9.9 |' in lines
    assert lines[-1].startswith('COCO AP on the 10 test scenes, one seed.')
    out = capsys.readouterr().out
    assert 'no missing keys' in out
    assert 'AP 31.2 (mode S above: 31.2)' in out


@pytest.mark.parametrize('what', ['missing', 'unexpected'])
def test_report__keys_that_stock_mmdet_refuses_are_an_error(
    tmp_path, what, detection
):
    with pytest.raises(stages.StageError, match='neck_extra'):
        report.report(
            records(AP),
            STOCK | {what: ['neck_extra']},
            tmp_path,
            detection,
        )


def test_report__stock_host_must_give_mode_s(tmp_path, detection):
    with pytest.raises(stages.StageError, match=r'AP 31.2, but gives 33.0'):
        report.report(records(AP), STOCK | {'AP': 0.33}, tmp_path, detection)


def test_report__metric_that_is_not_there(tmp_path, detection, classification):
    # Nothing detected is an AP of 0; an accuracy is always there.
    assert detection.value({}, 'coco/bbox_mAP') == 0
    with pytest.raises(KeyError, match='accuracy/top1'):
        classification.value({}, 'accuracy/top1')


def test_report__takes_the_metrics_of_classification(
    tmp_path, capsys, classification
):
    found = records({'accuracy/top1': 50.0}, 'E0', 'T')
    stock = {'missing': [], 'unexpected': [], 'top1': 0.5}
    report.report(found, stock, tmp_path, classification)
    lines = (tmp_path / 'table.md').read_text().splitlines()
    assert lines[0] == '| classifier | top1 | parameters | ms per image |'
    assert [line.split(' | ')[:2] for line in lines[2:7]] == [
        ['| teacher', '100.0'],
        ['| plain student', '25.0'],
        ['| ERA student, S', '50.0'],
        ['| ERA student, E0', '55.0'],
        ['| ERA student, T', '60.0'],
    ]
    assert lines[6].endswith('| 0.25 M | 9.88 |')
    assert 'Top-1 accuracy in percent on the 10 test crops' in lines[-1]
    out = capsys.readouterr().out
    assert 'Stock mmpretrain' in out
    assert 'top1 50.0 (mode S above: 50.0)' in out


def test_time_all__median_of_turns_without_the_first(monkeypatch):
    """Each variant takes its turn on an image; reading is not timed."""
    now = [0.0]
    monkeypatch.setattr(models.time, 'perf_counter', lambda: now[0])
    calls = []

    def variant(name, seconds):
        def predict(data):
            calls.append((name, data))
            late = 100 if len(calls) <= 2 * models.WARM_UP else 0
            now[0] += seconds + late

        return predict

    def read(file):
        now[0] += 7
        return file

    told = []
    times = models.time_all(
        {'a': variant('a', 0.001), 'b': variant('b', 0.003)},
        ['x', 'y', 'z'],
        read,
        told.append,
    )
    assert times == pytest.approx({'a': 1.0, 'b': 3.0})
    assert calls[:6] == [(name, file) for file in 'xyz' for name in ('a', 'b')]
    assert told == sorted(told)


def test_stages__teacher_is_judged_before_anything_learns_from_it(tmp_path):
    names = [
        stage.name for stage in DetectionDemo(tmp_path, 1, False).stages()
    ]
    assert names[:3] == ['data', 'teacher', 'test_teacher']
    assert names[3:7] == ['plain', 'era', 'test_plain', 'test_era']


def test_configs__demo_of_detection_has_one_short_schedule(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    built = DetectionDemo(tmp_path, 1, False)
    built.records['teacher'] = {'result': {'checkpoint': 'x'}}
    for name in built.configs:
        cfg = built.config(name)
        warm_up, cosine = cfg.param_scheduler
        epochs = cfg.train_cfg.max_epochs
        assert epochs < 15
        assert cfg.train_cfg.val_interval == cosine.T_max == cosine.end
        assert cosine.end == epochs
        # In proportion to that of the configs, with 150 iterations an epoch.
        assert abs(warm_up.end / (150 * epochs) - 450 / (150 * 15)) < 0.02
        for split in ('train', 'val', 'test'):
            assert cfg[f'{split}_dataloader'].num_workers == 0
    assert built.config('era').custom_hooks[0].modes == ['T', 'ST']
    assert "custom_hooks.0.modes=['T', 'ST']" in built.command('x', 'era')
    assert not any('modes' in word for word in built.command('x', 'plain'))


def test_configs__demo_of_detection_has_steadier_betas(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for demo, betas in (
        (DetectionDemo, (0.9, 0.99)),
        (ClassificationDemo, None),
    ):
        built = demo(tmp_path, 1, False)
        built.records['teacher'] = {'result': {'checkpoint': 'x'}}
        for name in built.configs:
            optimizer = built.config(name).optim_wrapper.optimizer
            assert optimizer.get('betas') == betas, name
            # As the command line has it.
            words = built.command('train.py', name)
            text = 'optim_wrapper.optimizer.betas=(0.9, 0.99)'
            assert (text in words) == (betas is not None)


@pytest.mark.parametrize(
    ('trained', 'quick'),
    [('teacher', True), ('plain', False), ('era', False)],
)
def test_teacher__alone_is_judged_and_not_in_a_quick_run(
    trained, quick, tmp_path, monkeypatch
):
    built = DetectionDemo(tmp_path, 1, quick)

    def run_program(command, name, watch):
        (tmp_path / 'one').mkdir()
        (tmp_path / 'one/metrics.json').write_text('{}')

    monkeypatch.setattr(built, 'run_program', run_program)
    monkeypatch.setattr(built, 'command', lambda *args: [])
    built.records[trained] = {'result': {'checkpoint': 'x', 'sha256': 'y'}}
    assert built.test_stage(trained).run(tmp_path, False, None) == {}


@pytest.mark.parametrize(
    ('demo', 'metrics', 'said'),
    [
        (DetectionDemo, {'coco/bbox_mAP': 0.537}, None),
        (DetectionDemo, {'coco/bbox_mAP': 0.35}, None),
        (DetectionDemo, {'coco/bbox_mAP': 0.349}, 'has AP 34.9, '),
        (ClassificationDemo, {'accuracy/top1': 75.0}, None),
        (ClassificationDemo, {'accuracy/top1': 74.9}, 'has top1 74.9, '),
        (
            DetectionDemo,
            {'coco/bbox_mAP': 0.043},
            'has AP 4.3, .* at least 35:',
        ),
        # mmdet reports nothing if nothing was detected.
        (DetectionDemo, {}, 'has AP 0.0, '),
        (ClassificationDemo, {'accuracy/top1': 87.5}, None),
        (ClassificationDemo, {'accuracy/top1': 12.0}, 'has top1 12.0, '),
    ],
)
def test_teacher__whose_training_failed_stops_the_demo(
    demo, metrics, said, tmp_path, monkeypatch
):
    built = demo(tmp_path, 1, False)
    built.records['teacher'] = {'result': {'checkpoint': 'x', 'sha256': 'y'}}
    built.records['data'] = {'result': {}}
    monkeypatch.chdir(ROOT)
    stage = built.test_stage('teacher')

    def run_program(command, name, watch):
        (tmp_path / 'one').mkdir()
        (tmp_path / 'one/metrics.json').write_text(json.dumps(metrics))

    monkeypatch.setattr(built, 'run_program', run_program)
    if said is None:
        assert stage.run(tmp_path, False, None) == metrics
        return
    with pytest.raises(stages.StageError, match=said):
        stage.run(tmp_path, False, None)


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize(
    ('module', 'num_stages', 'files'),
    [
        ('demo.detection', 8, ('table.json', 'table.md', 'detections.png')),
        ('demo.classification', 9, ('table.json', 'table.md')),
    ],
)
def test_demo__quick_run_from_data_to_table(
    tmp_path, module, num_stages, files
):
    command = [sys.executable, '-m', module, '--quick']
    command += ['--threads', '1', '--work-dir', str(tmp_path / 'demo')]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert 'no missing keys, no unexpected keys' in first.stdout
    for name in files:
        assert (tmp_path / 'demo' / name).stat().st_size > 0
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count('unchanged') == num_stages
