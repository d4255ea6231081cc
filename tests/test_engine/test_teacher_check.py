"""Class names and the short test of a teacher before the first step."""

import json
from pathlib import Path

import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import EVALUATOR, METRICS
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from era_mm.engine import teacher_check
from era_mm.engine.teacher_check import (
    Evaluation,
    check_teacher,
    compare_classes,
    evaluate_teacher,
    find_fault,
    has_classes_of,
    is_near_chance,
)
from era_mm.errors import UserError
from era_mm.testing import distillation_config, run_config
from era_mm.testing.toy import CLASSES

ERA = dict(type='era_mm.ERADistiller')


# -- class names ------------------------------------------------------------


def test_classes__that_agree_or_are_not_told_say_nothing():
    assert compare_classes(['a', 'b'], ['a', 'b'], 'teacher') == ''
    assert compare_classes(None, ['a'], 'teacher') == ''
    assert compare_classes(['a'], None, 'teacher') == ''
    # Spelling is no difference.
    own, theirs = ['traffic light', 'cat'], ['Traffic_Light', 'cat']
    assert compare_classes(own, theirs, 'teacher') == ''


def test_classes__in_another_order_stop_the_run():
    with pytest.raises(UserError) as error:
        compare_classes(['a', 'b', 'c'], ['a', 'c', 'b'], 'big')
    message = str(error.value)
    assert '2 of 3 are elsewhere' in message
    assert "first, class 1: 'b' in the data, 'c' in the teacher" in message
    assert 'preflight=False' in message
    # Shifted by one, with one class that the other side does not have.
    with pytest.raises(UserError, match='3 of 4 are elsewhere'):
        compare_classes(list('abcd'), list('xabc'), 'big')


def test_classes__of_another_name_or_number_are_told():
    remark = compare_classes(
        ['airplane', 'cat'], ['aeroplane', 'cat'], 'teacher'
    )
    assert remark.startswith('1 of 2 classes have another name')
    assert "class 0: 'airplane' in the data, 'aeroplane'" in remark
    remark = compare_classes(['a', 'c'], ['a', 'b', 'c'], 'teacher')
    assert remark.startswith('The teacher knows 3 classes and the data has 2')
    assert "class 1: 'c' in the data, 'b'" in remark


def test_classes__decide_whether_a_teacher_can_be_tested():
    assert has_classes_of(None, ['a'])
    assert has_classes_of(['a', 'b'], ['a', 'x'])
    assert not has_classes_of(['a', 'b', 'c'], ['a', 'x', 'y'])
    assert not has_classes_of(['a', 'b'], ['a', 'b', 'c'])


# -- near chance ------------------------------------------------------------


@pytest.mark.parametrize(
    ('right', 'total', 'num_classes', 'expected'),
    [
        # 1 of 1000: P(X >= 1) = 6 %, P(X >= 2) = 0.2 %.
        (0, 64, 1000, True),
        (1, 64, 1000, True),
        (2, 64, 1000, False),
        # 1 of 10; useful is 0.28: P(X <= 9) = 0.8 %, P(X <= 10) = 1.9 %.
        (6, 64, 10, True),
        (9, 64, 10, True),
        (10, 64, 10, False),
        (40, 64, 10, False),
        # Two classes cannot be told from a weak classifier by 64 images.
        (32, 64, 2, False),
        (5, 64, 2, True),
        # A few images decide nothing, unless all are wrong:
        # 0.8 ** 20 = 1.2 %, 0.8 ** 21 = 0.9 %.
        (0, 4, 3, False),
        (0, 20, 1000, False),
        (0, 21, 1000, True),
    ],
)
def test_near_chance__by_the_binomial(right, total, num_classes, expected):
    assert is_near_chance(right, total, num_classes) is expected


def test_near_chance__is_rare_for_a_teacher_of_any_use():
    """The share of stopped runs, summed over all outcomes."""

    def stopped(p, num_classes, total=64):
        from math import comb

        return sum(
            comb(total, k) * p**k * (1 - p) ** (total - k)
            for k in range(total + 1)
            if is_near_chance(k, total, num_classes)
        )

    for num_classes in (2, 3, 10, 100, 1000):
        chance = 1 / num_classes
        assert stopped(chance + 0.2 * (1 - chance), num_classes) < 0.01
        assert stopped(chance + 0.5 * (1 - chance), num_classes) < 1e-5
    assert stopped(1 / 10, 10) > 0.8
    assert stopped(1 / 1000, 1000) > 0.99


