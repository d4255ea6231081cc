"""The packages era_mm plugs into, and the check that they fit.

mmengine, mmcv, mmdet and mmpretrain exist twice: as OpenMMLab's originals and
as the maintained onedl forks. Both use the same import names, so pip cannot
see that one replaces the other, and era_mm cannot list either as a plain
requirement. This module checks them at import instead; it reads package
metadata only and imports none of them.

``python -m era_mm`` prints what was found.
"""

import importlib.metadata
import importlib.util
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from era_mm.version import __version__


@dataclass(frozen=True)
class Host:
    """One package era_mm needs.

    Args:
        module: Import name.
        distribution: Name under which pip installs it.
        minimum: First version that works.
        below: First version that was not tried.
    """

    module: str
    distribution: str
    minimum: str
    below: str

    @property
    def specifier(self) -> str:
        return f'>={self.minimum},<{self.below}'


PROFILES: dict[str, tuple[Host, ...]] = {
    'onedl': (
        Host('torch', 'torch', '2.6', '2.16'),
        Host('mmengine', 'onedl-mmengine', '0.10.12', '0.11'),
        Host('mmcv', 'onedl-mmcv', '2.3.6', '2.4'),
        Host('mmdet', 'onedl-mmdetection', '3.5.1', '3.6'),
        Host('mmpretrain', 'onedl-mmpretrain', '1.3.6', '1.4'),
    ),
    'openmmlab': (
        Host('torch', 'torch', '2.1', '2.2'),
        Host('mmengine', 'mmengine', '0.10.7', '0.11'),
        Host('mmcv', 'mmcv', '2.1', '2.2'),
        Host('mmdet', 'mmdet', '3.3', '3.4'),
        Host('mmpretrain', 'mmpretrain', '1.2', '1.3'),
    ),
}

INSTALL_HELP = """\
What to do: in a checkout of era_mm run `make setup`. Elsewhere install one
profile, in this order (docs/installation.md tells more):
  onedl, the maintained forks
    pip install torch==2.12.1 torchvision==0.27.1 "setuptools<81" ninja psutil
    MMCV_WITH_OPS=1 pip install --no-build-isolation onedl-mmcv==2.3.6
    pip install onedl-mmdetection==3.5.1 onedl-mmpretrain==1.3.6
  openmmlab, the originals
    pip install torch==2.1.2 torchvision==0.16.2 "numpy<2" "setuptools<81"
    pip install "opencv-python<4.12" ninja psutil
    MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv==2.1.0
    pip install mmdet==3.3.0 mmpretrain==1.2.0"""


class HostError(ImportError):
    """A package era_mm plugs into is missing or does not fit."""


class HostVersionWarning(UserWarning):
    """A package era_mm plugs into is newer than any that was tried."""


