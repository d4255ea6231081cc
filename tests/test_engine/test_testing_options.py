"""Options of the test command."""

import pytest
from mmengine.config import Config

from era_mm.engine.testing_options import add_show, use_tta
from era_mm.errors import UserError


def test_add_show__speaks_both_hosts_words() -> None:
    for kind, switch, folder in (
        ('DetVisualizationHook', 'draw', 'test_out_dir'),
        ('VisualizationHook', 'enable', 'out_dir'),
    ):
        hook = dict(type=kind)
        cfg = Config(dict(default_hooks=dict(visualization=hook)))
        add_show(cfg, show=False, show_dir='painted', wait_time=1)
        assert cfg.default_hooks.visualization[switch] is True
        assert cfg.default_hooks.visualization[folder] == 'painted'
    with pytest.raises(UserError, match=r'default_hooks\.visualization'):
        add_show(Config(dict()), show=True, show_dir=None, wait_time=1)


def test_use_tta__flips_a_detector_by_default() -> None:
    load, pack = dict(type='LoadImageFromFile'), dict(type='PackDetInputs')
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=dict(type='RetinaNet'),
            test_dataloader=dict(dataset=dict(pipeline=[load, pack])),
        )
    )
    use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.type == 'RetinaNet'
    pipeline = cfg.test_dataloader.dataset.pipeline
    assert [step.type for step in pipeline] == [
        'LoadImageFromFile',
        'TestTimeAug',
    ]


def test_use_tta__sends_a_distillation_to_its_student() -> None:
    cfg = Config(dict(model=dict(type='era_mm.Distillation')))
    with pytest.raises(UserError, match="student's own config"):
        use_tta(cfg)
