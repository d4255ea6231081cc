"""What a new run takes from the file that it starts from."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from era_mm.core import extras_of
from era_mm.engine.runner import TrainingRunner
from era_mm.testing import (
    detector_config,
    distillation_config,
    run_config,
    save_teacher,
)

ERA = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=2))
SOKD = dict(type='era_mm.SoKDDistiller', base=ERA)


class Start(Hook):
    """Keeps the extras before the first step, and each step's losses."""

    def __init__(self):
        self.extras = None
        self.losses = []

    def before_train(self, runner):
        (distiller,) = runner.model.distillers.values()
        self.extras = copy.deepcopy(distiller.state_dict())

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(float(outputs['loss'].detach()))


@pytest.fixture(scope='module')
def other_teacher(tmp_path_factory):
    config = detector_config(width=16, channels=24)
    file = tmp_path_factory.mktemp('other') / 'teacher.pth'
    return save_teacher(config, file, seed=2)


@pytest.fixture
def run(coco, teacher_file, tmp_path):
    def start(name, distiller=ERA, teacher=teacher_file, **kwargs):
        config = run_config(
            distillation_config(distiller, checkpoint=teacher),
            coco,
            tmp_path / name,
            log_level='INFO',
            **dict(val_dataloader=None, val_cfg=None, val_evaluator=None),
            **kwargs,
        )
        pipeline = config.train_dataloader.dataset.pipeline
        # A resumed run draws other flips.
        pipeline[:] = [t for t in pipeline if t.type != 'RandomFlip']
        runner = TrainingRunner.from_cfg(Config(config))
        hook = Start()
        runner.register_hook(hook)
        runner.train()
        (log,) = (tmp_path / name).glob('*/*.log')
        return hook, tmp_path / name / 'epoch_1.pth', log.read_text()

    return start


def with_shares(file):
    """A copy of a checkpoint whose estimates explain half of the variance."""
    content = torch.load(file, weights_only=False)
    state = extras_of(content['state_dict'])['distiller']['state_dict']
    (key,) = (key for key in state if key.endswith('explained'))
    state[key].fill_(0.5)
    torch.save(content, file)
    return file


def of_an_older_version(file):
    """A copy of a checkpoint that does not say what it was measured on."""
    content = torch.load(file, weights_only=False)
    for entry in extras_of(content['state_dict']).values():
        assert len(entry.pop('measured_on')) == 64
    older = file.with_name('older.pth')
    torch.save(content, older)
    return str(older)


def entry_of(file):
    content = torch.load(file, weights_only=False)
    return extras_of(content['state_dict'])['distiller']['state_dict']


MEASURED = ('moments', 'mean', 'std', 'share_weights', 'explained', 'seen')
MEASURED += ('sums', 'value')


def is_measured(key):
    return key.rpartition('.')[2].rstrip('0123456789') in MEASURED


def check(extras, file, again):
    """The measured extras are new ones, all others are the file's."""
    saved = entry_of(file)
    assert {key for key in saved if key.endswith('.seen')}
    for key, value in saved.items():
        if not (is_measured(key) and again):
            assert torch.equal(extras[key], value), key
        elif key.endswith(('seen', 'moments0', 'sums', 'explained', 'mean0')):
            assert value.any(), key
            assert not extras[key].any(), key
        elif key.endswith(('std0', 'value', 'share_weights')):
            assert torch.equal(extras[key], torch.ones_like(value)), key


@pytest.mark.parametrize(
    ('distiller', 'hooks'),
    [(ERA, []), (SOKD, []), (ERA, ['EMAHook']), (ERA, ['era_mm.EMAHook'])],
    ids=['era', 'sokd', 'averaged', 'both averaged'],
)
def test_start__measures_another_teacher_again(
    run, other_teacher, distiller, hooks
):
    _, file, _ = run('a', distiller)
    file = with_shares(file)
    ema = [dict(type=kind) for kind in hooks]
    hook, _, log = run(
        'b', distiller, other_teacher, load_from=str(file), custom_hooks=ema
    )
    check(hook.extras, file, again=True)
    (line,) = (text for text in log.splitlines() if 'measured again' in text)
    assert 'is of another teacher' in line
    found, former = entry_of(file.parents[1] / 'b' / file.name), entry_of(file)
    for key, value in former.items():
        if key.endswith('.seen'):
            assert found[key] == value == 4
        if 'space.mean' in key:
            assert (found[key] - value).abs().max() > 0.1


