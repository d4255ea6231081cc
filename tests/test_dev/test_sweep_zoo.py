"""The sweep over the hosts' zoos: what it tries and what it tells."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub

from dev.sweep_zoo import __main__ as command
from dev.sweep_zoo import families, trial
from dev.sweep_zoo.page import Results, host_versions, page, verdict
from era_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FCOS = trial.Cell('mmdet::fcos', 'fcos/fcos_r50.py', 'self')


# -- which config ---------------------------------------------------------


@pytest.mark.parametrize(
    ('stems', 'chosen'),
    [
        # A smaller model before a shorter name.
        (['yolox_l_300e', 'yolox_s_8xb8_300e'], 'yolox_s_8xb8_300e'),
        (['net_r50_1x', 'net_tiny-p4_long_name'], 'net_tiny-p4_long_name'),
        (['net_r101_1x', 'net_r50-caffe_1x'], 'net_r50-caffe_1x'),
        # Of one size the shortest name, then the alphabet.
        (['net_r50_fpn_2x', 'net_r50_1x'], 'net_r50_1x'),
        (['net_r50_b', 'net_r50_a'], 'net_r50_a'),
        # No word that is known: the shortest.
        (['ssd512_coco', 'ssd300'], 'ssd300'),
        # Letters inside of words are no sizes.
        (['atss_r101', 'tests_x101_64'], 'atss_r101'),
    ],
)
def test_choose__takes_the_smallest_by_name(stems, chosen):
    assert families.choose('mmdet::some', stems) == f'{chosen}.py'


def test_choose__the_explicit_choice_goes_before_the_rule():
    (config, reason) = families.CHOSEN['mmdet::guided_anchoring']
    assert reason
    stems = ['ga-rpn_r50_fpn_1x_coco', Path(config).stem]
    assert families.rank(stems[0]) < families.rank(stems[1])
    assert families.choose('mmdet::guided_anchoring', stems) == config


def test_folders__each_is_in_the_table_or_left_out_with_a_reason():
    results = Results(ROOT / 'results/zoo.jsonl')
    if results.hosts != host_versions():
        pytest.skip('the results are of other hosts')
    folders = [f for host in families.PARTNERS for f in families.folders(host)]
    assert sorted([*results.families, *families.LEFT_OUT]) == sorted(folders)
    assert all(families.LEFT_OUT.values())
    for record in results.cells.values():
        assert record['config'] == families.config_of(record['family'])


# -- small versions -------------------------------------------------------


def test_shrink__leaves_out_what_would_be_fetched_and_keeps_the_rest():
    config = dict(
        type='Net',
        init_cfg=dict(type='Pretrained', checkpoint='https://x/y.pth'),
        backbone=dict(
            pretrained='torchvision://resnet50',
            norm_cfg=dict(type='MMSyncBN', eps=1e-3),
            init_cfg=[
                dict(type='Kaiming'),
                dict(type='PretrainedInit', checkpoint='a.pth'),
            ],
        ),
        # As PVT has it.
        neck=dict(init_cfg=dict(checkpoint='b.pth')),
        head=dict(type='Tower', checkpoint='kept'),
        strides=(8, None, 32),
        batch_augments=[
            dict(type='BatchFixedSizePad', size=(1024, 1024)),
            dict(type='BatchResize', scale=(1400, 800), pad=True),
        ],
        sampler=dict(type='RandomSampler', num=512),
        rpn=dict(num_proposals=100),
        rcnn=dict(max_per_img=100, num_points=9, nms_pre=1000),
    )
    assert trial.shrink(config, (64, 96)) == dict(
        type='Net',
        init_cfg=None,
        backbone=dict(
            pretrained=None,
            norm_cfg=dict(type='BN', eps=1e-3),
            init_cfg=[dict(type='Kaiming')],
        ),
        neck=dict(init_cfg=None),
        head=dict(type='Tower', checkpoint='kept'),
        strides=(8, None, 32),
        batch_augments=[
            dict(type='BatchFixedSizePad', size=(64, 96)),
            dict(type='BatchResize', scale=(96, 64), pad=True),
        ],
        sampler=dict(type='RandomSampler', num=16),
        rpn=dict(num_proposals=20),
        rcnn=dict(max_per_img=20, num_points=9, nms_pre=1000),
    )
    assert config['sampler']['num'] == 512


def test_source__makes_the_value_again():
    value = dict(
        a=[(1,), (), (2, 'x')], b={'c-d': float('inf')}, e=[-1.5, None, True]
    )
    assert eval(trial.source_of(value)) == value


@pytest.mark.parametrize(
    ('message', 'shown'),
    [
        ('no file /home/me/x/net.py here', 'no file net.py here'),
        ("open '/tmp/a/c.py'", "open 'c.py'"),
        ('mmdet::fcos/fcos_r50.py', 'mmdet::fcos/fcos_r50.py'),
        ('see https://some.org/a/b/c.html', 'see https://some.org/a/b/c.html'),
        ('<Net object at 0x7f12ab34cd>', '<Net object at 0x...>'),
        ('24/32 of (3, 4)', '24/32 of (3, 4)'),
    ],
)
def test_clean__has_no_place_of_the_machine(message, shown):
    assert trial.clean(message) == shown


# -- processes ------------------------------------------------------------


def dies(cell):
    os._exit(3)


def hangs(cell):
    time.sleep(60)


def raises(cell):
    raise KeyError('first line\nsecond line')


def takes_all_memory(cell):
    return dict(result='works', detail=len(bytearray(3 << 30)))


def is_fine(cell):
    print('said in the child')
    return dict(result='works', size=[1, 2])


@pytest.mark.parametrize(
    ('work', 'expected'),
    [
        (dies, dict(result='fails', detail='the process ended with 3')),
        (hangs, dict(result='fails', detail='not done in 3 s')),
        (
            raises,
            dict(result='fails', detail=r"KeyError: 'first line\nsecond"),
        ),
        (takes_all_memory, dict(result='fails', detail='MemoryError: ')),
        (is_fine, dict(result='works', size=[1, 2])),
    ],
)
def test_child__whatever_ends_it_is_told(work, expected, tmp_path, capfd):
    start = time.monotonic()
    ((cell, found),) = trial.finish(
        [FCOS], 1, work=work, timeout=3, memory=2, logs=tmp_path
    )
    # The one that hangs would take a minute.
    assert time.monotonic() - start < 30
    assert cell == FCOS
    detail = expected.pop('detail', '')
    assert found.pop('detail', '').startswith(detail)
    assert found == expected
    # What a cell prints is in its log alone.
    assert 'said' not in capfd.readouterr().out
    log = (tmp_path / 'mmdet_fcos-self.log').read_text()
    assert ('said in the child' in log) == (work is is_fine)
    assert ('KeyError' in log) == (work is raises)


def test_child__a_plain_model_that_dies_is_the_hosts_own_fault(tmp_path):
    ((_, found),) = trial.finish(
        [FCOS._replace(kind='plain')],
        1,
        **dict(work=dies, timeout=30, memory=2, logs=tmp_path),
    )
    assert found == dict(result='host', detail='the process ended with 3')


def test_finish__runs_as_many_at_a_time_as_asked(tmp_path):
    cells = [FCOS._replace(kind=kind) for kind in trial.CELLS]
    start = time.monotonic()
    found = list(
        trial.finish(
            cells,
            4,
            work=lambda cell: time.sleep(1) or dict(result=cell.kind),
            timeout=30,
            memory=4,
            logs=tmp_path,
        )
    )
    assert time.monotonic() - start < 3.5
    assert {cell: result['result'] for cell, result in found} == {
        cell: cell.kind for cell in cells
    }


# -- results --------------------------------------------------------------


HEAD = dict(
    hosts='det 1.0, pre 2.0',
    families=[
        *(f'mmdet::{name}' for name in 'abcdef'),
        *('mmpretrain::a', 'mmpretrain::b'),
    ],
)


def records():
    def cell(family, kind, result, **kwargs):
        return dict(
            family=family,
            config=f'{family.partition("::")[2]}/c.py',
            cell=kind,
            result=result,
            **kwargs,
        )

    def pairs(family, *results):
        return [
            cell(family, 'plain', 'works', size=[128, 160]),
            *(
                cell(family, kind, result, **kwargs)
                for kind, (result, kwargs) in zip(
                    trial.CELLS[1:], results, strict=True
                )
            ),
        ]

    twi = ('works', dict(twi=True, detail='reused'))
    plain = ('works', dict(twi=False, detail='not reused: queries | no'))
    refused = ('refused', dict(detail='teacher: <no> maps'))
    fails = ('fails', dict(detail='RuntimeError: boom'))
    return [
        *pairs('mmdet::a', twi, twi, plain),
        *pairs('mmdet::b', twi, refused, twi),
        *pairs('mmdet::c', refused, fails, twi),
        cell('mmdet::d', 'plain', 'host', detail='ImportError: no timm'),
        *pairs('mmdet::e', plain, plain, plain),
        *pairs('mmpretrain::a', twi, twi, twi),
        cell('mmpretrain::b', 'plain', 'works', size=[128, 160]),
    ]


@pytest.fixture
def results(tmp_path):
    lines = [HEAD, *records()]
    path = tmp_path / 'zoo.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return Results(path)


def test_page__counts_families_whose_own_model_runs(results):
    text = page(results)
    # Of a, b, c and e two work wholly; c counts as a failure alone; d does
    # not run; of mmpretrain's b nothing but the plain model was tried.
    assert '| mmdet | 4 | 2 (50.0 %) | 1 | 1 | 1 | 1 |\n' in text
    assert '| mmpretrain | 1 | 1 (100.0 %) | 0 | 0 | 0 | 1 |\n' in text
    assert '\nNot tried yet: `f`.\n' in text
    assert 'Hosts: det 1.0, pre 2.0.' in text


def test_page__has_a_row_per_family_and_all_reasons(results):
    text = page(results)
    for row in (
        '| `a` | `c.py` | works | works, TWI | works, TWI | works |',
        '| `b` | `c.py` | works | works, TWI | refused | works, TWI |',
        '| `c` | `c.py` | works | refused | fails | works, TWI |',
        '| `d` | `c.py` | host does not run here | - | - | - |',
        '| `b` | `c.py` | works | - | - | - |',
    ):
        assert row in text.splitlines()
    _, _, rest = text.partition('## What does not work\n')
    problems, _, no_twi = rest.partition(
        "## Where the teacher's head is not reused\n"
    )
    assert problems.split('\n') == [
        '',
        '- `mmdet::b`, as teacher: refused: teacher: &lt;no> maps',
        '- `mmdet::c`, with itself: refused: teacher: &lt;no> maps',
        '- `mmdet::c`, as teacher: fails: RuntimeError: boom',
        '- `mmdet::d`, plain: host does not run here: ImportError: no timm',
        '',
        '',
    ]
    assert no_twi.strip().splitlines() == [
        '- queries \\| no: as student `mmdet::a`, `mmdet::e`; '
        'with itself `mmdet::e`; as teacher `mmdet::e`',
    ]


def test_results__are_written_in_order_and_read_again(results):
    results.add(
        trial.Cell('mmdet::d', 'd/c.py', 'plain'), dict(result='works')
    )
    lines = [json.loads(line) for line in results.path.open()]
    expected = records()
    expected[12] = dict(
        family='mmdet::d', config='d/c.py', cell='plain', result='works'
    )
    assert lines == [HEAD, *expected]


def test_results__of_other_hosts_are_not_added_to(results):
    with pytest.raises(UserError, match=r'det 1\.0.*installed are det 3'):
        Results(results.path, 'det 3')


@pytest.mark.parametrize(
    ('options', 'tried'),
    [
        # What has no result; the pairs of what does not run are not tried.
        ([], ['b self', 'b teacher', 'b student']),
        (['--only', 'mmdet::b', '--failed'], ['b teacher']),
        (['--only', 'c', '--cells', 'self', 'plain'], ['c plain', 'c self']),
    ],
)
def test_sweep__goes_on_where_it_was_stopped(
    options, tried, results, monkeypatch, tmp_path
):
    seen = []

    def finish(cells, jobs, **limits):
        assert limits['timeout'] == 7
        for cell in cells:
            seen.append(f'{cell.family.partition("::")[2]} {cell.kind}')
            if cell.kind != 'plain':
                assert cell.size == (128, 160)
            yield cell, dict(result='works', size=[128, 160], twi=True)

    monkeypatch.setattr(command, 'finish', finish)
    monkeypatch.setattr(command, 'host_versions', lambda: results.hosts)
    monkeypatch.setattr(
        command, 'config_of', lambda f: f'{f.partition("::")[2]}/c.py'
    )
    known = [f for f in HEAD['families'] if f != 'mmdet::f']
    monkeypatch.setattr(
        command,
        'folders',
        lambda host: [f for f in known if f.startswith(f'{host}::')],
    )
    paths = [
        *('--results', str(results.path), '--out', str(tmp_path / 'zoo.md')),
        *('--logs', str(tmp_path / 'logs'), '--timeout', '7'),
    ]
    assert command.main([*options, *paths]) == 0
    assert seen == tried
    assert (tmp_path / 'zoo.md').read_text() == page(Results(results.path))


def test_docs__are_what_the_results_make(tmp_path):
    out = tmp_path / 'zoo.md'
    assert command.main(['--table-only', '--out', str(out)]) == 0
    assert out.read_text() == (ROOT / 'docs/zoo.md').read_text()


def test_results__nothing_tried_fails_and_nine_of_ten_work():
    # Families that are not wholly tried say nothing of the nine.
    by_family = Results(ROOT / 'results/zoo.jsonl').by_family()
    for host in families.PARTNERS:
        found = [
            verdict(cells)
            for family, cells in by_family.items()
            if family.startswith(f'{host}::')
        ]
        assert 'fails' not in found
        runs = len(found) - found.count('host') - found.count('open')
        assert found.count('works') >= 0.9 * runs


# -- a cell by hand -------------------------------------------------------


class Net(torch.nn.Module):
    """Two norms on the way to its features, and one behind."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.BatchNorm2d(2, momentum=0.3)
        self.dropout = torch.nn.Dropout(0.5)
        self.second = torch.nn.BatchNorm2d(2, momentum=None)
        self.head = torch.nn.BatchNorm2d(2)
        self.told, self.tested = [], []
        self.predictions, self.slope = ['found'], 1e6

    def init_weights(self):
        torch.nn.init.constant_(self.first.weight, 3)

    def data_preprocessor(self, data):
        return dict(data, inputs=torch.stack(data['inputs']))

    def extract_feat(self, inputs):
        return self.second(self.dropout(self.first(inputs)))

    def train_step(self, data, optim_wrapper):
        hub = MessageHub.get_current_instance()
        self.told.append((hub.get_info('iter'), hub.get_info('epoch')))
        loss = self.slope * self.first.bias.sum()
        optim_wrapper.update_params(loss)
        return dict(loss=loss.detach())

    def test_step(self, data):
        self.tested.append([*data['inputs'], *data['data_samples']])
        return self.predictions


