"""Numbers of the page, computed by hand, and what was not measured."""

import json

import pytest

from era_mm.engine.suite import logs
from era_mm.engine.suite.page import page, shown
from era_mm.engine.suite.results import PairResults, values_by_config
from era_mm.engine.suite.rows import read_rows, write_rows
from era_mm.errors import UserError
from era_mm.statistics import Estimate


def test_shown__has_its_interval_or_says_why_not():
    assert shown(Estimate(51.26, 0.34, 5), 1) == '51.3 +- 0.3'
    assert shown(Estimate(51.26, None, 1), 1) == '51.3, one run'
    assert shown(None, 1) == 'not run'


HEADER = dict(
    suite='toys',
    title='Toys',
    metric=dict(key='m/ap', name='AP', scale=100, digits=1),
    seeds=[0, 1, 2],
    schedule=1.0,
    pairs=dict(
        p=dict(
            title='Big to small',
            methods=['plain', 'plain_x2', 'fitnet', 'cwd', 'at', 'era', 'cut'],
            has_teacher=True,
        )
    ),
    methods={
        name: dict(title=name, role=role, part_of=whole, schedule=factor)
        for name, role, whole, factor in (
            ('plain', 'plain', None, 1.0),
            ('plain_x2', 'plain', None, 2.0),
            ('fitnet', 'baseline', None, 1.0),
            ('cwd', 'baseline', None, 1.0),
            ('at', 'baseline', None, 1.0),
            ('era', 'method', None, 1.0),
            ('cut', 'part', 'era', 1.0),
        )
    },
)


def row(method, seed, ap, seconds=10.0, jobs=2, **more):
    return (
        dict(
            pair='p',
            method=method,
            seed=seed,
            config=f'{method}_config',
            options={},
            fingerprint=f'{method} {seed}',
            teacher=None if method.startswith('plain') else 'sum',
            metrics={'m/ap': ap},
            seconds=dict(train=seconds, test=1.0),
            memory=dict(process_mib=100 + (seed or 0)),
            machine=dict(device='cpu', cpu='abacus', threads=1),
            versions=dict(torch='2'),
            jobs=jobs,
            commit='abc',
            finished='2026-01-01T00:00:00',
        )
        | more
    )


def rows():
    # Differences to plain: era 8, 9, 10; fitnet 5, 5, 5; x2 1, 2, 3.
    plain = (0.40, 0.42, 0.44)
    found = [row('teacher', None, 0.6)]
    for seed, ap in enumerate(plain):
        found += [
            row('plain', seed, ap),
            row('plain_x2', seed, ap + 0.01 * (seed + 1), 20.0),
            row('fitnet', seed, ap + 0.05, 10.4),
            row('era', seed, ap + 0.08 + 0.01 * seed, 19.0 + seed),
        ]
    # Higher than fitnet, but of one run alone.
    return [*found, row('cwd', 0, 0.9, 30.0)]


def results(found=None):
    return PairResults(HEADER, 'p', rows() if found is None else found)


def test_best_baseline__has_the_highest_mean_of_those_with_most_runs():
    assert results().best_baseline == 'fitnet'
    assert results([row('plain', 0, 0.4)]).best_baseline is None


def test_plain_as_long__is_the_shortest_that_took_the_time():
    pair = results()
    # (19 + 20 + 21) / 3 / 10.
    assert pair.cost('era') == pytest.approx(2.0)
    assert pair.plain_as_long('era') == 'plain_x2'
    # 4 % more than plain: as long as it, within 5 %.
    assert pair.plain_as_long('fitnet') == 'plain'
    # Three times as long: no plain run was.
    assert pair.plain_as_long('cwd') is None
    # Never run, and run on another machine: no time is known.
    assert pair.plain_as_long('at') is None
    moved = [row('plain', 0, 0.4), row('era', 0, 0.5, jobs=9)]
    assert results(moved).cost('era') is None


def table_of(text, title):
    """Rows of the first table below a line, by their first column."""
    lines = text[text.index(title) :].splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith('|'))
    found = {}
    for line in lines[begin:]:
        if not line.startswith('|'):
            break
        first, *rest = (cell.strip() for cell in line.strip('|').split('|'))
        found[first] = rest
    return found


