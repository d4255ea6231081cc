"""The page of real toy runs, by its text and in a real browser.

The browser is Debian's chromium; where there is none its tests are skipped.
"""

import copy
import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from era_mm import testing
from era_mm.cli import run_report
from era_mm.errors import UserError
from era_mm.report import write_demo_report, write_report
from era_mm.report.comparison import compare_runs
from era_mm.report.models import build_students
from era_mm.report.page import summarise, summary_table
from era_mm.report.panel_parts import Found
from era_mm.report.runs import Run
from era_mm.testing.work_dirs import STUDENT, distilled, train_lines, write_run

pytest.importorskip('plotly')
pytest.importorskip('jinja2')

AP = 'coco/bbox_mAP'
CHROMIUM = shutil.which('chromium')
# Runs at the end of the page: what a reader would see and do.
PROBE = """
<script>
const pause = () => new Promise((done) => { setTimeout(done, 2000); });
const tallest = () => Math.max(...[...document.querySelectorAll('.canvas')]
  .map((canvas) => canvas.getBoundingClientRect().height));
const widest = () => Math.max(...[...document.querySelectorAll('.canvas .main-svg')]
  .map((svg) => svg.getBoundingClientRect().width));
setTimeout(async () => {
  const table = document.querySelector('#runs table');
  const column = () => [...table.tBodies[0].rows].map((r) => r.cells[0].textContent);
  const before = column();
  const button = table.querySelector('thead th button');
  button.click();
  const up = column();
  button.click();
  const down = column();
  const screen = widest();
  window.dispatchEvent(new Event('beforeprint'));
  await pause();
  const paper = widest();
  const low = tallest();
  const grid = document.querySelector('.canvas').layout.xaxis.gridcolor;
  window.dispatchEvent(new Event('afterprint'));
  await pause();
  const out = document.createElement('pre');
  out.id = 'probe';
  out.textContent = JSON.stringify({
    before, up, down, screen, paper, low, grid, again: widest(),
    high: tallest(),
    sort: table.querySelector('thead th').getAttribute('aria-sort'),
    drawn: document.body.dataset.drawn,
    figures: [...document.querySelectorAll('.canvas')].map((c) => ({
      name: c.dataset.figure, label: c.getAttribute('aria-label'),
      traces: c.data ? c.data.length : 0,
      points: c.data ? c.data.reduce((n, t) => n + t.y.length, 0) : 0,
      svg: c.querySelectorAll('svg.main-svg').length,
    })),
    fetched: performance.getEntriesByType('resource').length,
    wide: document.documentElement.scrollWidth - innerWidth,
  });
  document.body.append(out);
}, 4000);
</script>
"""  # noqa: E501


def train(folder, model, coco, seed=0, **kwargs):
    config = Config(
        testing.run_config(
            model, coco, folder, randomness=dict(seed=seed), **kwargs
        )
    )
    Runner.from_cfg(config).train()
    return folder


@pytest.fixture(scope='module')
def toy_runs(coco, tmp_path_factory):
    """A teacher, a plain and an ERA student of toys, trained for real."""
    root = tmp_path_factory.mktemp('runs')
    wide = testing.detector_config(width=16, channels=24)
    small = testing.detector_config()
    teacher = train(root / 'big', wide, coco)
    train(root / 'plain', small, coco)
    era = testing.distillation_config(
        dict(type='era_mm.ERADistiller'), checkpoint=f'{teacher}/epoch_2.pth'
    )
    train(
        root / 'era',
        era,
        coco,
        custom_hooks=[
            dict(type='era_mm.TWIHook', modes=['E0', 'T']),
            dict(type='era_mm.ResidualVisHook', interval=4),
        ],
    )
    return root


@pytest.fixture(scope='module')
def page(toy_runs, tmp_path_factory):
    before = snapshot(toy_runs)
    out = tmp_path_factory.mktemp('page') / 'report.html'
    write_report([toy_runs / 'era', toy_runs / 'plain'], out, images=6)
    assert snapshot(toy_runs) == before
    return out


def snapshot(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob('*')}


def in_page(text, name):
    found = re.search(f'id="{name}">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def rows_of(text, section):
    part = text[text.index(f'<section id="{section}">') :]
    table = part[part.index('<tbody>') : part.index('</tbody>')]
    return [
        [
            html.unescape(cell)
            for cell in re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row)
        ]
        for row in re.findall(r'<tr>(.*?)</tr>', table, re.DOTALL)
    ]


