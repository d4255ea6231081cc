"""Each mistake stops before the first step, with one message."""

import re

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.core import LossSchedule, Recorder
from era_mm.testing import detector_config, distillation_config, save_teacher

ERA = dict(type='era_mm.ERADistiller')


def build(**kwargs):
    return MODELS.build(distillation_config(ERA) | kwargs)


def message_of(error):
    return re.sub(r'\s+', ' ', str(error.value))


def test_source__unknown_shows_the_nearest_names():
    with pytest.raises(ValueError) as error:
        MODELS.build(distillation_config(ERA | dict(source='nekc')))
    assert "'nekc' is not a module of the student" in message_of(error)
    assert 'neck' in message_of(error).partition('Nearest names:')[2]
    with pytest.raises(ValueError) as error:
        MODELS.build(
            distillation_config(
                ERA
                | dict(source=dict(student='neck', teacher='neck.fpn_conv.0'))
            )
        )
    assert 'of the teacher' in message_of(error)
    assert 'neck.fpn_convs.0' in message_of(error)


def test_source__must_name_both_roles():
    with pytest.raises(ValueError, match='dict\\(student='):
        MODELS.build(
            distillation_config(ERA | dict(source=dict(student='neck')))
        )


def teacher_at(checkpoint, **kwargs):
    config = detector_config(width=16, channels=24, **kwargs)
    return dict(config=config, checkpoint=str(checkpoint))


def load(checkpoint, **kwargs):
    model = build(teacher=teacher_at(checkpoint, **kwargs))
    model.init_weights()


def test_checkpoint__missing_file_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / 'none.pth')
    assert str(tmp_path) in message_of(error)


def test_checkpoint__truncated_file(tmp_path, teacher_file):
    whole = open(teacher_file, 'rb').read()
    (tmp_path / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='truncated or not a checkpoint'):
        load(tmp_path / 'cut.pth')


def test_checkpoint__something_else(tmp_path):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    with pytest.raises(ValueError, match='truncated or not a checkpoint'):
        load(tmp_path / 'text.pth')
    torch.save([1, 2, 3], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='holds no weights'):
        load(tmp_path / 'list.pth')


def test_checkpoint__other_shapes_and_missing_keys_are_shown(tmp_path):
    other = detector_config(width=16, channels=32)
    file = save_teacher(other, tmp_path / 'wide.pth')
    with pytest.raises(ValueError) as error:
        load(file)
    text = message_of(error)
    assert 'other shapes' in text
    assert 'neck.lateral_convs.0.conv.weight: file (32, 32, 1, 1)' in text
    assert 'model (24, 32, 1, 1)' in text

    state = torch.load(file, weights_only=False)
    del state['state_dict']['backbone.conv1.weight']
    state['state_dict']['extra.weight'] = torch.zeros(1)
    torch.save(state, tmp_path / 'keys.pth')
    with pytest.raises(ValueError) as error:
        load(tmp_path / 'keys.pth')
    text = message_of(error)
    assert 'missing in the file (1): backbone.conv1.weight' in text
    assert 'not in the model (1): extra.weight' in text


def test_checkpoint__a_student_that_training_wrote_can_teach(tmp_path):
    config = detector_config(width=16, channels=24)
    trained = MODELS.build(distillation_config(ERA, student=config))
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 's.pth')
    load(tmp_path / 's.pth')


def test_teacher__needs_a_checkpoint():
    with pytest.raises(ValueError, match='has no `checkpoint`'):
        build(teacher=dict(config=detector_config()))


def test_teacher__unknown_key_shows_the_nearest():
    with pytest.raises(TypeError, match="Did you mean 'checkpoint'"):
        build(teacher=dict(config=detector_config(), checkpont='random'))


def test_teacher__config_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match='mmdet::'):
        build(teacher=dict(config='no/such.py', checkpoint='random'))


