import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from era_mm import hosts

GOOD = {
    'torch': '2.12.1',
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmpretrain': '1.3.6',
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Pretends that exactly these distributions are installed."""

    def pretend(versions: dict[str, str], ops: bool = True) -> None:
        monkeypatch.setattr(
            hosts,
            'installed_version',
            lambda name: Version(versions[name]) if name in versions else None,
        )
        monkeypatch.setattr(hosts, 'has_compiled_ops', lambda: ops)
        monkeypatch.setattr(
            hosts.importlib.util, 'find_spec', lambda name: None
        )

    return pretend


def test_check__accepts_either_profile(install) -> None:
    install(GOOD)
    hosts.check_hosts()
    install(
        {
            'torch': '2.1.2',
            'mmengine': '0.10.7',
            'mmcv': '2.1.0',
            'mmdet': '3.3.0',
            'mmpretrain': '1.2.0',
        }
    )
    assert hosts.find_profile() == 'openmmlab'
    hosts.check_hosts()


def test_check__names_everything_missing_and_both_installs(install) -> None:
    install({})
    with pytest.raises(hosts.HostError) as caught:
        hosts.check_hosts()
    message = str(caught.value)
    for host in hosts.PROFILES['onedl']:
        wanted = f'{host.module}: expected {host.distribution} >='
        assert wanted in message
    assert 'onedl-mmdetection==3.5.1' in message
    assert ' mmdet==3.3.0' in message


def test_check__refuses_a_version_below_the_range(install) -> None:
    install({**GOOD, 'onedl-mmengine': '0.10.9'})
    with pytest.raises(
        hosts.HostError,
        match=r'onedl-mmengine >=0\.10\.12,<0\.11, but 0\.10\.9 is installed',
    ):
        hosts.check_hosts()


def test_check__warns_of_a_version_above_the_range(install) -> None:
    install({**GOOD, 'onedl-mmpretrain': '1.5.0'})
    with pytest.warns(hosts.HostVersionWarning, match=r'1\.5\.0 is newer'):
        hosts.check_hosts()


def test_check__accepts_a_local_version_label(install) -> None:
    install({**GOOD, 'torch': '2.12.1+cu130'})
    hosts.check_hosts()


def test_check__refuses_two_packages_of_one_import_name(install) -> None:
    install({**GOOD, 'mmengine': '0.10.7'})
    with pytest.raises(hosts.HostError, match=r'both .* are installed'):
        hosts.check_hosts()


def test_check__refuses_mixed_profiles(install) -> None:
    versions = {**GOOD, 'mmdet': '3.3.0'}
    del versions['onedl-mmdetection']
    install(versions)
    with pytest.raises(hosts.HostError, match='of the openmmlab profile'):
        hosts.check_hosts()


def test_check__refuses_mmcv_without_ops(install) -> None:
    install(GOOD, ops=False)
    with pytest.raises(hosts.HostError, match='without its compiled operator'):
        hosts.check_hosts()


def test_check__refuses_mmcv_lite(install) -> None:
    versions = {**GOOD, 'mmcv-lite': '2.1.0'}
    del versions['onedl-mmcv']
    install(versions)
    with pytest.raises(hosts.HostError, match='mmcv-lite is installed'):
        hosts.check_hosts()


def test_has_compiled_ops__looks_for_the_extension(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    monkeypatch.delitem(sys.modules, 'mmcv', raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert not hosts.has_compiled_ops()
    (package / '_ext.cpython-311-x86_64-linux-gnu.so').touch()
    assert hosts.has_compiled_ops()


def test_import__loads_no_host() -> None:
    script = (
        'import sys, era_mm.cli; '
        'print([m for m in ("torch", "mmengine", "mmcv") if m in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', script],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == '[]'