MORE = dict(ERA, mbrnet=dict(num_branches=3))


@pytest.mark.parametrize(
    'hooks', [[], ['EMAHook'], ['era_mm.EMAHook']], ids=str
)
def test_start__leaves_extras_out_that_do_not_fit(run, tmp_path, hooks):
    _, file, _ = run('a')
    ema = [dict(type=kind) for kind in hooks]
    hook, written, log = run('b', MORE, load_from=str(file), custom_hooks=ema)
    (line,) = (text for text in log.splitlines() if 'do not fit' in text)
    assert "starts without the extras of distiller 'distiller' (ERA" in line
    assert 'other shapes (' in line
    assert 'mbrnet.' in line
    # They are those of a new run, and the student is the file's.
    fresh, _, _ = run('c', MORE)
    for key, value in fresh.extras.items():
        assert torch.equal(hook.extras[key], value), key
    assert hook.losses != fresh.losses
    assert entry_of(written).keys() == fresh.extras.keys()


def test_resume__with_extras_that_do_not_fit_is_refused(run):
    _, file, _ = run('a')
    with pytest.raises(ValueError, match=r'not fit ERADistiller\. other sh'):
        run('b', MORE, load_from=str(file), resume=True)


def test_start__leaves_an_inner_module_out_that_does_not_fit(run):
    _, file, _ = run('a', SOKD)
    policy = dict(SOKD, dafa=dict(ops_per_policy=1))
    hook, _, log = run('b', policy, load_from=str(file))
    assert 'which do not fit: ' in log
    fresh, _, _ = run('c', policy)
    for key, value in fresh.extras.items():
        assert torch.equal(hook.extras[key], value), key


def test_start__keeps_what_was_measured_on_the_same_teacher(run):
    _, file, _ = run('a')
    file = with_shares(file)
    hook, _, log = run('b', load_from=str(file))
    check(hook.extras, file, again=False)
    assert 'measured again' not in log


def test_start__from_an_older_file_measures_again(run):
    _, file, _ = run('a')
    file = with_shares(file)
    hook, _, log = run('b', load_from=of_an_older_version(file))
    check(hook.extras, file, again=True)
    assert 'is of an unknown teacher' in log


def test_resume__from_an_older_file_goes_on_as_before(run):
    whole, file, _ = run('a')
    older = of_an_older_version(file)
    hook, _, log = run('b', load_from=older, resume=True)
    check(hook.extras, file, again=False)
    assert 'measured again' not in log
    assert hook.losses == whole.losses[4:]


def test_start__of_a_method_that_measures_nothing_is_silent(
    run, other_teacher
):
    pkd = dict(type='era_mm.FeatureImitationDistiller')
    _, file, _ = run('a', pkd)
    hook, _, log = run('b', pkd, other_teacher, load_from=str(file))
    saved = entry_of(file)
    assert all(torch.equal(hook.extras[key], saved[key]) for key in saved)
    assert 'measured again' not in log


def test_start__has_the_optimiser_of_the_new_config_inside(run):
    _, file, _ = run('a', SOKD)
    optimizer = dict(type='SGD', lr=0.123)
    _, last, _ = run('b', dict(SOKD, optimizer=optimizer), load_from=str(file))
    content = torch.load(last, weights_only=False)
    entry = extras_of(content['state_dict'])['distiller']
    state = entry['inner_optimizer']
    assert state['policy']['param_groups'][0]['lr'] == 0.123


def test_resume__with_another_teacher_leaves_nobody_to_name(
    run, other_teacher
):
    _, file, _ = run('a')
    _, last, _ = run(
        'b', teacher=other_teacher, load_from=str(file), resume=True
    )
    content = torch.load(last.with_name('epoch_2.pth'), weights_only=False)
    entry = extras_of(content['state_dict'])['distiller']
    assert entry['measured_on'] is None