def written(tmp_path, found):
    write_rows(tmp_path / 'toys.jsonl', HEADER, found)
    return page(tmp_path)


def test_page__numbers_are_those_computed_by_hand(tmp_path):
    text = written(tmp_path, rows())
    table = table_of(text, '### Big to small')
    assert table['teacher'][:2] == ['1 of 1', '60.0']
    # Mean of 40, 42, 44; t * 2 / sqrt(3) = 4.97.
    assert table['plain'] == [
        '3 of 3', '42.0 +- 5.0', '', '', '', '1.00', '102'
    ]  # fmt: skip
    assert table['plain_x2'][2:5] == ['2.0 +- 2.5', '', '']
    # To plain 8, 9, 10; to x2 7, 7, 7; to fitnet 3, 4, 5.
    assert table['era'][2:6] == [
        '9.0 +- 2.5',
        '7.0 +- 0.0 (plain_x2)',
        '4.0 +- 2.5',
        '2.00',
    ]
    assert table['fitnet'][4] == 'the best'
    # Sorted: the best first, what was not run last.
    assert list(table)[-4:] == ['cwd', 'era', 'fitnet', 'at']
    assert (
        '- Better than plain here (the whole interval is above 0): era; '
        'fitnet.' in text
    )
    # One run alone; x3 of it there is no plain training of that time.
    few = 'by fewer than 3 pairs of runs, too few for a verdict:'
    assert f'- Above plain {few} cwd.' in text
    assert 'Below plain as long' not in text
    # 1 teacher, 3 x 4, 1: 14 runs; seconds 10 + 30 + 60 + 31.2 + 60 + 30
    # and 14 tests of 1 s: 235.2 s.
    assert '14 runs, 4 minutes of training and test together, 2026' in text


def test_page__what_was_not_measured_is_not_run(tmp_path):
    table = table_of(written(tmp_path, rows()), '### Big to small')
    assert table['at'] == ['0 of 3', *['not run'] * 6]
    assert table['cwd'][1] == '90.0, one run'
    # Three times as long as plain: there is nothing to compare it with.
    assert table['cwd'][3] == 'not run'
    text = written(tmp_path, [])
    empty = table_of(text, '### Big to small')
    assert empty['teacher'][1] == 'not run'
    assert empty['era'] == ['0 of 3', *['not run'] * 6]
    digits = set(''.join(c for v in empty.values() for c in v))
    assert digits & set('0123456789') <= set('013')
    assert '- Better' not in text


def test_page__costs_that_were_not_measured_are_no_missing_runs(tmp_path):
    found = rows()
    for entry in found:
        if entry['method'] == 'era':
            entry |= dict(seconds=dict(train=None, test=1.0), memory=None)
    text = written(tmp_path, found)
    table = table_of(text, '### Big to small')
    assert table['era'][3] == 'not measured'
    assert table['era'][5:] == ['not measured'] * 2
    # Without 19 + 20 + 21: 175.2 s.
    assert (
        '14 runs, 3 minutes of training and test together (the training '
        'time of 3 is not known), 2026'
    ) in text


def test_page__says_what_plain_as_long_beats(tmp_path):
    found = [
        dict(one, metrics={'m/ap': 0.40}) if one['method'] == 'era' else one
        for one in rows()
    ]
    text = written(tmp_path, found)
    # 40 to 40, 42, 44.
    assert '- Not distinguishable from plain by these runs: era.' in text
    slow = '- Below plain as long (mean difference, even of one pair):'
    assert f'{slow} era.' in text

    # As much as plain, from one run, is not above it.
    few = 'by fewer than 3 pairs of runs, too few for a verdict:'
    found = [
        dict(one, metrics={'m/ap': 0.40}) if one['method'] == 'cwd' else one
        for one in found
    ]
    assert f'- Not above plain {few} cwd.' in written(tmp_path, found)

    # -8, -9, -10.
    found = [
        dict(one, metrics={'m/ap': 0.32 + 0.01 * one['seed']})
        if one['method'] == 'era'
        else one
        for one in found
    ]
    assert '- Worse than plain here: era.' in written(tmp_path, found)

    # As long as twice the schedule, whose values it has.
    plain = {
        one['seed']: one['metrics']
        for one in rows()
        if one['method'] == 'plain_x2'
    }
    found = [
        dict(one, metrics=plain[one['seed']])
        if one['method'] == 'era'
        else one
        for one in rows()
    ]
    assert 'Below plain as long' not in written(tmp_path, found)