def batch_of_two():
    """Channel means 1 and 5, variances 4 and 0.04."""
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    image = torch.stack([1 + 2 * signs, 5 + 0.2 * signs])
    return dict(inputs=[image, image], data_samples=['a', 'b'])


@pytest.mark.parametrize('training', [True, False])
def test_settle__takes_the_batchs_statistics_and_nothing_else(training):
    net = Net().train(training)
    # As frozen stages and teachers have it.
    net.first.eval()
    trial.settle(net, batch_of_two())
    torch.testing.assert_close(net.first.running_mean, torch.tensor([1.0, 5]))
    # Of 8 values, unbiased; 0.04 is too small to divide by.
    torch.testing.assert_close(
        net.first.running_var, torch.tensor([4 * 8 / 7, 1])
    )
    # Both channels come as plus and minus 1, none dropped.
    torch.testing.assert_close(net.second.running_mean, torch.zeros(2))
    torch.testing.assert_close(
        net.second.running_var, torch.full((2,), 8 / 7), rtol=1e-3, atol=0
    )
    assert torch.equal(net.head.running_var, torch.ones(2))
    assert (net.first.momentum, net.second.momentum) == (0.3, None)
    assert net.training == training
    assert net.dropout.training == training


def cell_of(batch_size=1, **changes):
    """A model with a teacher, its config, and what makes its batches."""
    net = Net()
    vars(net).update(changes)
    teacher = Net().eval()
    teacher.init_weights()
    net.teachers = dict(teacher=SimpleNamespace(model=teacher))
    cfg = Config(
        dict(
            optim_wrapper=dict(
                type='AmpOptimWrapper',
                loss_scale='dynamic',
                clip_grad=dict(max_norm=35),
                optimizer=dict(type='SGD', lr=10.0),
            ),
            test_dataloader=dict(batch_size=batch_size),
        )
    )
    return net, cfg, batch_of_two