def test_page__summary_is_its_json(page):
    text = page.read_text()
    summary = in_page(text, 'summary-json')
    assert rows_of(text, 'summary') == summary_table(summary).rows
    assert html.escape(summary['headline'], quote=False) in text
    assert {row['model'] for row in summary['rows']} == {
        'teacher',
        'plain',
        'era S',
        'era E0',
        'era T',
    }
    plain = next(r for r in summary['rows'] if r['model'] == 'plain')
    taught = next(r for r in summary['rows'] if r['model'] == 'era S')
    # The same network is deployed.
    assert plain['parameters'] == taught['parameters']
    assert taught['val_gain'] == pytest.approx(
        taught['val'] - plain['val'], abs=0.011
    )


def test_summary__by_hand(tmp_path):
    # Plain 20, 21, 22 and ERA 21, 23, 25: mean 23, deviation 2. Differences
    # 1, 2, 3: mean 2, half 4.30265 / sqrt(3) = 2.48414.
    for seed in range(3):
        for name, value, model in (
            ('plain', 0.20 + 0.01 * seed, STUDENT),
            ('era', 0.21 + 0.02 * seed, distilled()),
        ):
            write_run(
                tmp_path / f'{name}_s{seed}',
                model=model,
                seed=seed,
                metrics=[{AP: value, 'step': 2}],
                train=train_lines(20),
            )
    runs = compare_runs(sorted(tmp_path.iterdir()))
    plain, era = summarise(runs, Found())['rows']
    assert (plain['val'], plain['val_deviation']) == (21.0, 1.0)
    assert plain['val_gain'] is None
    assert plain['val_interval'] is None
    assert (era['val'], era['val_deviation']) == (23.0, 2.0)
    assert era['val_gain'] == 2.0
    assert era['val_interval'] == [-0.48, 4.48]


def test_page__has_every_part(page):
    text = page.read_text()
    for section in (
        'summary',
        'over-time',
        'decomposition',
        'images',
        'losses',
        'runs',
    ):
        assert f'<section id="{section}">' in text
    names = in_page(text, 'figures-json')
    assert 'metric' in names
    assert 'unexplained-0' in names
    assert 'by-level-0' in names
    # From the hook, over time.
    assert any(name.startswith('levels-') for name in names)
    # Two levels with three rows each: e_0 ... e_n beside the teacher.
    assert text.count('teacher - e0') >= 2
    assert 'what each branch adds' in text
    assert 'ground truth' in text


def test_page__loads_nothing(page):
    text = page.read_text()
    without_plotly = re.sub(r'<script>/\*\*.*?</script>', '', text, flags=re.S)
    assert 'src="http' not in text
    assert '<link rel="stylesheet"' not in text
    assert '@import' not in without_plotly


def test_page__escapes_what_runs_are_called(tmp_path):
    folder = write_run(
        tmp_path / '<b>bold & "x"',
        metrics=[{AP: 0.5, 'step': 2}],
        train=train_lines(20),
    )
    out = write_report([folder], tmp_path / 'p.html', images=0)
    text = out.read_text()
    assert '<b>bold' not in text
    assert in_page(text, 'summary-json')['rows'][0]['model'].startswith('<b>')


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (
            lambda run: [f.unlink() for f in run.glob('*.pth')],
            'epoch_2.pth is not there, so no images',
        ),
        (
            lambda run: (run / 'epoch_2.pth').unlink(),
            'figures by class are from epoch_1.pth',
        ),
        (
            # Not the config beside it, which has a name like that.
            lambda run: [shutil.rmtree(f) for f in run.glob('2*/')],
            'no log of numbers',
        ),
        (
            lambda run: [f.unlink() for f in run.rglob('*.py')],
            'no config',
        ),
        (
            lambda run: [
                f.write_text(f.read_text().replace('annotations.json', 'no'))
                for f in run.rglob('*.py')
            ],
            'val data of era could not be read',
        ),
        (
            lambda run: [
                f.write_text(f.read_text().replace('ERADistiller', 'Gone'))
                for f in run.rglob('*.py')
            ],
            'could not be built',
        ),
    ],
    ids=['checkpoints', 'checkpoint', 'log', 'config', 'data', 'method'],
)
def test_page__made_of_what_is_there(toy_runs, tmp_path, spoil, said):
    shutil.copytree(toy_runs / 'era', tmp_path / 'era')
    spoil(tmp_path / 'era')
    out = write_report(
        [tmp_path / 'era', toy_runs / 'plain'],
        tmp_path / 'p.html',
        images=2,
    )
    missing = in_page(out.read_text(), 'summary-json')['missing']
    assert any(said in line for line in missing), missing
    # Plain is still shown.
    assert any('plain' in row[0] for row in rows_of(out.read_text(), 'runs'))


