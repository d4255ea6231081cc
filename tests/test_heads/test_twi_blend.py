"""Predictions of two heads, blended."""

import copy

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmengine.structures import InstanceData

from era_mm.heads.twi_blend import can_blend_raw, merge
from era_mm.testing import detector_config


def test_blend__is_raw_only_on_the_same_priors_and_coder():
    def head(**changes):
        config = detector_config()
        config['bbox_head'] = {**config['bbox_head'], **changes}
        return MODELS.build(ConfigDict(copy.deepcopy(config))).bbox_head.eval()

    feats = (torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4))
    anchors = detector_config()['bbox_head']['anchor_generator']
    one = head()
    for other, expected in (
        (head(), True),
        (head(anchor_generator={**anchors, 'octave_base_scale': 4}), False),
        (
            head(
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]
                )
            ),
            False,
        ),
    ):
        assert can_blend_raw(one, one(feats), other, other(feats)) is expected


def test_blend__merged_boxes_are_suppressed_and_capped():
    def instances(boxes, scores):
        return InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            scores=torch.tensor(scores),
            labels=torch.zeros(len(boxes), dtype=torch.long),
        )

    student = instances([[0, 0, 10, 10], [50, 50, 60, 60]], [0.6, 0.3])
    teacher = instances([[0, 0, 10, 11], [20, 20, 30, 30]], [0.9, 0.5])
    cfg = ConfigDict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=2)
    # 10x10 in 10x11: IoU 0.91, so the student's 0.6 goes; 0.3 is third.
    torch.testing.assert_close(
        merge((student, teacher), 0.5, cfg).scores, torch.tensor([0.9, 0.5])
    )


def test_blend__merging_weighs_the_scores_by_alpha():
    def one(x, score):
        return InstanceData(
            bboxes=torch.tensor([[x, 0.0, x + 10, 10.0]]),
            scores=torch.tensor([score]),
            labels=torch.zeros(1, dtype=torch.long),
        )

    cfg = ConfigDict(nms=dict(type='nms', iou_threshold=0.5))
    # alpha 0.2: the student keeps 0.6, the teacher gets 0.8 * 0.2 / 0.8.
    merged = merge((one(0.0, 0.6), one(50.0, 0.8)), 0.2, cfg)
    torch.testing.assert_close(merged.scores, torch.tensor([0.6, 0.2]))
    merged = merge((one(0.0, 0.6), one(50.0, 0.8)), 0.0, cfg)
    torch.testing.assert_close(merged.scores, torch.tensor([0.6]))
