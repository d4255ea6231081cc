"""A model that is measured."""

from mmdet.models import RetinaNet
from mmengine.config import ConfigDict

from era_mm.engine.measure import Member
from era_mm.testing import detector_config


def test_member__need_not_return_itself_from_train(monkeypatch):
    # As mmdet's LAD and LD do not.
    monkeypatch.setattr(RetinaNet, 'train', lambda self, mode=True: None)
    config = ConfigDict(detector_config())
    assert Member('student', 'own', config, 'mmdet').kind == 'detector'