def test_page__of_tries_has_no_verdicts(tmp_path):
    header = dict(HEADER, seeds=[0, 1])
    found = [one for one in rows() if one['seed'] != 2]
    write_rows(tmp_path / 'toys.jsonl', header, found)
    text = page(tmp_path)
    assert 'verdict' not in text
    assert 'plain as long (' not in text


def test_page__parts_without_a_time_were_not_measured(tmp_path):
    found = [
        *rows(),
        *(row('cut', s, 0.48, seconds=None) for s in range(3)),
    ]
    table = table_of(written(tmp_path, found), 'Variants, each')
    assert table['cut'][-1] == 'not measured'
    assert (
        table_of(written(tmp_path, rows()), 'Variants, each')['cut'][-1]
        == 'not run'
    )


def test_page__rows_of_former_options_are_left_out(tmp_path):
    header = json.loads(json.dumps(HEADER))
    header['methods']['era']['options'] = {'model.weight': 0.5}
    found = [
        dict(line, options={'model.weight': 0.5})
        if (line['method'], line['seed']) == ('era', 2)
        else line
        for line in rows()
    ]
    write_rows(tmp_path / 'toys.jsonl', header, found)
    text = page(tmp_path)
    assert table_of(text, '### Big')['era'][:2] == ['1 of 3', '54.0, one run']
    assert '2 rows are of options that the suite no longer has' in text


def test_page__parts_are_compared_with_the_whole(tmp_path):
    found = [*rows(), *(row('cut', s, 0.48 + 0.02 * s) for s in range(3))]
    table = table_of(written(tmp_path, found), 'Variants, each')
    assert table['era'][2:4] == ['', '9.0 +- 2.5']
    # 48, 50, 52 to 48, 51, 54: 0, -1, -2.
    assert table['cut'][1:3] == ['50.0 +- 5.0', '-1.0 +- 2.5']


def test_page__variants_are_below_their_own_method(tmp_path):
    whole = HEADER['methods']
    thin = dict(whole['cut'], title='thin', part_of='fitnet')
    pair = HEADER['pairs']['p']
    header = dict(
        HEADER,
        methods=whole | dict(thin=thin),
        pairs=dict(p=dict(pair, methods=[*pair['methods'], 'thin'])),
    )
    found = [
        *rows(),
        *(row('cut', s, 0.48 + 0.02 * s) for s in range(3)),
        *(row('thin', s, 0.46 + 0.02 * s) for s in range(3)),
    ]
    write_rows(tmp_path / 'toys.jsonl', header, found)
    table = table_of(page(tmp_path), 'Variants, each')
    assert list(table)[2:] == ['era', 'cut', 'fitnet', 'thin']
    # 46, 48, 50 to 45, 47, 49.
    assert table['thin'][2] == '1.0 +- 0.0'
    assert table['cut'][2] == '-1.0 +- 2.5'


def test_page__modes_have_rows_of_their_own(tmp_path):
    found = rows()
    for entry in found:
        if entry['method'] == 'era':
            entry['metrics'] = entry['metrics'] | {
                'T/m/ap': entry['metrics']['m/ap'] + 0.01
            }
    table = table_of(written(tmp_path, found), '### Big to small')
    assert table['era, T'][2] == '10.0 +- 2.5'