def fault(metrics, num_images=64, num_objects=100, num_classes=10):
    return find_fault(
        Evaluation(metrics, num_images, num_objects, 1.0), num_classes
    )


def test_fault__of_a_detector_that_finds_nothing():
    def found(num_found, num_objects):
        return find_fault(Evaluation({}, 16, num_objects, 1.0, num_found), 10)

    assert 'finds nothing on 16 images of val with 10 objects' in found(0, 10)
    assert not found(0, 9)
    assert not found(0, None)
    assert not found(1, 100)
    # A classifier finds no objects, and is not asked to.
    assert not found(None, 100)


def test_fault__of_metrics():
    assert 'accuracy/top1 is 9.4 on 64' in fault({'accuracy/top1': 9.375})
    assert '10 classes gives 10.0' in fault({'accuracy/top1': 9.375})
    assert not fault({'accuracy/top1': 60.0})
    assert not fault({'accuracy/top1': 9.375}, num_classes=None)
    # The AP at IoU 0.5 counts, where there is one.
    poor = {'coco/bbox_mAP': 0.001, 'coco/bbox_mAP_50': 0.004}
    assert 'coco/bbox_mAP_50 is 0.004 on 64 images' in fault(poor)
    assert 'with 100 objects' in fault(poor)
    assert fault(poor, num_objects=50)
    assert not fault({'coco/bbox_mAP': 0.005, 'coco/bbox_mAP_50': 0.06})
    assert fault({'pascal_voc/mAP': 0.0})
    # Too few objects, unknown ones, or no ground truth at all (-1).
    assert not fault(poor, num_objects=49)
    assert not fault(poor, num_objects=None)
    assert not fault({'coco/bbox_mAP_50': -1.0})
    # What is not known is not judged.
    assert not fault({'multi-label/mAP_x': 0.0, 'coco/AR@100': 0.0})


def knows(teacher, which=lambda img_id: True):
    """Make a teacher find all objects of some images, and nothing else."""

    def predict(inputs, data_samples, mode):
        for sample in data_samples:
            truth = sample.gt_instances
            number = len(truth) if which(sample.img_id) else 0
            sample.pred_instances = InstanceData(
                # In pixels of the original image, as predictions are.
                bboxes=truth.bboxes[:number],
                labels=truth.labels[:number],
                scores=torch.ones(number),
            )
        return data_samples

    teacher.model.forward = predict


def make(root, tmp_path, model=None, **kwargs):
    config = run_config(
        model or distillation_config(ERA), root, tmp_path / 'run', **kwargs
    )
    return Runner.from_cfg(Config(config))


def test_evaluation__of_all_images_is_that_of_the_runs_own_loop(
    many, tmp_path
):
    runner = make(many, tmp_path)
    teacher = runner.model.teachers['teacher']
    knows(teacher, lambda img_id: img_id % 3 > 0)
    found = evaluate_teacher(teacher, runner, 100, 60)
    runner.model = teacher.model
    expected = runner.val_loop.run()
    assert 0.5 < expected['coco/bbox_mAP'] < 0.8
    assert found.metrics == expected
    assert (found.num_images, found.num_objects) == (24, 24)


def test_evaluation__of_some_images_is_not_held_against_the_rest(
    many, tmp_path, capsys
):
    runner = make(many, tmp_path)
    teacher = runner.model.teachers['teacher']
    knows(teacher)
    assert runner.val_loop is not None
    capsys.readouterr()
    found = evaluate_teacher(teacher, runner, 5, 60)
    assert found.metrics['coco/bbox_mAP'] == 1.0
    # Tables of COCO would be taken for the run's.
    assert capsys.readouterr().out == ''
    assert (found.num_images, found.num_objects) == (5, 5)


def test_evaluation__stops_between_batches_when_the_time_is_up(
    many, tmp_path, monkeypatch
):
    runner = make(many, tmp_path)
    teacher = runner.model.teachers['teacher']
    knows(teacher)
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(teacher_check.time, 'monotonic', lambda: next(now))
    # Batches of two, ten seconds each: begun at 0, 10 and 20.
    assert evaluate_teacher(teacher, runner, 20, 25).num_images == 6


