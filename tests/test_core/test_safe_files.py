"""Files from strangers: read without running anything, or refused by name."""

import contextlib
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from era_mm import cli
from era_mm.core import read_checkpoint, safe_files
from era_mm.core.places import guard_reading, read_place
from era_mm.core.safe_files import (
    TRUST,
    UntrustedFileError,
    _method_of_history,
    load_file,
)
from era_mm.errors import UserError
from era_mm.testing import (
    detector_config,
    distillation_config,
    run_config,
    save_teacher,
)


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (os.system, (f'touch {self.mark}',))


class ByEval(Harm):
    def __reduce__(self) -> tuple:
        return (eval, (f"open({str(self.mark)!r}, 'w').close()",))


class ByGetattr(Harm):
    """Through the ``getattr`` that histories of mmengine use."""

    def __reduce__(self) -> tuple:
        return (getattr, (HistoryBuffer.min, '__globals__'))


HARMS = {'system': Harm, 'eval': ByEval, 'getattr': ByGetattr}
NAMES = {'system': 'system', 'eval': 'builtins.eval', 'getattr': 'getattr'}


@pytest.fixture(autouse=True)
def _untrusted(monkeypatch):
    # setenv and not delenv, so that what a command sets is undone.
    monkeypatch.setenv(TRUST, '')


@pytest.fixture
def mark(tmp_path):
    return tmp_path / 'harmed'


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('kind', ['system', 'eval'])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_load_file__refuses_what_runs_code(
    kind, protocol, zipped, mark, tmp_path
):
    file = tmp_path / 'bad.pth'
    content = {'state_dict': {'w': torch.ones(2)}, 'x': HARMS[kind](mark)}
    torch.save(
        content,
        file,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UntrustedFileError, match=NAMES[kind]) as caught:
        load_file(file)
    assert '--trust-checkpoint' in str(caught.value)
    assert 'bad.pth' in str(caught.value)
    assert not mark.exists()


def test_load_file__lets_getattr_reach_the_methods_of_histories_alone(
    mark, tmp_path
):
    torch.save({'x': ByGetattr(mark)}, tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match='getattr'):
        load_file(tmp_path / 'bad.pth')
    history = HistoryBuffer([1.0, 3.0], [1, 1])
    torch.save({'h': history}, tmp_path / 'good.pth')
    assert load_file(tmp_path / 'good.pth')['h'].mean() == 2


@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        (os, 'system'),
        # An instance, or what inherits: neither is the class itself.
        (HistoryBuffer(), 'mean'),
        (type('Heir', (HistoryBuffer,), {}), 'mean'),
        (HistoryBuffer, '__subclasses__'),
        (HistoryBuffer, '_set_default_statistics'),
    ],
)
def test_getattr__of_anything_else_is_refused(owner, name):
    with pytest.raises(pickle.UnpicklingError, match='getattr'):
        _method_of_history(owner, name)


@pytest.mark.parametrize('value', ['1', '0', 'yes'])
def test_load_file__runs_code_of_a_trusted_file(
    value, mark, tmp_path, monkeypatch
):
    torch.save({'x': Harm(mark)}, tmp_path / 'bad.pth')
    monkeypatch.setenv(TRUST, value)
    if value == '1':
        load_file(tmp_path / 'bad.pth')
    else:
        with pytest.raises(ValueError, match=TRUST):
            load_file(tmp_path / 'bad.pth')
    assert mark.exists() == (value == '1')


def mmengine_content():
    return {
        'meta': {
            'classes': ('a', 'b'),
            'numbers': np.arange(3),
            'names': np.array(['a', 'bc']),
            'score': np.float64(0.5),
            'count': np.int64(3),
            'some': {1, 2},
            'bytes': np.array([b'x', b'\xff']),
            'kinds': [torch.bool, torch.bfloat16, torch.device('cpu')],
            'config': Config(dict(a=dict(b=[1]))).a,
        },
        'state_dict': OrderedDict(w=torch.ones(2)),
        'message_hub': {'loss': HistoryBuffer([1.0], [1])},
        'step': slice(1, 2),
    }


