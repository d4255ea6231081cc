"""What stands in two places of the repository is the same in both."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

import era_mm

ROOT = Path(__file__).resolve().parent.parent


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_pre_commit__has_the_linter_of_make_lint():
    (pinned,) = re.findall(
        r'^ruff==(.*)$', (ROOT / 'requirements/dev.txt').read_text(), re.M
    )
    (repo,) = read('.pre-commit-config.yaml')['repos']
    assert repo['rev'] == f'v{pinned}'


def test_workflow__runs_ci_on_every_python_that_is_supported():
    job = read('.github/workflows/test.yml')['jobs']['test']
    setup = runpy.run_path(str(ROOT / 'tools/setup_env.py'))
    oldest = setup['OLDEST_PYTHON']
    assert job['strategy']['matrix']['include'] == [
        dict(profile=profile, python=f'3.{minor}')
        for profile, newest in setup['NEWEST_PYTHON'].items()
        for minor in range(oldest[1], newest[1] + 1)
    ]
    assert '.ci/run PROFILE=${{ matrix.profile }}' in [
        step.get('run') for step in job['steps']
    ]


def test_citation__is_of_this_version():
    assert read('CITATION.cff')['version'] == era_mm.__version__
    assert f'## {era_mm.__version__} - ' in (ROOT / 'CHANGELOG.md').read_text()


@pytest.mark.parametrize('name', ['bug', 'result', 'method'])
def test_issue_form__has_what_github_asks_for(name):
    form = read(f'.github/ISSUE_TEMPLATE/{name}.yml')
    assert form['name']
    assert form['description']
    ids = [item['id'] for item in form['body']]
    assert len(set(ids)) == len(ids)
    for item in form['body']:
        assert item['type'] in ('textarea', 'input', 'checkboxes')
        assert item['attributes']['label']