def test_teacher__without_config_is_refused():
    with pytest.raises(ValueError, match="a dict with 'config'"):
        build(teacher=dict(checkpoint='random'))


def test_distillation__unknown_key_shows_the_nearest():
    with pytest.raises(TypeError, match="Did you mean 'distiller'"):
        build(distillers=ERA)


def test_student__that_is_a_distillation_is_refused():
    with pytest.raises(ValueError, match='Distillation itself'):
        build(student=distillation_config(ERA))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(shape='cubic'),
        dict(start=-1),
        dict(start=5, stop=5),
        dict(scale=-1),
        dict(milestones=[5, 3]),
    ],
)
def test_schedule__refuses(kwargs):
    with pytest.raises(ValueError, match='schedule'):
        LossSchedule(**kwargs)


def test_schedule__values_by_hand():
    schedule = LossSchedule(start=2, stop=8, ramp=4, shape='cosine')
    # (1 - cos(pi x)) / 2 at x = 1/4, 1/2, 3/4, 1.
    assert [round(schedule(step), 4) for step in range(9)] == [
        0,
        0,
        0.1464,
        0.5,
        0.8536,
        1,
        1,
        1,
        0,
    ]
    assert LossSchedule()(10**9) == 1.0
    assert LossSchedule(scale=0.5)(0) == 0.5
    # Down from 0.1 * 10 to 0.1 in four steps: 1 - 0.9 x.
    down = LossSchedule(scale=0.1, initial=10, ramp=4)
    assert [round(down(t), 4) for t in (0, 1, 2, 3, 9)] == [
        0.775,
        0.55,
        0.325,
        0.1,
        0.1,
    ]
    steps = LossSchedule(scale=2, milestones=[2, 5], gamma=0.5)
    assert [steps(t) for t in (1, 2, 4, 5, 9)] == [2, 1, 1, 0.5, 0.5]


def test_schedule__says_itself_in_words():
    assert str(LossSchedule()) == 'times 1'
    assert str(LossSchedule(scale=0.5, start=3, stop=9)) == (
        'times 0.5, from iteration 3, until 9'
    )
    assert str(LossSchedule(scale=0.1, initial=10, ramp=4)) == (
        '1 to 0.1 over 4 iterations (linear)'
    )
    assert str(LossSchedule(milestones=[2, 5], gamma=0.5)) == (
        'times 1, times 0.5 at 2, 5'
    )


def test_recorder__listens_only_inside_its_block():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    recorder = Recorder(net, ['0', '1'], owner='student')
    x = torch.ones(1, 2)
    net(x)
    with recorder:
        net(x)
    net(x)
    feats = recorder.pop()
    assert [feats[key][0].shape[1] for key in ('0', '1')] == [3, 4]
    assert len(feats['0']) == 1
    assert not net[0]._forward_hooks
    with pytest.raises(RuntimeError, match='never called'):
        recorder.pop()


def test_recorder__module_called_per_level_gives_all_its_outputs():
    shared = torch.nn.Identity()
    recorder = Recorder(torch.nn.Sequential(shared), ['0'], owner='student')
    with recorder:
        for value in (1.0, 2.0, 3.0):
            shared(torch.tensor(value))
    assert [t.item() for t in recorder.pop()['0']] == [1, 2, 3]


def test_recorder__output_that_is_no_feature_is_refused():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return {'x': x}

    net = torch.nn.Sequential(Odd())
    with (
        pytest.raises(ValueError, match='gave dict'),
        Recorder(net, ['0'], owner='student'),
    ):
        net(torch.ones(1))


def test_student__that_is_semi_supervised_says_what_to_give():
    student = dict(
        type='mmdet.SemiBaseDetector',
        detector=detector_config(),
        semi_train_cfg=dict(freeze_teacher=True),
    )
    with pytest.raises(ValueError, match=r'_base_\.model\.detector'):
        MODELS.build(distillation_config(ERA, student=student))
