"""Which of a model's heads can be reused, and how."""

from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope

from era_mm.heads.twi import find_head, why_not_comparable
from era_mm.testing import classifier_config
from era_mm.testing.host_families import host_config


def test_find_head__kind_by_kind():
    def kind(config):
        return type(find_head(MODELS.build(ConfigDict(config)))).__name__

    assert kind(classifier_config()) == 'TWIHead'
    assert kind(host_config('fcos')) == 'DenseTWIHead'
    assert kind(host_config('cascade_rcnn')) == 'TwoStageTWIHead'
    assert kind(host_config('detr')) == 'NoneType'


def test_head__without_weights_judges_nothing():
    init_default_scope('mmpretrain')
    # LeNet, VGG and Inception v3 classify at the end of their backbones.
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='LeNet5', num_classes=10),
            head=dict(type='ClsHead'),
        )
    )
    assert find_head(model) is not None
    assert why_not_comparable(model, model) == (
        "the teacher's head (ClsHead) has no weights: what classifies is the "
        'end of its backbone, behind the features that are approximated'
    )
