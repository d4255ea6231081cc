"""What set-up decides for mmcv, with stand-ins for torch and the GPU."""

import importlib.util
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

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
    found = tool.Setup(tmp_path)
    found.state.mkdir()
    found.python.parent.mkdir()

    def with_torch(capability):
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


def test_torch__that_does_not_import_stops_it(setup):
    found = setup('none')
    found.python.write_text('#!/bin/sh\necho broken >&2\nexit 1\n')
    with pytest.raises(tool.StepError, match='torch does not import:\nbroken'):
        found.mmcv_key('onedl-mmcv==2.3.6')
