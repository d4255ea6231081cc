"""What set-up decides, with stand-ins for torch and the GPU."""

import importlib.util
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from era_mm.hosts import PROFILES

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    'setup_env', ROOT / 'tools' / 'setup_env.py'
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

HIDDEN = 'CUDA_VISIBLE_DEVICES='


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A set-up whose torch tells of a GPU, or of none."""
    monkeypatch.setattr(tool, 'DRIVER', tmp_path / 'driver')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    for name in ('era_mm-setup', 'bin'):
        (tmp_path / name).mkdir()

    def with_torch(capability, profile='onedl'):
        found = tool.Setup(tmp_path, profile)
        found.python.write_text(
            f'#!/bin/sh\necho "2.12.1 cpython-311 {capability}"\n'
        )
        found.python.chmod(0o755)
        return found

    return with_torch


def test_mmcv__is_built_for_the_gpu_that_is_here(setup, capfd):
    found = setup('8.6;9.0')
    tool.DRIVER.write_text('')
    key = found.mmcv_key('onedl-mmcv==2.3.6')
    assert key.startswith('onedl-mmcv-2.3.6_torch-2.12.1_cpython-311_')
    assert key.endswith('_sm8.6-9.0')
    assert found.for_gpu
    assert (found.state / 'environment').read_text() == ''
    assert not capfd.readouterr().out


def test_mmcv__without_a_gpu_is_for_the_cpu(setup, capfd):
    found = setup('none')
    assert found.mmcv_key('onedl-mmcv==2.3.6').endswith('_cpu')
    assert not found.for_gpu
    assert (found.state / 'environment').read_text() == HIDDEN
    assert not capfd.readouterr().out


def test_mmcv__with_a_driver_that_torch_cannot_use_says_so(
    setup, tmp_path, monkeypatch, capfd
):
    found = setup('none')
    tool.DRIVER.write_text('')
    found.python.write_text(
        '#!/bin/sh\necho driver too old >&2\necho 2.12.1 cpython-311 none\n'
    )
    assert found.mmcv_key('onedl-mmcv==2.3.6').endswith('_cpu')
    told = capfd.readouterr().out
    assert 'torch finds no GPU that it can use:\ndriver too old\n' in told
    assert f'remove {tmp_path} and run it again' in told
    # Hidden by the user: no surprise.
    for none in ('', '-1'):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', none)
        assert found.mmcv_key('onedl-mmcv==2.3.6').endswith('_cpu')
        assert not capfd.readouterr().out


def test_done__asks_again_where_a_driver_came(setup):
    found = setup('none')
    before = found.fingerprint()
    tool.DRIVER.write_text('')
    assert found.fingerprint() != before


@pytest.fixture
def steps(monkeypatch):
    """What a set-up would run: names and what each gets.

    The step that builds leaves a wheel.
    """
    found = {}

    def step(self, name, command, **kwargs):
        found[name.partition(' with')[0]] = kwargs | dict(command=command)
        for argument in command:
            if argument.startswith('--wheel-dir='):
                wheel = Path(argument.partition('=')[2], 'mmcv.whl')
                with zipfile.ZipFile(wheel, 'w') as archive:
                    archive.writestr('mmcv/_ext.so', '')

    monkeypatch.setattr(tool.Setup, 'step', step)
    monkeypatch.setattr(tool, 'check_compiler', lambda python: None)
    return found


def test_build__for_a_gpu_has_the_compiler_of_torchs_cuda(
    setup, steps, tmp_path
):
    found = setup('8.6;9.0')
    found.mmcv_key('onedl-mmcv==2.3.6')
    home = tmp_path / 'lib/python3.11/site-packages/nvidia/cu13'
    (home / 'lib').mkdir(parents=True)
    (home.parent / 'cudnn').mkdir()
    (home / 'lib/libcudart.so.13').write_text('runtime')
    # Again, as after a build that failed.
    for folder in ('first', 'second'):
        wheel = found.build_mmcv('onedl-mmcv==2.3.6', tmp_path / folder)
        assert wheel.parent == tmp_path / folder
        assert (home / 'lib/libcudart.so').is_symlink()
        assert (home / 'lib/libcudart.so').read_text() == 'runtime'
    assert list(steps) == ['CUDA compiler', 'build of mmcv']
    compiler = ' '.join(steps['CUDA compiler']['command'])
    assert 'cuda.txt' in compiler
    assert 'constraints.txt' in compiler
    build = steps['build of mmcv']
    assert build['environment']['FORCE_CUDA'] == '1'
    assert build['environment']['CUDA_HOME'] == str(home)
    assert build['environment']['TORCH_CUDA_ARCH_LIST'] == '8.6;9.0'


@pytest.mark.parametrize('gpus', ['9.0', 'none'])
def test_build__that_fails_for_a_gpu_tells_how_to_go_on_without(
    setup, steps, gpus, monkeypatch, tmp_path
):
    def fail(self, *args):
        raise tool.StepError('broken')

    monkeypatch.setenv('ERA_MM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(tool.Setup, 'build_mmcv', fail)
    with pytest.raises(tool.StepError, match='broken') as error:
        setup(gpus).install_mmcv()
    told = 'CUDA_VISIBLE_DEVICES= make' in str(error.value)
    assert told == (gpus != 'none')


def test_build__without_torchs_cuda_library_stops(setup, steps, tmp_path):
    with pytest.raises(tool.StepError, match=r'expected one library.*got 0'):
        setup('9.0').install_cuda_compiler()


@pytest.mark.parametrize(
    ('gpus', 'told'),
    [
        ([], 'none'),
        # Two alike and a newer one, each once.
        ([(9, 0), (8, 6), (9, 0)], '8.6;9.0'),
        # This torch has no kernels for the V100.
        ([(7, 0)], 'none'),
        ([(7, 0), (12, 0)], '12.0'),
    ],
)
def test_tell__names_the_gpus_that_torch_has_kernels_for(
    gpus, told, monkeypatch, capfd
):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, 'is_available', lambda: bool(gpus))
    monkeypatch.setattr(cuda, 'device_count', lambda: len(gpus))
    monkeypatch.setattr(cuda, 'get_device_capability', lambda gpu: gpus[gpu])
    monkeypatch.setattr(
        cuda, 'get_arch_list', lambda: ['sm_75', 'sm_90', 'compute_120']
    )
    exec(tool.TELL, {})
    abi = sysconfig.get_config_var('SOABI')
    assert capfd.readouterr().out == f'{torch.__version__} {abi} {told}\n'


def test_build__for_the_cpu_has_none(setup, steps, tmp_path):
    found = setup('none')
    found.mmcv_key('onedl-mmcv==2.3.6')
    found.build_mmcv('onedl-mmcv==2.3.6', tmp_path / 'wheel')
    assert list(steps) == ['build of mmcv']
    build = steps['build of mmcv']
    assert build['environment']['FORCE_CUDA'] == '0'
    assert 'CUDA_HOME' not in build['environment']
    assert 'TORCH_CUDA_ARCH_LIST' not in build['environment']


def test_build__for_newest_takes_cxx20(setup, steps, tmp_path, monkeypatch):
    """A stand-in for a compiler prints what it gets."""
    monkeypatch.setenv('CXX', 'printf "%s\\n"')
    found = setup('none', 'newest')
    found.mmcv_key('onedl-mmcv==2.3.6')
    found.build_mmcv('onedl-mmcv==2.3.6', tmp_path / 'wheel')
    compiler = steps['build of mmcv']['environment']['CXX']
    given = ['-O2', '-std=c++17', "-DNAME='a b'", '-std=c++17x', 'a b.cpp']
    told = subprocess.run(
        [compiler, *given], capture_output=True, text=True, check=True
    ).stdout
    assert told.splitlines() == [given[0], '-std=c++20', *given[2:]]


def files_in(command):
    """The requirement and constraint files of a command."""
    return [
        Path(argument.partition('=')[2])
        for argument in command
        if argument.startswith(('--requirement=', '--constraint='))
    ]


@pytest.mark.parametrize(
    ('profile', 'torch', 'mmcv', 'cudnn'),
    [
        ('onedl', 'torch.txt', 'onedl-mmcv==2.3.6', ['cu13==9.20.0.48']),
        (
            'openmmlab',
            'openmmlab/torch.txt',
            'mmcv==2.1.0',
            ['cu12==8.9.2.26', 'cu13==9.20.0.48'],
        ),
        (
            'newest',
            'newest/torch.txt',
            'onedl-mmcv==2.3.6',
            ['cu13==9.26.0.51'],
        ),
    ],
)
def test_profile__has_its_own_files_and_pins_before_the_common_ones(
    profile, torch, mmcv, cudnn, setup, steps
):
    found = setup('none', profile)
    for file, expected in (
        ('torch.txt', torch),
        ('runtime.txt', 'runtime.txt'),
    ):
        found.install('x', file)
        requirement, constraint = files_in(steps['x']['command'])
        assert requirement == tool.REQUIREMENTS / expected
        pins = constraint.read_text().splitlines()
        assert 'mpmath==1.3.0' in pins
        name = 'nvidia-cudnn-'
        assert sorted(x for x in pins if x.startswith(name)) == [
            name + pin for pin in cudnn
        ]
    assert tool.read_requirement(found.requirements('mmcv.txt')) == mmcv


@pytest.mark.parametrize('profile', tool.NEWEST_PYTHON)
def test_profile__pins_what_the_package_takes(profile, tmp_path):
    found = tool.Setup(tmp_path, profile)
    pins = {}
    for file in ('torch.txt', 'mmcv.txt', 'hosts.txt'):
        for line in found.requirements(file).read_text().splitlines():
            if line and not line.startswith('#'):
                requirement = Requirement(line)
                (pin,) = requirement.specifier
                assert pin.operator == '=='
                pins[requirement.name] = pin.version
    for host in PROFILES.get(profile, PROFILES['onedl']):
        assert pins[host.distribution] in SpecifierSet(host.specifier)


def test_profile__is_not_installed_over_another(setup):
    # One of before there were two.
    setup('none').check_profile()
    other = setup('none', 'openmmlab')
    with pytest.raises(tool.StepError, match='has that of onedl'):
        other.check_profile()
    (other.state / 'profile').write_text('openmmlab')
    other.check_profile()
    assert other.fingerprint() != setup('none').fingerprint()


@pytest.mark.parametrize('profile', ['openmmlab', 'newest'])
def test_profile__is_for_the_cpu(profile, setup, capfd):
    found = setup('9.0', profile)
    assert found.mmcv_key('mmcv==2.1.0').endswith('_cpu')
    assert not found.for_gpu
    assert (found.state / 'environment').read_text() == HIDDEN
    told = capfd.readouterr().out
    assert f'the {profile} profile is set up for the CPU' in told


def test_profile__has_an_environment_of_its_own(monkeypatch):
    # What `make test` was called with.
    for name in ('MAKEFLAGS', 'PROFILE', 'VENV'):
        monkeypatch.delenv(name, raising=False)
    for profile, folder in (
        ('onedl', ''),
        ('openmmlab', '-openmmlab'),
        ('newest', '-newest'),
    ):
        done = subprocess.run(
            ['make', '-n', 'setup', f'PROFILE={profile}'],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert f'--profile {profile} --venv .venv{folder}\n' in done.stdout


@pytest.mark.parametrize(
    ('profile', 'version', 'told'),
    [
        ('onedl', (3, 10), 'expected Python 3.11 or 3.12, but'),
        ('onedl', (3, 13), 'expected Python 3.11 or 3.12, but'),
        ('openmmlab', (3, 12), 'expected Python 3.11, but'),
        ('openmmlab', (3, 11), None),
    ],
)
def test_python__is_one_that_the_profiles_torch_is_for(
    profile, version, told, monkeypatch
):
    monkeypatch.setattr(sys, 'version_info', (*version, 0, 'final', 0))
    newest = tool.NEWEST_PYTHON[profile]
    if told is None:
        tool.check_python(newest)
        return
    with pytest.raises(tool.StepError, match=told):
        tool.check_python(newest)


def test_torch__that_does_not_import_stops_it(setup):
    found = setup('none')
    found.python.write_text('#!/bin/sh\necho broken >&2\nexit 1\n')
    with pytest.raises(tool.StepError, match='torch does not import:\nbroken'):
        found.mmcv_key('onedl-mmcv==2.3.6')
