"""``mim train era_mm ...`` in throw-away environments.

All eight cells of {wheel, editable} x {openmim, onedl-mim} x {path, name}.
The environments borrow torch and the hosts from the one the tests run in
through a .pth file, so each takes seconds to make.
"""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from era_mm.hosts import PROFILES

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[1]
MIM_WHEELS = Path(sys.prefix, 'era_mm-setup', 'mim')
SOURCES = (
    'LICENSE',
    'MANIFEST.in',
    'README.md',
    'configs',
    'era_mm',
    'model-index.yml',
    'pyproject.toml',
    'setup.py',
    'tools',
)

TOY_CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=2, mean=[127.0], std=[127.0]),
    backbone=dict(type='LeNet5', num_classes=2),
    head=dict(type='ClsHead'),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(
        type='CustomDataset',
        data_prefix='toy_images',
        pipeline=[
            dict(type='LoadImageFromFile', color_type='grayscale'),
            dict(type='PackInputs'),
        ],
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
test_dataloader = train_dataloader
test_evaluator = dict(type='Accuracy')
train_cfg = dict(by_epoch=True, max_epochs=1)
test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
"""


def run(
    *command: str | Path, cwd: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command without what the surrounding environment would lend."""
    hidden = ('PYTHONPATH', 'VIRTUAL_ENV')
    variables = {k: v for k, v in os.environ.items() if k not in hidden}
    # mim starts `srun` and `python` by name.
    folder = str(Path(command[0]).parent)
    variables['PATH'] = os.pathsep.join([folder, variables['PATH']])
    # mim sets the terminal's colours.
    variables['NO_COLOR'] = '1'
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


@pytest.fixture(scope='module')
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one more, tiny, config."""
    folder = tmp_path_factory.mktemp('checkout')
    ignore = shutil.ignore_patterns('__pycache__', '*.egg-info')
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder)
    (folder / 'configs' / 'packaging_toy.py').write_text(TOY_CONFIG)
    return folder


@pytest.fixture(scope='module')
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    before = sorted(path.name for path in checkout.iterdir())
    run(
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--no-deps',
        '--no-index',
        '--no-build-isolation',
        f'--wheel-dir={folder}',
        checkout,
        cwd=folder,
    )
    left = {path.name for path in checkout.iterdir()}.difference(before)
    assert left <= {'era_mm.egg-info'}, f'the build left {left} behind'
    (built,) = folder.glob('*.whl')
    return built


@pytest.fixture(scope='module')
def environments(
    checkout: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
):
    """Makes an environment per ``(install, mim)``, once."""
    made: dict[tuple[str, str], Path] = {}
    projects = {'wheel': [wheel], 'editable': ['-e', checkout]}

    def environment(install: str, mim: str) -> Path:
        if (install, mim) not in made:
            folder = tmp_path_factory.mktemp(f'{install}-{mim}')
            made[install, mim] = make_environment(
                folder, projects[install], mim
            )
        return made[install, mim]

    return environment


def make_environment(
    folder: Path, project: list[str | Path], mim: str
) -> Path:
    run(sys.executable, '-m', 'venv', '--without-pip', folder, cwd=folder)
    version = f'python{sys.version_info.major}.{sys.version_info.minor}'
    packages = folder / 'lib' / version / 'site-packages'
    (packages / 'borrowed.pth').write_text(sysconfig.get_path('purelib'))
    assert MIM_WHEELS.is_dir(), f'{MIM_WHEELS} is missing: run make setup'
    (mim_wheel,) = MIM_WHEELS.glob(f'{mim.replace("-", "_")}-*.whl')
    run(
        sys.executable,
        '-m',
        'pip',
        f'--python={folder / "bin" / "python"}',
        'install',
        '--quiet',
        '--no-deps',
        '--no-index',
        '--no-build-isolation',
        # What is borrowed must stay where it is.
        '--ignore-installed',
        mim_wheel,
        *project,
        cwd=folder,
    )
    return folder / 'bin'


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the checkout with the toy config's data."""
    generator = np.random.default_rng(0)
    for label in ('a', 'b'):
        folder = tmp_path / 'toy_images' / label
        folder.mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'{index}.png')
    return tmp_path


@pytest.mark.parametrize('by', ['path', 'name'])
@pytest.mark.parametrize('mim', ['openmim', 'onedl-mim'])
@pytest.mark.parametrize('install', ['wheel', 'editable'])
def test_mim_train__trains_in_every_cell(
    install: str, mim: str, by: str, environments, checkout, elsewhere
) -> None:
    config = 'packaging_toy.py'
    if by == 'path':
        config = shutil.copy(checkout / 'configs' / config, elsewhere / 'x.py')
    done = run(
        environments(install, mim) / 'mim',
        *('train', 'era_mm', config, '--work-dir', 'work'),
        cwd=elsewhere,
        check=False,
    )
    if (install, mim, by) == ('editable', 'openmim', 'name'):
        # openmim looks for the name in site-packages alone, see
        # docs/installation.md for why no copies are put there.
        assert done.returncode != 0
        assert 'can not find the config file in codebase era_mm' in done.stdout
        return
    assert done.returncode == 0, done.stdout
    assert 'Training finished successfully' in done.stdout
    assert (elsewhere / 'work' / 'epoch_1.pth').is_file()


