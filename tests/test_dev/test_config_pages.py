"""The pages of the config folders: what they say, and that they are fresh."""

import json

import pytest
import yaml

from dev import config_pages as tool
from dev.config_pages import CONFIGS, ROOT


def test_pages__are_what_the_configs_and_results_make():
    for path, text in tool.pages().items():
        assert path.read_text() == text, 'run python -m dev.config_pages'


def test_index__leads_to_every_config_of_the_folders_with_a_page():
    found = []
    for name in yaml.safe_load((ROOT / 'model-index.yml').read_text())[
        'Import'
    ]:
        content = yaml.safe_load((ROOT / name).read_text())
        (collection,) = content['Collections']
        assert (ROOT / collection['README']).is_file()
        for model in content['Models']:
            assert model['In Collection'] == collection['Name']
            found.append(model['Config'])
    expected = [
        path.relative_to(ROOT).as_posix()
        for path in CONFIGS.rglob('*.py')
        if path.parent == CONFIGS or path.parent.name in tool.COLLECTIONS
    ]
    assert sorted(found) == sorted(expected)


def write(folder, stem, comment, epochs=2):
    path = folder / f'{stem}.py'
    path.write_text(f'{comment}\ntrain_cfg = dict(max_epochs={epochs})\n')
    return path


@pytest.mark.parametrize(
    ('comment', 'about', 'twin'),
    [
        (
            '# ERA, A (38.9 AP) to B, 8 GPUs x\n# 32 images. Plain twin: '
            'plain_b.py, here.\n#   mim train era_mm x.py',
            'ERA, A (38.9 AP) to B, 8 GPUs x 32 images',
            'plain_b',
        ),
        ('# B alone, 1x:\n#   mim train era_mm x.py', 'B alone, 1x', None),
    ],
)
def test_comment__is_read(comment, about, twin, tmp_path):
    config = write(tmp_path, 'x', comment)
    assert (tool.about(config), tool.twin_of(config)) == (about, twin)


def test_results__are_those_of_the_config_as_it_is(tmp_path, monkeypatch):
    def run(name, value, config='era_x_digits', epochs=2):
        return dict(
            name=name,
            config=config,
            epochs=epochs,
            metrics={'coco/bbox_mAP': value},
        )

    results = tmp_path / 'results'
    results.mkdir()
    lines = [
        run('a_s0', 0.5),
        run('a_s1', 0.6),
        # Collapsed; another option, length and config.
        run('a_s2', 0.0),
        run('b_s0', 0.9),
        run('a_s3', 0.9, epochs=4),
        run('a_s4', 0.9, config='plain_x_digits'),
    ]
    (results / 'some.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(tool, 'RUNS', (tool.Runs('some.jsonl', 'a_*', 'val'),))
    config = write(tmp_path, 'era_x_digits', '# ERA.')
    # Standard error 5, times 12.706 at one degree of freedom.
    assert tool.shown(config) == (
        'AP 55.0 +- 63.5 on val, 2 seeds, 1 more collapsed '
        '([record](../../results/some.jsonl))'
    )
    assert tool.shown(write(tmp_path, 'era_y_digits', '# ERA.')) == 'not run'


def test_results__of_a_suite_replace_earlier_ones_on_its_split(
    tmp_path, monkeypatch
):
    def run(name, value):
        return dict(
            name=name,
            config='era_x_digits',
            epochs=2,
            metrics={'coco/bbox_mAP': value},
        )

    def row(seed, value, **more):
        return (
            dict(
                method='era',
                seed=seed,
                config='era_x_digits',
                options={},
                fingerprint=str(seed),
                metrics={'coco/bbox_mAP': value},
            )
            | more
        )

    results = tmp_path / 'results'
    results.mkdir()
    header = dict(
        suite='toys',
        metric=dict(key='coco/bbox_mAP', name='AP', scale=100),
        schedule=1.0,
        methods=dict(era=dict(schedule=1.0)),
    )
    lines = [
        header,
        row(0, 0.5),
        row(1, 0.6),
        row(2, 0.9, options={'model.x': 1}),
        row(3, 0.9, error='stopped'),
    ]
    (results / 'toys.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    old = '\n'.join(map(json.dumps, [run('a_s0', 0.7), run('b_s0', 0.8)]))
    (results / 'old.jsonl').write_text(old)
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(
        tool,
        'RUNS',
        (
            tool.Runs('old.jsonl', 'a_*', 'test'),
            tool.Runs('old.jsonl', 'b_*', 'val'),
        ),
    )
    config = write(tmp_path, 'era_x_digits', '# ERA.')
    assert tool.shown(config) == (
        'AP 55.0 +- 63.5 on test, 2 seeds '
        '([record](../../results/toys.jsonl)); '
        'AP 80.0 on val, one seed ([record](../../results/old.jsonl))'
    )
