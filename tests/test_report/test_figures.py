"""Figures hold the runs' numbers."""

import math

import pytest

from era_mm.report import figures, residual_figures
from era_mm.report.comparison import compare_runs
from era_mm.testing.work_dirs import distilled, train_lines, write_run

AP = 'coco/bbox_mAP'


@pytest.fixture
def comparison(tmp_path):
    for seed in (0, 1):
        write_run(
            tmp_path / f'plain_s{seed}',
            seed=seed,
            metrics=[
                {AP: 0.1 * epoch + 0.02 * seed, f'{AP}_s': 0.1, 'step': epoch}
                for epoch in (1, 2)
            ],
            train=train_lines(20, loss_cls=lambda s: 1 / s),
        )
        write_run(
            tmp_path / f'era_s{seed}',
            model=distilled(),
            seed=seed,
            metrics=[
                {
                    AP: 0.2 * epoch,
                    f'{AP}_s': 0.15,
                    f'{AP}_m': 0.3,
                    f'T/{AP}': 0.25 * epoch,
                    'step': epoch,
                }
                for epoch in (1, 2)
            ],
            train=train_lines(
                20,
                loss_cls=lambda s: 2 / s,
                loss_era_align=1.0,
                era_unexplained_e0=lambda s: 0.5 + 0.1 * seed,  # noqa: B023
                era_unexplained_e1=0.4,
                era_unexplained_e10=0.3,
            ),
        )
    return compare_runs(sorted(tmp_path.iterdir()))


def trace(figure, name, **more):
    (found,) = [
        t
        for t in figure.data
        if t.get('name') == name
        and all(t.get(k) == v for k, v in more.items())
    ]
    return found


def test_across_seeds__mean_and_range():
    steps, mean, low, high = figures.across_seeds(
        [[(1, 1.0), (2, 3.0)], [(1, 3.0), (2, math.nan)]]
    )
    assert steps == [1, 2]
    assert mean == [2, 3]
    assert low == [1, 3]
    assert high == [3, 3]


def test_across_seeds__long_series_are_averaged():
    series = [(step, float(step)) for step in range(1, 1001)]
    steps, mean, _, _ = figures.across_seeds([series])
    assert len(steps) <= figures.MOST_POINTS
    # Four steps become one: 1, 2, 3, 4 give 2.5 at 4.
    assert (steps[0], mean[0]) == (4, 2.5)


def test_metric_over_time__lines_bands_and_table(comparison):
    figure = figures.metric_over_time(comparison, figures.Look(comparison))
    assert trace(figure, 'plain')['y'] == [11, 21]
    assert trace(figure, 'era T')['y'] == [25, 50]
    band = next(t for t in figure.data if t.get('fill') == 'toself')
    assert band['y'] == [12, 22, 20, 10]
    row = next(row for row in figure.table.rows if row[0] == 'plain')
    assert row[1] == '21.0'
    assert 'plain 21.0' in figure.alt


def test_metric_over_time__validated_once_gives_marks(tmp_path):
    for seed in (0, 1):
        write_run(
            tmp_path / f'plain_s{seed}',
            seed=seed,
            metrics=[{AP: 0.3 + 0.1 * seed, 'step': 2}],
            train=train_lines(20),
        )
    found = compare_runs(sorted(tmp_path.iterdir()))
    figure = figures.metric_over_time(found, figures.Look(found))
    assert trace(figure, 'plain')['x'] == [30, 40]


def test_size_differences__sorted_by_the_gain(comparison):
    figure = figures.size_differences(comparison, figures.Look(comparison))
    # Plain has no medium objects: nothing to compare with.
    assert trace(figure, 'era S')['y'] == ['AP, small objects']
    assert trace(figure, 'era S')['x'] == [5]


def test_class_differences__most_gained_first(comparison):
    figure = figures.class_differences(
        comparison,
        figures.Look(comparison),
        [('era', {'cat': 40.0, 'dog': 50.0}, {'cat': 41.0, 'dog': 60.0})],
        number=9,
        what='AP',
    )
    assert trace(figure, 'era S')['y'] == ['dog', 'cat']
    assert trace(figure, 'era S')['x'] == [10, 1]
    assert '9 images' in figure.title


def test_loss_terms__one_figure_for_each(comparison):
    found = figures.loss_terms(comparison, figures.Look(comparison))
    assert [f.title for f in found] == ['loss', 'loss_cls', 'loss_era_align']
    assert trace(found[1], 'era')['y'][:2] == [2, 1]
    assert found[1].layout['yaxis']['type'] == 'log'


def test_unexplained__shares_and_what_the_branches_add(comparison):
    (figure,) = residual_figures.unexplained(comparison)
    # In order of the estimates, e10 last.
    assert [row[0] for row in figure.table.rows] == ['e0', 'e1', 'e10']
    left = [t for t in figure.data if t.get('xaxis') is None]
    assert next(t for t in left if t.get('name') == 'e0')['y'][0] == 55
    gained = trace(figure, 'e1', xaxis='x2')
    assert gained['y'][0] == pytest.approx(15)


def test_unexplained__by_level_where_the_hook_was(tmp_path):
    folder = write_run(
        tmp_path / 'era',
        model=distilled(),
        train=[
            *train_lines(10),
            {
                'step': 5,
                'residuals/unexplained_e0_level0': 0.5,
                'residuals/unexplained_e0_level1': 0.25,
                'residuals/unexplained_e1_level0': 0.4,
                'residuals/unexplained_e1_level1': 0.2,
            },
        ],
    )
    (figure,) = residual_figures.unexplained(compare_runs([folder]))
    assert trace(figure, 'e0, level 1')['y'] == [25]
    assert trace(figure, 'e1, level 0')['y'] == [40]


def test_figures__are_what_plotly_knows(comparison):
    graphs = pytest.importorskip('plotly.graph_objects')
    look = figures.Look(comparison)
    for figure in [
        figures.metric_over_time(comparison, look),
        figures.size_differences(comparison, look),
        *figures.loss_terms(comparison, look),
        *residual_figures.unexplained(comparison),
        residual_figures.level_bars('era', [[0.2, 0.1]], 4, 0),
    ]:
        graphs.Figure(data=figure.data, layout=figure.layout)
        assert figure.alt