def as_before_torch_2_5(monkeypatch):
    """The list of types that may be read is closed, and shorter."""
    monkeypatch.delattr(torch.serialization, 'safe_globals', raising=False)
    reader = torch._weights_only_unpickler
    names = [
        name
        for name in reader._get_allowed_globals()
        if not name.startswith(('_codecs.', 'builtins.'))
        and name not in ('torch.bool', 'torch.device', 'torch.bfloat16')
    ]
    short = {name: reader._get_allowed_globals()[name] for name in names}
    monkeypatch.setattr(reader, '_get_allowed_globals', lambda: short)


@pytest.mark.parametrize('reader', ['weights_only', 'restricted'])
def test_load_file__reads_all_that_mmengine_writes(
    reader, tmp_path, monkeypatch
):
    if reader == 'restricted':
        as_before_torch_2_5(monkeypatch)
    content = mmengine_content()
    torch.save(content, tmp_path / 'f.pth')
    found = load_file(tmp_path / 'f.pth')
    assert found['meta']['numbers'].tolist() == [0, 1, 2]
    assert found['meta']['names'].tolist() == ['a', 'bc']
    assert found['meta']['score'] == 0.5
    assert found['meta']['count'] == 3
    assert found['meta']['some'] == {1, 2}
    assert found['meta']['bytes'].tolist() == [b'x', b'\xff']
    assert found['meta']['kinds'] == content['meta']['kinds']
    assert found['meta']['config'].b == [1]
    assert found['message_hub']['loss'].current() == 1
    assert found['step'] == slice(1, 2)
    assert torch.equal(found['state_dict']['w'], torch.ones(2))


@pytest.mark.parametrize('kind', HARMS)
def test_load_file__refuses_the_same_before_torch_2_5(
    kind, mark, tmp_path, monkeypatch
):
    as_before_torch_2_5(monkeypatch)
    torch.save({'x': HARMS[kind](mark)}, tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match=NAMES[kind]):
        load_file(tmp_path / 'bad.pth')
    assert not mark.exists()


def test_load_file__reads_arrays_under_the_names_of_both_numpys():
    for old, new in (
        (b'numpy._core.multiarray', b'numpy.core.multiarray'),
        (b'numpy.core.multiarray', b'numpy._core.multiarray'),
    ):
        # Without the archive, in which sums of the bytes are kept.
        plain = io.BytesIO()
        torch.save(
            {'a': np.arange(2), 'b': np.float32(1)},
            plain,
            _use_new_zipfile_serialization=False,
        )
        found = load_file(io.BytesIO(plain.getvalue().replace(old, new)))
        assert found['a'].tolist() == [0, 1]
        assert found['b'] == 1


def test_load_file__refuses_a_torchscript_program(tmp_path):
    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    torch.jit.script(Double()).save(str(tmp_path / 's.pth'))
    with pytest.raises(UntrustedFileError, match=r'TorchScript|torch'):
        load_file(tmp_path / 's.pth')


@pytest.mark.parametrize('seed', range(8))
def test_load_file__says_of_damaged_bytes_that_they_are(seed, tmp_path):
    torch.save(mmengine_content(), tmp_path / 'f.pth')
    whole = (tmp_path / 'f.pth').read_bytes()
    generator = np.random.default_rng(seed)
    for turn in range(10):
        damaged = bytearray(whole)
        if turn % 2:
            damaged = damaged[: generator.integers(len(whole))]
        for at in generator.integers(0, max(len(damaged), 1), 20):
            if damaged:
                damaged[at] = generator.integers(256)
        (tmp_path / 'f.pth').write_bytes(damaged)
        # What still can be read, because no byte that counts was hit, is.
        with contextlib.suppress(UserError):
            load_file(tmp_path / 'f.pth')


