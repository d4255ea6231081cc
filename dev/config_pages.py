"""Write each config folder's README.md and metafile.yml, and model-index.yml.

python -m dev.config_pages

What a config is stands in its first comment, what became of it in `results/`.
A folder that is not in COLLECTIONS has no page: a new method gets its entry
when it has something to show.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mmengine.config import Config

from era_mm.engine.suite.results import read_results as read_suites
from era_mm.engine.suite.results import values_by_config
from era_mm.statistics import estimate

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'


class Collection(NamedTuple):
    """What a folder of configs belongs to.

    Args:
        name: Of the method.
        about: First sentence of the page; Markdown.
        title: Of the paper.
        url: Of the paper.
        outside: Configs of it that lie elsewhere below `configs/`.
    """

    name: str
    about: str
    title: str = ''
    url: str = ''
    outside: tuple[str, ...] = ()


COLLECTIONS = {
    'era': Collection(
        'ERA',
        'Expandable Residual Approximation: '
        '[docs/methods/era.md](../../docs/methods/era.md).',
        'Expandable Residual Approximation for Knowledge Distillation',
        'https://arxiv.org/abs/2508.16050',
        ('era_retinanet_r101_r50.py',),
    ),
    'feature_imitation': Collection(
        'FitNet',
        "The student's features pulled to the teacher's: "
        '[docs/methods/sokd.md](../../docs/methods/sokd.md).',
        'FitNets: Hints for Thin Deep Nets',
        'https://arxiv.org/abs/1412.6550',
    ),
    'baselines': Collection(
        'baselines',
        'What else one would try, and what some of the methods are compared '
        'with: '
        '[docs/methods/baselines.md](../../docs/methods/baselines.md).',
    ),
    'ie_kd': Collection(
        'IE-KD',
        'Inheritance and exploration, and IE-DML for two students: '
        '[docs/methods/ie_kd.md](../../docs/methods/ie_kd.md).',
        'Revisiting Knowledge Distillation: An Inheritance and Exploration '
        'Framework',
        'https://arxiv.org/abs/2107.00181',
    ),
    'plain': Collection(
        'plain',
        'Models without distillation: the plain twin of every other config, '
        'and teachers that are trained here.',
    ),
    'residual_kd': Collection(
        'Residual KD',
        'Student and assistant: '
        '[docs/methods/residual_kd.md](../../docs/methods/residual_kd.md).',
        'Residual Knowledge Distillation',
        'https://arxiv.org/abs/2002.09168',
    ),
    'sokd': Collection(
        'SoKD',
        'A teacher refined for the student, and areas that matter to both: '
        '[docs/methods/sokd.md](../../docs/methods/sokd.md).',
        'Student-Oriented Teacher Knowledge Refinement for Knowledge '
        'Distillation',
        'https://arxiv.org/abs/2409.18785',
    ),
    'trunk_to_branch': Collection(
        'Trunk-to-Branch',
        'Branches that teach their own trunk, no teacher: '
        '[docs/methods/trunk_to_branch.md]'
        '(../../docs/methods/trunk_to_branch.md).',
        'Trunk-to-Branch: Lightweight Multi-Sub Distillation with High-Order '
        'Feature Semantics',
    ),
}


class Runs(NamedTuple):
    """Recorded runs of configs as they are, without other options.

    Args:
        file: In `results/`, as a suite, `dev/summarize_runs.py` or a demo
            wrote it.
        names: Pattern of the runs' names.
        split: What was evaluated.
    """

    file: str
    names: str
    split: str


#: Besides the runs of suites.
RUNS = (
    Runs('digits_methods.jsonl', 'rkd_w_*', 'val'),
    Runs('digits_methods.jsonl', 'fitnet_*', 'val'),
    Runs('digits_methods.jsonl', 't2b_w1_*', 'val'),
    Runs('crops_demo.json', 'teacher', 'test'),
    Runs('era_two_stages.jsonl', '*', 'test'),
    Runs('digit_crops_t2b.jsonl', 't2b_w1_*', 'test'),
)


class Data(NamedTuple):
    """What a config trains on, and how that is judged.

    Args:
        name: Of the data.
        task: In a metafile.
        heading: The metric in a table.
        metric: The same in a metafile.
        key: The same in a log.
        factor: What makes it percent.
    """

    name: str
    task: str
    heading: str
    metric: str
    key: str
    factor: float


COCO = Data(
    'COCO 2017', 'Object Detection', 'AP', 'box AP', 'coco/bbox_mAP', 100
)
IMAGENET = Data(
    'ImageNet-1k',
    'Image Classification',
    'top-1',
    'Top 1 Accuracy',
    'accuracy/top1',
    1,
)
#: By the end of a config's name.
DATA = {
    '_digits': COCO._replace(name='digit scenes'),
    '_letters': COCO._replace(name='letter scenes'),
    '_digit_crops': IMAGENET._replace(name='digit crops'),
    '_cifar10': IMAGENET._replace(name='CIFAR-10'),
    '_cifar100': IMAGENET._replace(name='CIFAR-100'),
    '_imagenet': IMAGENET,
}


def data_of(config: Path) -> Data:
    """Data and metric of a config by its name."""
    for end, found in DATA.items():
        if config.stem.endswith(end):
            return found
    return COCO


def configs_of(folder: str) -> list[Path]:
    """The configs of a folder, those that lie elsewhere first."""
    outside = [CONFIGS / name for name in COLLECTIONS[folder].outside]
    return [*outside, *sorted((CONFIGS / folder).glob('*.py'))]


def comment_of(config: Path) -> str:
    """The first comment of a config, up to its commands."""
    lines = []
    for line in config.read_text().splitlines():
        if not line.startswith('# ') or line.startswith('#  '):
            break
        lines.append(line[2:])
    return ' '.join(lines)


def about(config: Path) -> str:
    """The first sentence of a config's comment, without its end mark."""
    return re.split(r'[.](?:\s|$)', comment_of(config))[0].rstrip(':')