def test_steps__of_a_model_with_a_teacher_by_hand():
    net, cfg, batch = cell_of()
    trial.train_and_predict(net, cfg, batch)
    assert net.told == [(0, 0), (1, 0)]
    # A gradient of norm 1 goes in equal parts to two values.
    torch.testing.assert_close(
        net.first.bias.detach(), torch.full((2,), -2e-5 / 2**0.5)
    )
    # Images one by one, in evaluation.
    assert [(len(seen), seen[-1]) for seen in net.tested] == [
        (2, 'a'),
        (2, 'b'),
    ]
    assert not net.training
    teacher = net.teachers['teacher'].model
    assert not teacher.training
    for part in (net, teacher):
        assert part.first.weight.tolist() == [3, 3]
        assert part.first.running_mean.tolist() == pytest.approx([1, 5])


def test_steps__predict_as_many_as_the_test_loader_gives():
    net, cfg, batch = cell_of(batch_size=32, predictions=['a', 'b'])
    trial.train_and_predict(net, cfg, batch)
    assert [len(seen) for seen in net.tested] == [4]


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        (
            dict(slope=float('inf')),
            ArithmeticError,
            r"step 0: not finite: \['loss'\]",
        ),
        (dict(predictions=['a', 'b']), RuntimeError, '2 predictions of 1'),
        (dict(predictions=[]), RuntimeError, '0 predictions of 1'),
        (dict(batch_size=32), RuntimeError, '1 predictions of 2'),
    ],
)
def test_steps__that_are_not_sound_are_an_error(changes, error, message):
    with pytest.raises(error, match=message):
        trial.train_and_predict(*cell_of(**changes))


# -- a real cell ----------------------------------------------------------


def test_cell__a_retinanet_is_tried_plain_and_with_itself():
    cell = trial.Cell('mmdet::retinanet', families.PARTNERS['mmdet'], 'plain')
    found = trial.try_cell(cell)
    assert found == dict(result='works', size=[64, 96])
    found = trial.try_cell(cell._replace(kind='self', size=(64, 96)))
    assert found == dict(
        result='works',
        twi=True,
        detail='reused: TWI through the frozen RetinaHead',
    )