def test_page__collapsed_runs_count_and_are_told_of(tmp_path):
    found = rows()
    assert 'Collapsed' not in written(tmp_path, found)

    for one in found:
        if (one['method'], one['seed']) == ('plain', 1):
            one['metrics']['m/ap'] = 0.01
    text = written(tmp_path, found)

    # Without seed 1: era 8 and 10, fitnet 5 and 5, twice the schedule 1 and 3.
    # The interval of two values a and b is 12.7 * |a - b| / 2.
    assert 'median: plain, seed 1 (1.0). They count in the means' in text
    # Two differences are left of each.
    few = 'by fewer than 3 pairs of runs, too few for a verdict:'
    assert f'- Above plain {few} cwd; era; fitnet.' in text
    assert '- Better' not in text
    # Mean of 40 and 44: the interval is 12.7 * 2.
    assert ' AP of the other runs: plain 42.0 +- 25.4.' in text
    table = table_of(text, '### Big to small')
    assert table['era'][2] == '9.0 +- 12.7'
    assert table['plain_x2'][2] == '2.0 +- 12.7'
    assert '- More than plain with the seeds of collapsed runs: era ' in text
    # Mean of 40, 1, 44; its deviation of 23.8 * 4.30 / sqrt(3).
    assert '28.3 +- 59.0' in table_of(text, '### Big to small')['plain'][1]


def test_page__on_val_has_the_values_of_the_last_validation(tmp_path):
    header = dict(HEADER, metric=dict(HEADER['metric'], split='val'))
    found = rows()
    for entry in found:
        entry['val'] = {'m/ap': entry['metrics']['m/ap'] / 2}
    write_rows(tmp_path / 'toys.jsonl', header, found)
    text = page(tmp_path)
    assert ' on the val split, ' in text
    on_test = table_of(written(tmp_path, rows()), '### Big to small')
    mean = float(on_test['era'][1].partition(' ')[0])
    halved = table_of(text, '### Big to small')['era'][1]
    assert float(halved.partition(' ')[0]) == pytest.approx(mean / 2, abs=0.06)


def test_page__tells_of_failures(tmp_path):
    broken = dict(row('at', 1, 0.0), error='train stopped with status 1\nx')
    del broken['metrics']
    text = written(tmp_path, [*rows(), broken])
    assert '- at, seed 1: train stopped with status 1\n' in text
    assert 'different teachers' not in text


def test_page__compares_no_runs_of_different_teachers(tmp_path):
    # ERA's third run learned from another teacher than FitNet's.
    other = row('era', 2, 0.5, teacher='another')
    second = row('teacher', None, 0.7, teacher='another')
    text = written(tmp_path, [*rows()[:-2], other, second])
    assert 'had 2 different teachers' in text
    table = table_of(text, 'Big to small')
    assert table['teacher of 5 runs'][:2] == ['1 of 1', '60.0']
    assert table['teacher of 1 run'][:2] == ['1 of 1', '70.0']
    # Plain has no teacher: 8, 9 and 50 - 44. FitNet had the first: 3, 4.
    assert table['era'][0] == '3 of 3'
    assert table['era'][2].startswith('7.7 ')
    assert table['era'][4].startswith('3.5 ')


def test_write_rows__keeps_the_teachers_with_students_and_the_newest(tmp_path):
    def teacher(weights, day):
        found = row('teacher', None, 0.6, teacher=weights)
        return found | dict(finished=f'2026-01-0{day}T00:00:00')

    file = tmp_path / 'toys.jsonl'
    write_rows(
        file,
        HEADER,
        [
            teacher('first', 1),
            teacher('left', 2),
            teacher('new', 3),
            row('era', 0, 0.5, teacher='first'),
        ],
    )
    _, found = read_rows(file)
    assert [r['teacher'] for r in found] == ['first', 'new', 'first']