def test_read_checkpoint__refuses_keys_that_are_no_names(tmp_path):
    torch.save({'state_dict': {3: torch.ones(1)}}, tmp_path / 'f.pth')
    with pytest.raises(ValueError, match='names of weights'):
        read_checkpoint(str(tmp_path / 'f.pth'))


# -- every way in ------------------------------------------------------------


@pytest.fixture
def run(coco, teacher_file, tmp_path, monkeypatch):
    """A short run's config as a file, and a checkpoint of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    model = distillation_config(
        dict(type='era_mm.FeatureImitationDistiller'), checkpoint=teacher_file
    )
    cfg = run_config(
        model,
        coco,
        tmp_path / 'run',
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=9),
        preflight=False,
    )
    Config(cfg.to_dict()).dump('toy.py')
    return tmp_path / 'toy.py'


def harmful(mark, content, file):
    torch.save(content | {'x': Harm(mark)}, file)
    return str(file)


def test_commands__run_no_code_of_any_file(run, mark, tmp_path, capsys):
    student = detector_config()
    plain = save_teacher(student, tmp_path / 'plain.pth')
    content = torch.load(plain, weights_only=True)
    bad = harmful(mark, content, tmp_path / 'bad.pth')
    options = ['toy.py', '--cfg-options']
    for begin, arguments in (
        (cli.run_train, [*options, f'load_from={bad}']),
        (cli.run_train, [*options, f'model.teacher.checkpoint={bad}']),
        (
            cli.run_train,
            [
                *options,
                f'model.student.init_cfg.checkpoint={bad}',
                'model.student.init_cfg.type=Pretrained',
            ],
        ),
        (cli.run_train, ['toy.py', '--resume', bad]),
        (cli.run_test, ['toy.py', bad]),
        (cli.run_export_student, ['toy.py', bad, '--out', 'out']),
    ):
        assert begin(arguments) == 1
        printed = capsys.readouterr().err
        assert 'system' in printed, arguments
        assert '--trust-checkpoint' in printed
        assert 'Traceback' not in printed
        assert not mark.exists()
    assert cli.run_test(['toy.py', bad, '--trust-checkpoint']) == 0
    assert mark.exists()


def test_resume__does_not_run_a_config_in_the_files_meta(run, mark, tmp_path):
    assert cli.run_train(['toy.py']) == 0
    file = tmp_path / 'run' / 'epoch_1.pth'
    content = load_file(file)
    content['meta']['config'] = f'open({str(mark)!r}, "w").close()'
    torch.save(content, file)
    more = ['--cfg-options', 'train_cfg.max_epochs=2']
    assert cli.run_train(['toy.py', '--resume', *more]) == 0
    assert (tmp_path / 'run' / 'epoch_2.pth').is_file()
    assert not mark.exists()


def test_guard_reading__serves_every_prefix_of_mmengine(tmp_path, mark):
    guard_reading()
    assert all(
        reader.__name__ == 'load_from_checked'
        for reader in CheckpointLoader._schemes.values()
    )
    bad = harmful(mark, {}, tmp_path / 'bad.pth')
    with pytest.raises(UntrustedFileError):
        CheckpointLoader.load_checkpoint(bad)
    assert not mark.exists()


@pytest.mark.parametrize(
    ('place', 'said'),
    [
        ('torchvision://resnet51', 'resnet51'),
        ('open-mmlab://nothing', 'nothing'),
        ('pavi://some/file', 'pavi'),
        ('ftp://some/file', 'no reader'),
    ],
)
def test_read_place__refuses_what_it_does_not_know(place, said):
    with pytest.raises(ValueError, match=said):
        read_place(place)


def test_foreign_names__finds_names_of_all_protocols(mark):
    for protocol in range(5):
        packed = pickle.dumps(Harm(mark), protocol)
        (name,) = safe_files._foreign_names(io.BytesIO(packed))
        assert name.endswith('.system')