def test_evaluation__reads_images_from_all_over_the_split(
    many, tmp_path, monkeypatch
):
    runner = make(many, tmp_path)
    teacher = runner.model.teachers['teacher']
    seen = []
    knows(teacher, lambda img_id: seen.append(img_id) or True)
    evaluate_teacher(teacher, runner, 8, 60)
    assert len(set(seen)) == 8
    assert min(seen) < 8
    assert max(seen) >= 16


def test_evaluation__writes_no_file_of_the_runs(many, tmp_path):
    evaluator = dict(
        type='CocoMetric',
        ann_file=f'{many}/annotations.json',
        outfile_prefix=str(tmp_path / 'out/results'),
    )
    runner = make(many, tmp_path, val_evaluator=evaluator)
    teacher = runner.model.teachers['teacher']
    knows(teacher)
    before = json.loads(Path(many, 'annotations.json').read_text())
    found = evaluate_teacher(teacher, runner, 4, 60)
    assert found.metrics['coco/bbox_mAP'] == 1.0
    assert not (tmp_path / 'out').exists()
    assert json.loads(Path(many, 'annotations.json').read_text()) == before
    assert evaluator['outfile_prefix'] == str(tmp_path / 'out/results')


def test_evaluation__leaves_the_teacher_as_it_is(many, tmp_path):
    model = distillation_config(ERA)
    # Box operators refuse half precision on a CPU.
    model['teacher'] |= dict(dtype='bfloat16')
    runner = make(many, tmp_path, model)
    teacher = runner.model.teachers['teacher']
    before = teacher.fingerprint()
    found = evaluate_teacher(teacher, runner, 4, 60)
    assert found.metrics['coco/bbox_mAP'] < 0.5
    assert teacher.fingerprint() == before
    assert not any(module.training for module in teacher.model.modules())


# -- several val sets --------------------------------------------------------


def several(roots, tmp_path, metrics=None, metainfos=(), **kwargs):
    """A run with a val set in each of some folders, told apart."""
    config = run_config(
        distillation_config(ERA), roots[0], tmp_path / 'run', **kwargs
    )
    one = config.val_dataloader.dataset
    metainfos = metainfos or [one.metainfo] * len(roots)
    config.val_dataloader.dataset = dict(
        type='ConcatDataset',
        datasets=[
            dict(one, data_root=root, metainfo=metainfo)
            for root, metainfo in zip(roots, metainfos, strict=True)
        ],
    )
    config.val_evaluator = dict(
        type='MultiDatasetsEvaluator',
        dataset_prefixes=[f'set{number}' for number in range(len(roots))],
        metrics=metrics
        or [
            dict(type='CocoMetric', ann_file=f'{root}/annotations.json')
            for root in roots
        ],
    )
    return Runner.from_cfg(Config(config))


@pytest.mark.parametrize('differ', [False, True])
def test_sets__of_all_images_are_judged_as_the_runs_own_loop_does(
    many, coco, tmp_path, differ
):
    """Their image ids coincide; so only the split tells them apart."""
    metainfos = [
        dict(classes=CLASSES, palette=[(number, 0, 0)] * len(CLASSES))
        for number in range(2)
    ]
    runner = several(
        [many, coco], tmp_path, metainfos=metainfos if differ else ()
    )
    teacher = runner.model.teachers['teacher']
    knows(teacher, lambda img_id: img_id % 3 > 0)
    found = evaluate_teacher(teacher, runner, 100, 60)
    runner.model = teacher.model
    expected = runner.val_loop.run()
    assert isinstance(runner.val_evaluator.dataset_meta, list) is differ
    assert 0.5 < expected['set0/coco/bbox_mAP'] < 0.8
    assert found.metrics == expected
    assert list(found.parts) == ['set0', 'set1']
    assert found.num_images == 24 + found.parts['set1'].num_images
    assert found.parts['set0'].num_objects == 24


def test_sets__of_which_some_images_are_drawn_find_a_perfect_teacher_so(
    many, tmp_path
):
    runner = several([many] * 5, tmp_path)
    teacher = runner.model.teachers['teacher']
    knows(teacher)
    found = evaluate_teacher(teacher, runner, 16, 60)
    assert found.num_images == 16
    assert all(
        value == 1.0
        for key, value in found.metrics.items()
        if key.endswith('bbox_mAP')
    )
    teacher.checkpoint = 'there.pth'
    line = check_teacher(teacher, runner, CLASSES, 16, 60)
    assert 'set0/coco/bbox_mAP 1, ' in line
    assert 'on 16 images' in line