def test_mim__passes_every_flag_on(environments, elsewhere) -> None:
    mim = environments('wheel', 'onedl-mim') / 'mim'
    train = (mim, 'train', 'era_mm', 'packaging_toy.py', '--work-dir', 'work')
    run(*train, '--amp', cwd=elsewhere)
    done = run(
        *(*train, '--resume', '--cfg-options', 'train_cfg.max_epochs=2'),
        cwd=elsewhere,
    )
    assert 'resumed epoch: 1' in done.stdout
    checkpoint = Path('work', 'epoch_2.pth')
    assert (elsewhere / checkpoint).is_file()
    done = run(
        *(mim, 'test', 'era_mm', 'packaging_toy.py'),
        *('--checkpoint', checkpoint, '--out', 'predictions.pkl'),
        cwd=elsewhere,
    )
    assert 'accuracy/top1' in done.stdout
    assert (elsewhere / 'predictions.pkl').is_file()


@pytest.mark.parametrize('mim', ['openmim', 'onedl-mim'])
@pytest.mark.parametrize('install', ['wheel', 'editable'])
def test_mim_run__finds_the_export_in_every_cell(
    install: str, mim: str, environments, elsewhere
) -> None:
    done = run(
        environments(install, mim) / 'mim',
        *('run', 'era_mm', 'export_student', 'packaging_toy', 'no.pth'),
        *('--mode', 'E0', '--out', 'student'),
        cwd=elsewhere,
        check=False,
    )
    assert 'error: config: expected one whose model is era_mm' in done.stdout


@pytest.mark.parametrize('mim', ['openmim', 'onedl-mim'])
def test_mim_search__shows_a_config(mim: str, environments, elsewhere) -> None:
    done = run(
        environments('wheel', mim) / 'mim',
        *('search', 'era_mm', '--config', 'era_retinanet_r101_r50'),
        cwd=elsewhere,
    )
    assert 'config id: era_retinanet_r101_r50' in done.stdout
    assert 'knowledge distillation' in done.stdout


def test_mim__starts_two_cpu_ranks(environments, elsewhere) -> None:
    done = run(
        environments('editable', 'onedl-mim') / 'mim',
        *('train', 'era_mm', 'packaging_toy.py', '--work-dir', 'work'),
        *('--launcher', 'pytorch', '--gpus', '2'),
        cwd=elsewhere,
    )
    # Four images, two ranks, two images each at a time: one step.
    assert 'Epoch(train) [1][1/1]' in done.stdout
    assert (elsewhere / 'work' / 'epoch_1.pth').is_file()


def test_module__trains_without_mim(environments, elsewhere) -> None:
    done = run(
        environments('wheel', 'openmim') / 'python',
        *('-m', 'era_mm', 'train', 'packaging_toy'),
        cwd=elsewhere,
    )
    assert 'Epoch(train)' in done.stdout
    written = elsewhere / 'work_dirs' / 'packaging_toy' / 'epoch_1.pth'
    assert written.is_file()


def test_wheel__holds_one_package_and_what_mim_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = (n for n in names if n.endswith('/METADATA'))
        folder = metadata_name.split('/')[0]
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
        top_level = archive.read(f'{folder}/top_level.txt').decode()
    assert top_level.split() == ['era_mm']
    assert {n.split('/')[0] for n in names} == {
        'era_mm',
        '_era_mm_mim',
        folder,
    }
    for package in ('era_mm', '_era_mm_mim'):
        for inside in (
            'model-index.yml',
            'tools/train.py',
            'tools/test.py',
            'tools/export_student.py',
            'tools/make_config.py',
            'tools/print_sources.py',
            'tools/benchmark.py',
            'tools/report.py',
            'configs/packaging_toy.py',
        ):
            assert f'{package}/.mim/{inside}' in names
    # Of the checkout, its users' commands and configs alone.
    assert 'era_mm/py.typed' in names
    inside = [
        {n.removeprefix(f'{p}/.mim/') for n in names if n.startswith(f'{p}/.')}
        for p in ('era_mm', '_era_mm_mim')
    ]
    assert inside[0] == inside[1]
    assert {n.split('/')[0] for n in inside[0]} == {
        'tools',
        'configs',
        'model-index.yml',
    }
    assert 'tools/setup_env.py' not in inside[0]
    assert not any('demo' in n or n.startswith('dev/') for n in inside[0])
    # A console script would be the first line of RECORD, where onedl-mim
    # looks for the package.
    assert f'{folder}/entry_points.txt' not in names
    assert metadata['Home-page'].endswith('/era_mm')
    assert metadata['Project-URL'].startswith('Repository, ')
    assert metadata['Name'] == 'era_mm'

    for profile, hosts in PROFILES.items():
        marker = f'extra == "{profile}"'
        listed = {
            requirement.name: requirement.specifier
            for requirement in map(
                Requirement, metadata.get_all('Requires-Dist')
            )
            if str(requirement.marker) == marker
        }
        expected = {
            host.distribution: Requirement(f'x{host.specifier}').specifier
            for host in hosts
        }
        assert listed == expected


def test_setup__imports_only_setuptools_and_the_standard_library() -> None:
    tree = ast.parse((ROOT / 'setup.py').read_text())
    imported = {
        name.split('.')[0]
        for node in ast.walk(tree)
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names | {'setuptools'}