def installed_version(distribution: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return None


def find_profile() -> str:
    """The profile with more installed packages; onedl on a tie."""
    counts = {
        name: sum(
            installed_version(host.distribution) is not None for host in hosts
        )
        for name, hosts in PROFILES.items()
    }
    return max(counts, key=lambda name: counts[name])


def versions() -> dict[str, str]:
    """era_mm, Python, and the packages that era_mm plugs into."""
    found = {'era_mm': __version__, 'python': platform.python_version()}
    for host in PROFILES[find_profile()]:
        found[host.distribution] = str(installed_version(host.distribution))
    return found


def shipped(module: str, *inside: str) -> list[Path]:
    """Files that a package has for mim, in a wheel or a checkout.

    Args:
        module: The package's import name.
        inside: Parts of the path below ``.mim``, such as 'configs'; a
            checkout installed in place has it beside the package.

    Returns:
        The existing files or folders of that path.
    """
    spec = importlib.util.find_spec(module)
    return [
        path
        for folder in (spec and spec.submodule_search_locations) or []
        for path in (
            Path(folder, '.mim', *inside),
            Path(folder).parent.joinpath(*inside),
        )
        if path.exists()
    ]


def has_compiled_ops() -> bool:
    """Whether the installed mmcv carries its compiled operators."""
    spec = importlib.util.find_spec('mmcv')
    folders = (spec and spec.submodule_search_locations) or []
    return any(
        file.suffix in ('.so', '.pyd')
        for folder in folders
        for file in Path(folder).glob('_ext*')
    )


def find_problems(profile: str) -> tuple[list[str], list[str]]:
    """Compare what is installed with a profile.

    Args:
        profile: ``onedl`` or ``openmmlab``.

    Returns:
        What makes era_mm unusable, and what is merely newer than tried.
    """
    errors, remarks = [], []
    other_name = next(name for name in PROFILES if name != profile)
    others = {host.module: host for host in PROFILES[other_name]}
    for host in PROFILES[profile]:
        version = installed_version(host.distribution)
        other = others[host.module]
        other_version = (
            installed_version(other.distribution)
            if other.distribution != host.distribution
            else None
        )
        if version is not None and other_version is not None:
            errors.append(
                f'{host.module}: expected one package of that import name, '
                f'but both {host.distribution} {version} and '
                f'{other.distribution} {other_version} are installed and '
                'overwrite each other. Uninstall both, then install one.'
            )
        elif version is None and other_version is not None:
            errors.append(
                f'{host.module}: expected {host.distribution} '
                f'{host.specifier} like the rest of the {profile} profile, '
                f'but {other.distribution} {other_version} of the '
                f'{other_name} profile is installed. Mixed profiles are '
                'not supported: uninstall it and install the expected one.'
            )
        elif version is None:
            errors.append(_explain_missing(host))
        elif version not in SpecifierSet(f'>={host.minimum}', True):
            errors.append(
                f'{host.module}: expected {host.distribution} '
                f'{host.specifier}, but {version} is installed.'
            )
        elif version not in SpecifierSet(f'<{host.below}', True):
            remarks.append(
                f'{host.module}: {host.distribution} {version} is newer than '
                f'the versions tried with era_mm {__version__} '
                f'({host.specifier}).'
            )
        elif host.module == 'mmcv' and not has_compiled_ops():
            errors.append(
                f'mmcv: {host.distribution} {version} is installed without '
                'its compiled operators (mmcv.ops). It was built before '
                'torch was there, or in an isolated build: uninstall it and '
                'build it after torch with MMCV_WITH_OPS=1 and '
                '--no-build-isolation.'
            )
    return errors, remarks


def _explain_missing(host: Host) -> str:
    wanted = f'expected {host.distribution} {host.specifier}'
    if host.module == 'mmcv' and installed_version('mmcv-lite') is not None:
        return (
            f'mmcv: {wanted}, but mmcv-lite is installed, which has no '
            'compiled operators (mmcv.ops). Uninstall it first.'
        )
    if importlib.util.find_spec(host.module) is not None:
        return (
            f'{host.module}: {wanted}, but a module of that name without '
            'package metadata came first on sys.path. Install it with pip, '
            'or take its folder off PYTHONPATH.'
        )
    return f'{host.module}: {wanted}, but it is not installed.'


def check_hosts() -> None:
    """Stop with one message if a host package is missing or does not fit.

    Raises:
        HostError: A package is missing, too old, doubled or without its
            compiled operators.
    """
    profile = find_profile()
    errors, remarks = find_problems(profile)
    if errors:
        problems = '\n'.join(f'  - {error}' for error in errors)
        raise HostError(
            f'era_mm {__version__} cannot use the packages it plugs into '
            f'(profile {profile}):\n{problems}\n{INSTALL_HELP}'
        )
    for remark in remarks:
        warnings.warn(remark, HostVersionWarning, stacklevel=3)


def print_hosts() -> None:
    """Print the profile and the version found of every host."""
    profile = find_profile()
    print(f'era_mm {__version__}, profile {profile}')
    for host in PROFILES[profile]:
        print(
            f'  {host.module:<10} {host.distribution:<17} '
            f'{installed_version(host.distribution)} '
            f'(accepted {host.specifier})'
        )
    print(f'  mmcv.ops   {"compiled" if has_compiled_ops() else "missing"}')
