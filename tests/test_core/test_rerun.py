"""The student once more on the batch of a step, with other weights."""

import copy

import torch
from mmengine.registry import MODELS

from era_mm.core import Recorder
from era_mm.core.rerun import Rerun
from era_mm.testing import detection_batch, detector_config


def on_batch(student, connect=lambda feats: feats):
    """A rerun of a student on a batch, which it also returns."""
    data = student.data_preprocessor(detection_batch(), True)
    recorder = Recorder(student, ['neck'], owner='student')
    rerun = Rerun(
        student,
        recorder,
        data['inputs'],
        data['data_samples'],
        connect=connect,
    )
    return rerun, data


def moved(student):
    """Other weights, of which gradients are asked."""
    return {
        name: (0.9 * parameter).detach().requires_grad_()
        for name, parameter in student.named_parameters()
    }


def test_rerun__is_the_student_with_these_weights():
    student = MODELS.build(detector_config()).train()
    weights = moved(student)
    other = copy.deepcopy(student)
    other.load_state_dict(weights, strict=False)
    rerun, data = on_batch(student)
    losses, feats = rerun(weights)
    expected = other(**copy.deepcopy(data), mode='loss')
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)
    maps = MODELS.build(detector_config()).train()
    maps.load_state_dict(student.state_dict())
    maps.load_state_dict(weights, strict=False)
    torch.testing.assert_close(
        feats['neck'], tuple(maps.extract_feat(data['inputs']))
    )


def test_rerun__gradients_are_those_of_the_weights_put_in_place():
    student = MODELS.build(detector_config()).train()
    weights = moved(student)
    rerun, _ = on_batch(student)
    losses, _ = rerun(weights)
    sum(losses['loss_cls']).backward()
    assert weights['bbox_head.retina_cls.weight'].grad.any()
    assert weights['backbone.conv1.weight'].grad.any()
    assert all(p.grad is None for p in student.parameters())


def test_rerun__leaves_no_trace():
    student = MODELS.build(detector_config()).train()
    rerun, data = on_batch(student)
    own = dict(student.named_parameters())
    before = copy.deepcopy(student.state_dict())
    boxes = data['data_samples'][0].gt_instances.bboxes.clone()
    random = torch.get_rng_state()
    # The step under way keeps its graph.
    loss = student.extract_feat(data['inputs'])[0].mean()
    stepped = copy.deepcopy(student.state_dict())
    rerun(moved(student))
    loss.backward()
    assert all(p is own[name] for name, p in student.named_parameters())
    for key, value in student.state_dict().items():
        assert torch.equal(value, stepped[key]), key
    # Norms have counted the step and not the second run.
    key = 'backbone.bn1.num_batches_tracked'
    assert student.state_dict()[key] == before[key] + 1
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(data['data_samples'][0].gt_instances.bboxes, boxes)
    assert not student.neck._forward_hooks


def test_rerun__features_go_through_the_connectors():
    student = MODELS.build(detector_config()).train()
    rerun, _ = on_batch(student, connect=lambda feats: len(feats['neck']))
    assert rerun(moved(student))[1] == 2