def twin_of(config: Path) -> str | None:
    """Name of a config's plain twin."""
    found = re.search(r'Plain twin: (\w+)\.py', comment_of(config))
    return found and found[1]


@functools.cache
def suite_runs(folder: Path) -> dict[str, tuple[Runs, list[float]]]:
    """The metric of each run of the suites, in percent, by config."""
    return {
        config: (Runs(f'{suite}.jsonl', '*', 'test'), values)
        for config, (suite, values) in values_by_config(
            read_suites(folder)
        ).items()
    }


@functools.cache
def read_results(file: str) -> tuple[dict[str, Any], ...]:
    """The runs of a file in `results/`."""
    text = (ROOT / 'results' / file).read_text()
    if file.endswith('.jsonl'):
        runs = map(json.loads, text.splitlines())
        return tuple(
            # A row as suites write it.
            dict(run, name=run['method'], epochs=run['schedule']['epochs'])
            if 'method' in run
            else run
            for run in runs
            if 'method' not in run or not run['options']
        )
    # A demo's table. Its students are elsewhere, with more seeds.
    (teacher,) = (
        row for row in json.loads(text)['rows'] if 'teacher' in row.values()
    )
    return (
        dict(
            name='teacher',
            config='plain_resnet18w16_digit_crops',
            epochs=40,
            metrics={IMAGENET.key: teacher['top1']},
        ),
    )


def results_of(config: Path) -> Iterator[tuple[Runs, list[float]]]:
    """The metric of each seed, in percent, by where it is recorded.

    A suite's runs replace those of other records on the same split.
    """
    data = data_of(config)
    of_suite = suite_runs(ROOT / 'results').get(config.stem)
    if of_suite is not None:
        yield of_suite
    for runs in RUNS:
        if of_suite is not None and runs.split == of_suite[0].split:
            continue
        found = [
            run
            for run in read_results(runs.file)
            if run['config'] == config.stem
            and fnmatchcase(run['name'], runs.names)
        ]
        if not found:
            continue
        # Longer runs are in the records too.
        epochs = Config.fromfile(config).train_cfg.max_epochs
        values = [
            data.factor * run['metrics'][data.key]
            for run in found
            if run['epochs'] == epochs
        ]
        if values:
            yield runs, values