def test_page__of_a_method_without_estimates(toy_runs, coco, tmp_path):
    fitnet = testing.distillation_config(
        dict(type='era_mm.FeatureImitationDistiller'),
        checkpoint=f'{toy_runs}/big/epoch_2.pth',
    )
    folder = train(tmp_path / 'fitnet', fitnet, coco)
    out = write_report(
        [folder, toy_runs / 'plain'], tmp_path / 'p.html', images=2
    )
    text = out.read_text()
    assert 'FeatureImitation' in text
    assert 'id="unexplained-0"' not in text
    missing = in_page(text, 'summary-json')['missing']
    assert 'teacher - student' in text or any('heat' in m for m in missing)


def test_page__of_two_students_without_a_teacher(toy_runs, coco, tmp_path):
    """IE-DML: a column for each student, and their features side by side."""
    students = dict(
        first=testing.detector_config(), second=testing.detector_config()
    )
    folder = train(
        tmp_path / 'ie_dml',
        dict(
            type='era_mm.MutualDistillation',
            students=students,
            distiller=dict(type='era_mm.IEKDDistiller'),
        ),
        coco,
        optim_wrapper=dict(
            type='OptimWrapper',
            constructor='era_mm.MutualOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.01),
        ),
        custom_hooks=[dict(type='era_mm.ModesHook', modes=['second'])],
    )
    before = snapshot(folder)
    out = write_report(
        [folder, toy_runs / 'plain'], tmp_path / 'p.html', images=4
    )
    assert snapshot(folder) == before
    text = out.read_text()
    summary = in_page(text, 'summary-json')
    assert summary['missing'] == []
    rows = {row['model']: row for row in summary['rows']}
    assert set(rows) == {'plain', 'ie_dml S', 'ie_dml second'}
    # The three networks have one architecture, the metrics are their own.
    assert len({row['parameters'] for row in rows.values()}) == 1
    assert rows['ie_dml second']['val'] is not None
    for title in ('ie_dml, first', 'ie_dml, second', 'ground truth'):
        assert title in text
    assert 'teacher' not in {row['role'] for row in summary['rows']}
    # Two levels: the first student's features beside the second's.
    assert text.count('second - first') >= 2
    assert 'teacher - ' not in text


def test_students__of_a_mutual_run_have_their_own_weights(coco, tmp_path):
    students = dict(
        first=testing.detector_config(),
        second=testing.detector_config(width=12, channels=24),
    )
    config = dict(
        type='era_mm.MutualDistillation',
        students=students,
        distiller=dict(type='era_mm.IEKDDistiller'),
    )
    model = MODELS.build(copy.deepcopy(config))
    run = Run(
        tmp_path,
        Config(testing.run_config(config, coco, tmp_path)),
        checkpoint=tmp_path / 'both.pth',
    )
    torch.save({'state_dict': model.state_dict()}, run.checkpoint)
    built = build_students(run)
    assert list(built) == ['first', 'second']
    for name, student in built.items():
        own = model.students[name].student.state_dict()
        assert set(student.state_dict()) == set(own)
        for key, value in student.state_dict().items():
            assert torch.equal(value, own[key]), key


def test_write_report__refuses_a_place_in_a_work_dir(toy_runs, tmp_path):
    with pytest.raises(UserError, match='nothing is written'):
        write_report([toy_runs / 'era'], toy_runs / 'era' / 'report.html')
    with pytest.raises(UserError, match=r'\.html'):
        write_report([toy_runs / 'era'], tmp_path / 'report.txt')
    for name in ('images', 'shown', 'seconds'):
        with pytest.raises(UserError, match=f'--{name}: expected 0 or more'):
            write_report(
                [toy_runs / 'era'], tmp_path / 'report.html', **{name: -1}
            )


def test_page__of_a_run_without_a_log_does_not_deny_the_plain_one(
    toy_runs, tmp_path
):
    folder = shutil.copytree(toy_runs / 'era', tmp_path / 'silent')
    for log in folder.glob('*/vis_data/scalars.json'):
        log.unlink()
    out = write_report(
        [folder, toy_runs / 'plain'], tmp_path / 'p.html', images=0
    )
    summary = in_page(out.read_text(), 'summary-json')
    assert 'have no metric in common' in summary['headline']


def test_run_report__says_where_the_page_is(toy_runs, tmp_path, capsys):
    out = tmp_path / 'p.html'
    arguments = [str(toy_runs / 'plain'), '--out', str(out), '--images', '0']
    assert run_report(arguments) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert run_report([str(tmp_path / 'no'), '--out', str(out)]) == 1
    assert 'expected the work dir' in capsys.readouterr().err


