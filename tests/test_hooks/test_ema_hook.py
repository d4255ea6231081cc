"""Averaged extras: by hand, in validation, in files, after a resumption."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import MODELS

from era_mm.core import extras_of
from era_mm.hooks.ema import EMAHook
from era_mm.testing import detector_config, distillation_config, run_config
from era_mm.testing.runs import recorded_run

ERA = dict(type='era_mm.ERADistiller', form='released', logit=None)
MOMENTUM = 0.25


class Watch(Hook):
    """Keeps the extras of each iteration and of each validation."""

    priority = 'LOWEST'

    def __init__(self):
        self.trained, self.validated, self.after = [], [], []

    @staticmethod
    def extras(runner):
        return copy.deepcopy(runner.model.distillers.state_dict())

    def after_train_iter(self, runner, *args, **kwargs):
        self.trained.append(self.extras(runner))

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            self.validated.append(self.extras(runner))

    def after_val_epoch(self, runner, metrics=None):
        self.after.append(self.extras(runner))


@pytest.fixture
def run(coco, teacher_file, tmp_path):
    def start(name, resume_from=None, distiller=ERA, **hook):
        watch = Watch()
        config = run_config(
            distillation_config(distiller, checkpoint=teacher_file),
            coco,
            tmp_path / name,
            custom_hooks=[
                dict(type='era_mm.EMAHook', momentum=MOMENTUM, **hook)
            ],
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
        )
        runner, steps = recorded_run(config, resume_from, [watch])
        return runner, steps, watch

    return start


def averaged(trained):
    """avg_0 = x_0, avg_t = (1 - m) avg_(t-1) + m x_t, written out.

    mmengine adds the first step to itself, which changes nothing.
    """
    averages = copy.deepcopy(trained[0])
    for state in trained[1:]:
        for key, value in state.items():
            if value.is_floating_point():
                averages[key] = averages[key].lerp(value, MOMENTUM)
    return averages


def file_of(folder, epoch):
    return torch.load(folder / f'epoch_{epoch}.pth', weights_only=False)


def entry(checkpoint):
    return extras_of(checkpoint['state_dict'])['distiller']['state_dict']


def close(found, expected, names, prefix=''):
    for name in names:
        torch.testing.assert_close(
            found[name], expected[f'{prefix}{name}'], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize('update_buffers', [False, True])
def test_extras__are_averaged_validated_and_written(
    run, tmp_path, update_buffers
):
    runner, _, watch = run('a', update_buffers=update_buffers)
    distillers = runner.model.distillers
    parameters = [name for name, _ in distillers.named_parameters()]
    buffers = [name for name, _ in distillers.named_buffers()]
    assert parameters
    assert buffers
    assert len(watch.trained) == 8
    for epoch, count in ((1, 4), (2, 8)):
        expected = averaged(watch.trained[:count])
        last = watch.trained[count - 1]
        close(watch.validated[epoch - 1], expected, parameters)
        # Put back as trained.
        close(watch.after[epoch - 1], last, [*parameters, *buffers])
        found = entry(file_of(tmp_path / 'a', epoch))
        found = {f'distiller.{key}': value for key, value in found.items()}
        close(found, expected, parameters)
        close(found, last, buffers)
        moved = [
            (expected[name] - last[name]).abs().max() for name in parameters
        ]
        assert max(moved) > 1e-5


def test_file__gives_what_validation_saw(run, coco, teacher_file, tmp_path):
    """E0, T and ST of a file are those of both averages."""
    _, _, watch = run('a')
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    checkpoint = file_of(tmp_path / 'a', 2)
    model.load_state_dict(checkpoint['state_dict'])
    for name, parameter in model.distillers.named_parameters():
        assert torch.equal(parameter, watch.validated[-1][name])
    # And the student itself is a plain one.
    plain = MODELS.build(detector_config())
    plain.load_state_dict(checkpoint['state_dict'], strict=True)


def test_resumed__run_ends_as_the_whole_one(run, tmp_path):
    _, whole, _ = run('a')
    _, steps, _ = run('b', str(tmp_path / 'a' / 'epoch_1.pth'))
    assert set(steps) == {4, 5, 6, 7}
    for step, values in steps.items():
        assert values == whole[step]
    first, second = (file_of(tmp_path / name, 2) for name in 'ab')
    for key, value in entry(first).items():
        assert torch.equal(value, entry(second)[key]), key
    for key, value in first['ema_state_dict'].items():
        assert torch.equal(value, second['ema_state_dict'][key]), key


def test_before_its_begin__the_average_is_what_is_trained(run, tmp_path):
    _, _, watch = run('a', begin_epoch=2)
    for name, value in watch.validated[0].items():
        assert torch.equal(value, watch.trained[3][name])


def test_averages__of_a_file_with_former_names_are_those():
    """As in ``test_student_model.py``, for the averages."""
    era = dict(type='era_mm.ERADistiller')
    averages, other = (
        MODELS.build(distillation_config(era)).distillers for _ in range(2)
    )
    expected = other['distiller'].state_dict()
    former = {
        key.replace('mbrnet.branches.', 'mbrnet.bottlenecks.'): value
        for key, value in expected.items()
    }
    assert set(former) != set(expected)
    hook = EMAHook()
    hook.ema_extras = SimpleNamespace(module=averages)
    hook._put({'distiller': dict(type='ERADistiller', state_dict=former)})
    for key, value in averages['distiller'].state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_model__that_has_no_extras_is_refused(make_runner):
    runner = make_runner(
        detector_config(), custom_hooks=[dict(type='era_mm.EMAHook')]
    )
    with pytest.raises(TypeError, match='a RetinaNet'):
        runner.train()