def shown(config: Path) -> str:
    """The cell of a config's results."""
    metric = data_of(config).heading
    parts = []
    for runs, values in results_of(config):
        # Rare in training from scratch; a mean over it says nothing.
        whole = [value for value in values if value > 0]
        mean, half, _ = estimate(whole)
        number = f'{mean:.1f}' + ('' if half is None else f' +- {half:.1f}')
        of = f'{len(whole)} seeds' if len(whole) > 1 else 'one seed'
        lost = len(values) - len(whole)
        collapsed = f', {lost} more collapsed' if lost else ''
        parts.append(
            f'{metric} {number} on {runs.split}, {of}{collapsed} '
            f'([record](../../results/{runs.file}))'
        )
    return '; '.join(parts) or 'not run'


def readme(folder: str) -> str:
    """The page of a folder."""
    collection = COLLECTIONS[folder]
    heads = ['config', 'what it trains', 'plain twin', 'result']
    if folder == 'plain':
        heads.remove('plain twin')
    rows = []
    for config in configs_of(folder):
        at = os.path.relpath(config, CONFIGS / folder)
        cells = [f'[`{config.stem}`]({at})', about(config)]
        if folder != 'plain':
            twin = twin_of(config)
            cells.append(f'[`{twin}`](../plain/{twin}.py)')
        rows.append([*cells, shown(config)])
    table = [heads, ['---'] * len(heads), *rows]
    return '\n'.join(
        [
            f'# {collection.name}\n',
            f'{collection.about}\n',
            *(f'| {" | ".join(row)} |' for row in table),
            '\nResults are those of the config as it is; +- is a 95 % '
            'interval of the mean over seeds.',
            '`python -m dev.config_pages` wrote this page from the configs '
            'and `results/`.\n',
        ]
    )


def metafile(folder: str) -> str:
    """What ``mim search`` reads of a folder."""
    collection = COLLECTIONS[folder]
    head: dict[str, Any] = dict(Name=collection.name)
    if collection.title:
        head['Metadata'] = {
            'Training Techniques': ['Knowledge Distillation'],
        }
        head['Paper'] = {'Title': collection.title}
        if collection.url:
            head['Paper']['URL'] = collection.url
    head['README'] = f'configs/{folder}/README.md'
    models = []
    for config in configs_of(folder):
        data = data_of(config)
        model: dict[str, Any] = {
            'Name': config.stem,
            'In Collection': collection.name,
            'Config': config.relative_to(ROOT).as_posix(),
            'Metadata': {'Training Data': [data.name]},
        }
        results = []
        for runs, values in results_of(config):
            mean = estimate([value for value in values if value > 0]).mean
            results.append(
                {
                    'Task': data.task,
                    'Dataset': f'{data.name}, {runs.split}',
                    'Metrics': {data.metric: round(mean, 1)},
                }
            )
        if results:
            model['Results'] = results
        models.append(model)
    return yaml.safe_dump(
        dict(Collections=[head], Models=models), sort_keys=False
    )


def model_index() -> str:
    """The list of all metafiles."""
    return yaml.safe_dump(
        dict(Import=[f'configs/{name}/metafile.yml' for name in COLLECTIONS])
    )


def pages() -> dict[Path, str]:
    """All files and what stands in them."""
    found = {ROOT / 'model-index.yml': model_index()}
    for folder in COLLECTIONS:
        found[CONFIGS / folder / 'README.md'] = readme(folder)
        found[CONFIGS / folder / 'metafile.yml'] = metafile(folder)
    return found


def main() -> int:
    """Write the files; the exit status is returned."""
    for path, text in pages().items():
        path.write_text(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
