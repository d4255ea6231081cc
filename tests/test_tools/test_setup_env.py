"""What set-up decides for mmcv, with stand-ins for torch and the GPU."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    'setup_env', ROOT / 'tools' / 'setup_env.py'
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

HIDDEN = 'CUDA_VISIBLE_DEVICES='


@pytest.fixture
def setup(tmp_path):
    """A set-up whose torch tells of a GPU, or of none."""
    found = tool.Setup(tmp_path)
    found.state.mkdir()
    found.python.parent.mkdir()

    def with_torch(capability, toolkit):
        found.python.write_text(
            f'#!/bin/sh\necho 2.12.1 13.0 cpython-311 {capability}\n'
        )
        found.python.chmod(0o755)
        found.toolkit = toolkit
        return found

    return with_torch


def test_mmcv__is_built_for_the_gpu_that_is_here(setup, capfd):
    found = setup('90', '13.1')
    key = found.mmcv_key('onedl-mmcv==2.3.6')
    assert key.startswith('onedl-mmcv-2.3.6_torch-2.12.1_cpython-311_')
    assert key.endswith('_cuda13.1-sm90')
    assert found.for_gpu
    assert (found.state / 'environment').read_text() == ''
    assert not capfd.readouterr().out


@pytest.mark.parametrize('toolkit', [None, '12.8'])
def test_mmcv__of_another_cuda_hides_the_gpu_and_says_so(
    setup, toolkit, capfd
):
    found = setup('90', toolkit)
    assert found.mmcv_key('onedl-mmcv==2.3.6').endswith('_cpu')
    assert not found.for_gpu
    assert (found.state / 'environment').read_text() == HIDDEN
    told = capfd.readouterr().out
    assert 'needs the nvcc of CUDA 13.0' in told
    assert f'{toolkit or "none"} was found' in told


def test_mmcv__without_a_gpu_is_for_the_cpu(setup, capfd):
    # A toolkit alone is no GPU.
    found = setup('none', '13.0')
    assert found.mmcv_key('onedl-mmcv==2.3.6').endswith('_cpu')
    assert not found.for_gpu
    assert (found.state / 'environment').read_text() == HIDDEN
    assert not capfd.readouterr().out


def test_torch__that_does_not_import_stops_it(setup):
    found = setup('none', None)
    found.python.write_text('#!/bin/sh\necho broken >&2\nexit 1\n')
    with pytest.raises(tool.StepError, match='torch does not import:\nbroken'):
        found.mmcv_key('onedl-mmcv==2.3.6')