def test_page__shows_what_others_published_and_what_is_ours(tmp_path):
    (tmp_path / 'configs/era').mkdir(parents=True)
    (tmp_path / 'configs/era/era_config.py').touch()
    (tmp_path / 'configs/cwd_x.py').touch()
    numbers = [
        dict(method='ERA', value=50.5, source='a', config='era_config'),
        dict(method='CWD', value=41.9, source='b', config='cwd_x'),
        dict(method='FGD', value=43.5, source='c'),
        dict(method='LD', value=41.1, source='d', without='another schedule'),
    ]
    (tmp_path / 'published.json').write_text(
        json.dumps(
            dict(
                tables=[
                    dict(
                        title='COCO',
                        note='AP.',
                        pairs=[dict(pair='B to s', numbers=numbers)],
                    )
                ]
            )
        )
    )
    write_rows(tmp_path / 'toys.jsonl', HEADER, rows())
    text = page(tmp_path, [tmp_path / 'configs'])
    lines = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in text[text.index('### COCO') :].splitlines()
        if line.startswith('| B')
    ]
    assert lines == [
        # 48, 51, 54.
        ['B to s', 'ERA', '50.5', 'a', '`era_config`', '51.0 +- 7.5'],
        ['B to s', 'CWD', '41.9', 'b', '`cwd_x`', 'not run here'],
        ['B to s', 'FGD', '43.5', 'c', 'method not here', ''],
        ['B to s', 'LD', '41.1', 'd', 'another schedule', ''],
    ]


def test_values_by_config__are_of_runs_of_the_config_as_it_is():
    toys = [
        *rows(),
        # The teacher of a second pair, which is trained once.
        row('teacher', None, 0.6, pair='q'),
        # Trained on another machine.
        row('teacher', None, 0.7, teacher='another'),
        row('era', 3, 0.1, options={'model.x': 1}),
        dict(row('era', 4, 0.1), error='stopped'),
    ]
    # One that compares on val has the test metrics as well.
    tries = dict(
        HEADER, suite='tries', metric=dict(HEADER['metric'], split='val')
    )
    fewer = [row('era', 0, 0.2), row('at', 0, 0.3), row('at', 1, 0.5)]
    # plain_x2, of twice the length, is left out.
    expected = {
        'teacher_config': ('toys', [60.0]),
        'plain_config': ('toys', pytest.approx([40.0, 42.0, 44.0])),
        'fitnet_config': ('toys', pytest.approx([45.0, 47.0, 49.0])),
        'era_config': ('toys', pytest.approx([48.0, 51.0, 54.0])),
        'cwd_config': ('toys', [90.0]),
        'at_config': ('tries', [30.0, 50.0]),
    }
    suites = [(HEADER, toys), (tries, fewer)]
    assert values_by_config(suites) == expected
    assert values_by_config(suites[::-1]) == expected


def test_rows__of_other_tools_are_not_a_suite(tmp_path):
    file = tmp_path / 'old.jsonl'
    file.write_text('{"name": "plain_s0", "metrics": {}}\n')
    assert read_rows(file) == (None, [])
    assert 'No suite has been run.' in page(tmp_path)
    file.write_text('{"suite"')
    with pytest.raises(UserError, match='one JSON object per line'):
        read_rows(file)


def test_logs__time_is_that_of_the_iterations(tmp_path):
    def log(attempt, *records):
        folder = tmp_path / attempt / 'vis_data'
        folder.mkdir(parents=True)
        text = ''.join(json.dumps(r) + '\n' for r in records)
        # Killed while it wrote.
        (folder / 'scalars.json').write_text(text + '{"iter": 9, "st')

    log(
        '1',
        dict(iter=10, step=10, time=1.0, epoch=1, x=5.0),
        dict(iter=20, step=20, time=9.0, epoch=2, x=4.0),
    )
    log(
        '2',
        dict(iter=20, step=20, time=2.0, epoch=2, x=3.0),
        {'m/ap': 0.1, 'time': 7.0, 'step': 2},
        dict(iter=25, step=25, time=4.0, epoch=3, x=2.0),
        {'m/ap': 0.5, 'time': 7.0, 'step': 3},
    )
    records = logs.scalars(tmp_path)
    # 10 * 1 + 10 * 2 + 5 * 4.
    assert logs.train_seconds(records) == 50.0
    assert logs.metrics_of(records) == {'m/ap': 0.5}
    assert logs.ends_of(records, ['x*']) == {'x': dict(first=5.0, last=2.0)}
    # The third of four epochs is under way.
    assert logs.share_done(tmp_path, 'epochs', 4) == 0.5
    assert logs.share_done(tmp_path, 'iters', 50) == 0.5
    assert logs.share_done(tmp_path / 'none', 'iters', 50) == 0.0
    assert logs.train_seconds([]) is None