def test_sets__share_the_time(many, tmp_path, monkeypatch):
    """Two batches, one of each set, though all of one would fit."""
    runner = several([many, many], tmp_path)
    teacher = runner.model.teachers['teacher']
    knows(teacher)
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(teacher_check.time, 'monotonic', lambda: next(now))
    found = evaluate_teacher(teacher, runner, 20, 15)
    sizes = {name: part.num_images for name, part in found.parts.items()}
    assert sizes == {'set0': 2, 'set1': 2}


def test_sets__are_one_for_what_is_near_chance():
    def part(value, number, key='coco/bbox_mAP_50'):
        return Evaluation({key: value}, number, number, 0.0)

    def together(**parts):
        return find_fault(Evaluation({}, 9, 9, 1.0, 9, parts), 10)

    # (0 * 30 + 0.06 * 30) / 60 = 0.03 with 60 objects.
    message = together(a=part(0.0, 30), b=part(0.06, 30))
    assert 'bbox_mAP_50 is 0.030 on 60 images of val with 60' in message
    # Good on one of the two: (0 * 30 + 0.5 * 30) / 60 = 0.25.
    assert not together(a=part(0.0, 30), b=part(0.5, 30))
    # A set without objects has no AP, and counts for nothing.
    assert together(a=part(0.0, 60), b=part(-1.0, 0))
    # 49 objects are too few, whatever another metric saw.
    assert not together(a=part(0.0, 49), b=part(0.9, 90, 'voc/mAP'))

    # 10 of 64 and 0 of 64: 10 of 128 are chance for 10 classes.
    def of_classifier(right):
        return Evaluation({'accuracy/top1': right / 0.64}, 64, None, 0.0)

    assert 'is 7.8 on 128' in together(a=of_classifier(10), b=of_classifier(0))
    assert not together(a=of_classifier(40), b=of_classifier(0))


def test_sets__that_do_not_go_with_the_evaluator_are_not_evaluated(
    many, tmp_path
):
    metric = dict(type='CocoMetric', ann_file=f'{many}/annotations.json')
    runner = several([many, many], tmp_path, metrics=[metric])
    teacher = runner.model.teachers['teacher']
    teacher.checkpoint = 'there.pth'
    assert check_teacher(teacher, runner, CLASSES, 16, 60) == (
        'teacher: not evaluated, MultiDatasetsEvaluator has 2 '
        'dataset_prefixes and 1 metrics for 2 val sets'
    )


@EVALUATOR.register_module()
class OwnEvaluator(Evaluator):
    def evaluate(self, size):
        return {}


@METRICS.register_module()
class OwnMetric(CocoMetric):
    def evaluate(self, size):
        return {}


@pytest.mark.parametrize('own', ['evaluator', 'metric'])
def test_evaluation__in_a_way_of_its_own_is_not_guessed(many, tmp_path, own):
    metric = dict(
        type='OwnMetric' if own == 'metric' else 'CocoMetric',
        ann_file=f'{many}/annotations.json',
    )
    kind = 'OwnEvaluator' if own == 'evaluator' else 'Evaluator'
    runner = make(
        many, tmp_path, val_evaluator=dict(type=kind, metrics=metric)
    )
    teacher = runner.model.teachers['teacher']
    teacher.checkpoint = 'there.pth'
    name = 'OwnEvaluator' if own == 'evaluator' else 'OwnMetric'
    assert check_teacher(teacher, runner, CLASSES, 16, 60) == (
        f'teacher: not evaluated, {name} combines results in its own way'
    )


def test_evaluation__takes_a_single_metric_of_an_evaluator(many, tmp_path):
    metric = dict(type='CocoMetric', ann_file=f'{many}/annotations.json')
    runner = make(
        many, tmp_path, val_evaluator=dict(type='Evaluator', metrics=metric)
    )
    teacher = runner.model.teachers['teacher']
    knows(teacher)
    found = evaluate_teacher(teacher, runner, 4, 60)
    assert found.metrics['coco/bbox_mAP'] == 1.0