def test_write_report__shows_a_demos_table(toy_runs, tmp_path):
    table = tmp_path / 'table.json'
    table.write_text(json.dumps({'rows': [{'AP': 12.5}], 'minutes': 3}))
    out = write_report(
        [toy_runs / 'plain'], tmp_path / 'p.html', images=0, table=table
    )
    assert 'Measured by the demo' in out.read_text()
    assert '<th scope="row">12.5</th>' in out.read_text()


def test_write_demo_report__finds_the_runs(toy_runs, tmp_path):
    demo = tmp_path / 'demo'
    shutil.copytree(toy_runs, demo)
    page = write_demo_report(demo, images=0)
    assert page == demo / 'report.html'
    rows = rows_of(page.read_text(), 'runs')
    assert {row[0] for row in rows} >= {'plain', 'era'}


# -- classifiers --------------------------------------------------------


@pytest.fixture
def classifiers(tmp_path):
    """A plain and an ERA classifier on a few images in folders."""
    from PIL import Image

    for number in range(9):
        folder = tmp_path / 'data' / f'class{number % 3}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32), (80 * (number % 3), 9 * number, 0)).save(
            folder / f'{number}.png'
        )
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    loader = dict(
        batch_size=3,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CustomDataset',
            data_prefix=str(tmp_path / 'data'),
            pipeline=pipeline,
        ),
    )
    wide, small = (testing.classifier_config(width) for width in (12, 8))

    def train(name, model):
        config = testing.run_config(model, '', tmp_path / name)
        config = dict(config) | dict(
            default_scope='mmpretrain',
            train_dataloader=loader,
            val_dataloader=loader,
            val_evaluator=dict(type='Accuracy', topk=(1,)),
        )
        for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
            config.pop(key)
        Runner.from_cfg(Config(copy.deepcopy(config))).train()
        return tmp_path / name

    big = train('big', wide)
    era = dict(
        type='era_mm.Distillation',
        student=small,
        teacher=dict(config=wide, checkpoint=f'{big}/epoch_2.pth'),
        distiller=dict(type='era_mm.ERADistiller'),
    )
    return [train('era', era), train('plain', small)]


def test_page__of_classifiers(classifiers, tmp_path):
    out = write_report(classifiers, tmp_path / 'p.html', images=9)
    text = out.read_text()
    summary = in_page(text, 'summary-json')
    assert summary['metric'] == 'top-1'
    assert summary['missing'] == []
    assert 'truth: class' in text
    assert 'Difference in accuracy' in text
    assert 'the probability of the true class' in text
    titles = re.findall(r'<h3>(?:Image|Val)[^<]*: ([^<]*)</h3>', text)
    assert titles
    change = r'unchanged|(improved|degraded) by \d[\d.e-]*'
    assert all(re.fullmatch(change, title) for title in titles), titles
    assert 'what each branch adds' in text


# -- in a browser -------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason='chromium is not installed')
@pytest.mark.parametrize('size', ['1280,900', '390,844'])
def test_page__in_chromium(page, tmp_path, size):
    probed = tmp_path / 'probed.html'
    probed.write_text(page.read_text().replace('</body>', PROBE + '</body>'))
    done = subprocess.run(
        [
            CHROMIUM,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-quic',
            '--no-first-run',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
            f'--user-data-dir={tmp_path / "profile"}',
            f'--window-size={size}',
            '--enable-logging=stderr',
            '--virtual-time-budget=30000',
            '--dump-dom',
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
    assert said == []
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    probe = json.loads(html.unescape(found[1]))
    assert probe['drawn'] == 'yes'
    assert probe['fetched'] == 0
    assert probe['wide'] <= 0
    assert probe['up'] == sorted(probe['before'])
    assert probe['down'] == sorted(probe['before'], reverse=True)
    assert probe['sort'] == 'descending'
    # On paper figures fit the page, in the colours of paper; then as before.
    assert probe['paper'] <= 670
    assert probe['low'] <= 0.8 * probe['high']
    assert probe['grid'] == '#ddd'
    assert probe['again'] == probe['screen']
    assert len(probe['figures']) >= 10
    for figure in probe['figures']:
        assert figure['traces'], figure
        assert figure['points'], figure
        assert figure['svg'], figure
        assert figure['label'], figure


def test_distilled_text__is_a_config():
    # What other tests write by hand has to stay what trainings write.
    assert 'ERADistiller' in distilled()
