"""Makes the virtual environment in which `make demo` and `make test` run.

Runs under a bare Python and needs nothing but its standard library. Steps
that were done are not repeated; a step that was cut off is never trusted: the
environment is made anew (downloads and the built mmcv are kept).

    python3 tools/setup_env.py            # make .venv, or see that it is right
    python3 tools/setup_env.py --venv X   # somewhere else
    python3 tools/setup_env.py --profile openmmlab    # .venv-openmmlab
    python3 tools/setup_env.py --profile newest       # .venv-newest

What to install is in `requirements/`. A file in `requirements/<profile>/`
stands in for the one of the same name; of constraints, line by line.

The mmcv wheel is kept in $ERA_MM_CACHE, by default
${XDG_CACHE_HOME:-~/.cache}/era_mm, by all that it was built for: the versions
of mmcv, torch and Python, the platform, its C library, and CPU or the GPUs'
architectures.
"""

# An old Python has to get as far as the message that it is too old.
from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / 'requirements'
OLDEST_PYTHON = (3, 11)
#: Profile -> the newest Python that its torch is for. `newest` has the hosts
#: of onedl (era_mm/hosts.py) with the newest torch for which mmcv builds.
NEWEST_PYTHON = {'onedl': (3, 12), 'openmmlab': (3, 11), 'newest': (3, 11)}
#: Profiles whose mmcv is built for a GPU, with the compiler in cuda.txt. The
#: reasons of the others are in docs/installation.md.
FOR_GPUS = ('onedl',)
#: Profiles whose torch has headers in C++20, which mmcv does not ask for.
FOR_CXX20 = ('newest',)
# torch with its CUDA libraries unpacked and packed, and room to build mmcv.
FREE_BYTES = 10 * 1024**3
LOG_LINES = 20
# There with NVIDIA's driver.
DRIVER = Path('/dev/nvidiactl')
# What the environment is made from; a change makes the set-up run again.
INPUTS = (
    'requirements/**/*.txt',
    'setup.py',
    'pyproject.toml',
    'MANIFEST.in',
    'era_mm/version.py',
    'tools/setup_env.py',
)

# Prints what mmcv's wheel depends on: the versions of torch and Python, and
# the capabilities of the GPUs that this torch has kernels for.
TELL = """
import sysconfig
import torch
kernels = [int(name[3:]) for name in torch.cuda.get_arch_list()
           if name[3:].isdigit()]
gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
found = {torch.cuda.get_device_capability(gpu) for gpu in gpus}
usable = [f'{major}.{minor}' for major, minor in sorted(found)
          if 10 * major + minor >= min(kernels)]
print(torch.__version__, sysconfig.get_config_var('SOABI'),
      ';'.join(usable) or 'none')
"""

# A compiler that takes C++20 where it is asked for C++17.
COMPILER = """\
#!/bin/sh
for argument; do
    shift
    [ "$argument" != -std=c++17 ] || argument=-std=c++20
    set -- "$@" "$argument"
done
exec {compiler} "$@"
"""

# Log pattern -> what to do. The first that matches is shown.
REMEDIES = (
    (
        r'No space left on device|Errno 28',
        'The disk is full. Free about 10 GB (the environment takes 6), or '
        'set TMPDIR and ERA_MM_CACHE to folders with room, and run it again.',
    ),
    (
        r'Temporary failure in name resolution|Name or service not known|'
        r'NewConnectionError|ConnectTimeout|Network is unreachable|'
        r'Connection (refused|reset)|Read timed out|ProxyError|'
        r'Max retries exceeded',
        'The package index could not be reached. Check the network, the '
        'proxy variables and `pip config list`, and run it again: what was '
        'downloaded is kept.',
    ),
    (
        r'CERTIFICATE_VERIFY_FAILED|SSLError',
        "The package index's certificate is not trusted. Set PIP_CERT to "
        "your organisation's certificate file and run it again.",
    ),
    (
        r'Could not find a version that satisfies|No matching distribution',
        'The package index of `pip config list` could not be reached (no '
        'network, a proxy), or has no such version for this Python and '
        'platform: another Python is chosen with make PYTHON=python3.11.',
    ),
    (
        r'Python\.h: No such file|Python\.h. file not found',
        "Python's headers are missing: apt-get install python3-dev.",
    ),
    (
        r'Killed|signal 9|cc1plus.*(terminated|out of memory)',
        'The compiler ran out of memory. Run it again with MAX_JOBS=1.',
    ),
    (
        r'Permission denied|Errno 13',
        'A folder is not writable by this user. Give the checkout and the '
        'cache folder to yourself, or set ERA_MM_CACHE to a folder of yours.',
    ),
)


class StepError(Exception):
    """A step failed; the message says what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--profile',
        choices=NEWEST_PYTHON,
        default='onedl',
        help='which packages of the hosts (docs/installation.md)',
    )
    parser.add_argument(
        '--venv',
        type=Path,
        metavar='DIR',
        help='by default .venv, or .venv-PROFILE for another than onedl',
    )
    args = parser.parse_args()
    folder = '.venv' if args.profile == 'onedl' else f'.venv-{args.profile}'
    venv = (args.venv or ROOT / folder).absolute()
    try:
        Setup(venv, args.profile).run()
    except StepError as error:
        print(f'\nset-up stopped: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nset-up interrupted; run it again to go on.', file=sys.stderr)
        return 130
    return 0


class Setup:
    """The steps, in order.

    Args:
        venv: Where the environment is, or will be.
        profile: Which packages of the hosts it holds.
    """

    def __init__(self, venv: Path, profile: str = 'onedl') -> None:
        self.venv = venv
        self.profile = profile
        self.python = venv / 'bin' / 'python'
        self.state = venv / 'era_mm-setup'
        self.stamp = self.state / 'done.json'
        self.running = self.state / 'running'
        self.logs = ROOT / '.cache' / 'setup'
        #: Capabilities of the GPUs to build for, as torch writes them.
        self.gpus = 'none'

    @property
    def for_gpu(self) -> bool:
        return self.gpus != 'none'

    def run(self) -> None:
        """Do what is not done yet."""
        if self.is_done():
            return
        check_python(NEWEST_PYTHON[self.profile])
        self.make_folder(self.logs)
        with open(self.logs / 'lock', 'w') as lock:
            self.wait_for(lock)
            if self.is_done():
                return
            start = time.monotonic()
            self.do_steps()
            minutes = (time.monotonic() - start) / 60
            print(f'set-up done in {minutes:.1f} min', flush=True)

    def do_steps(self) -> None:
        if self.running.exists():
            step = self.running.read_text().strip()
            print(
                f'the last set-up was cut off in step "{step}": starting anew'
            )
            shutil.rmtree(self.venv)
        if not self.state.exists():
            self.make_venv()
        self.check_profile()
        self.stamp.unlink(missing_ok=True)
        self.install('build tools', 'build.txt')
        self.install('torch (the longest download)', 'torch.txt')
        self.install('libraries', 'runtime.txt')
        self.install('developer tools', 'dev.txt')
        self.install_mmcv()
        self.install('hosts', 'hosts.txt', '--no-deps', '--no-build-isolation')
        self.step(
            'era_mm',
            [
                *self.pip('install'),
                '--no-deps',
                '--no-build-isolation',
                f'--editable={ROOT}',
            ],
        )
        # Kept as files, so that the tests of packaging need no network.
        shutil.rmtree(self.state / 'mim', ignore_errors=True)
        self.step(
            'mim',
            [
                *self.pip('wheel'),
                '--no-deps',
                '--no-build-isolation',
                f'--wheel-dir={self.state / "mim"}',
                f'--requirement={self.requirements("packaging.txt")}',
            ],
        )
        self.step(
            'check',
            [
                str(self.python),
                '-c',
                'import torch, torchvision, mmdet.apis, mmpretrain.apis, mim; '
                'from mmcv.ops import nms; '
                f'device = {"cuda" if self.for_gpu else "cpu"!r}; '
                'boxes = torch.tensor([[0., 0, 4, 4], [0, 0, 4, 4]]); '
                'scores = torch.tensor([.9, .8]); '
                'kept = nms(boxes.to(device), scores.to(device), .5)[1]; '
                'assert kept.tolist() == [0]; import era_mm',
            ],
        )
        write_whole(self.stamp, json.dumps(self.fingerprint(), indent=1))

    # -- what is there already --------------------------------------------

    def fingerprint(self) -> dict[str, str]:
        """All that the environment depends on."""
        digest = hashlib.sha256()
        for pattern in INPUTS:
            for path in sorted(ROOT.glob(pattern)):
                digest.update(f'{path.relative_to(ROOT)}\0'.encode())
                digest.update(path.read_bytes())
        return {
            'inputs': digest.hexdigest(),
            'root': str(ROOT),
            'venv': str(self.venv),
            'profile': self.profile,
            'gpu': str(DRIVER.exists()),
        }

    def is_done(self) -> bool:
        if self.running.exists() or not self.python.exists():
            return False
        try:
            return json.loads(self.stamp.read_text()) == self.fingerprint()
        except (OSError, ValueError):
            return False

    def wait_for(self, lock) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print('waiting for another set-up of this checkout ...')
            fcntl.flock(lock, fcntl.LOCK_EX)

    def make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StepError(
                f'cannot write {folder} ({error.strerror}).\nWhat to do: '
                'give the checkout to yourself (chown), or clone it into a '
                'folder of yours.'
            ) from None

    # -- steps ------------------------------------------------------------

    def make_venv(self) -> None:
        free = shutil.disk_usage(ROOT).free
        if free < FREE_BYTES:
            raise StepError(
                f'expected {FREE_BYTES >> 30} GB free at {ROOT}, but only '
                f'{free >> 30} GB are. torch alone takes 5.\nWhat to do: '
                'free some, or clone into a larger disk.'
            )
        if self.venv.exists():
            raise StepError(
                f'{self.venv} exists, but this set-up did not make it.\n'
                'What to do: move it away, or use another folder: '
                'make VENV=.venv-era.'
            )
        self.make_folder(self.state)
        write_whole(self.state / 'profile', self.profile)
        try:
            self.step(
                'virtual environment',
                [sys.executable, '-m', 'venv', str(self.venv)],
                remedy=(
                    "Python's venv module is incomplete: "
                    'apt-get install python3-venv.'
                ),
            )
        except StepError:
            shutil.rmtree(self.venv)
            raise

    def check_profile(self) -> None:
        """Refuse to install one profile over another."""
        note = self.state / 'profile'
        found = note.read_text() if note.exists() else 'onedl'
        if found != self.profile:
            raise StepError(
                f'expected an environment of the {self.profile} profile, but '
                f'{self.venv} has that of {found}.\nWhat to do: remove it, '
                'or use another folder: make VENV=.venv-era.'
            )

    def requirements(self, file: str) -> Path:
        """The profile's own file of that name, or the common one."""
        own = REQUIREMENTS / self.profile / file
        return own if own.exists() else REQUIREMENTS / file

    def install(self, name: str, file: str, *options: str) -> None:
        """Install a file of `requirements/`, nothing in it left to chance."""
        self.step(
            name,
            [
                *self.pip('install'),
                *options,
                f'--requirement={self.requirements(file)}',
                f'--constraint={self.constraints()}',
            ],
        )

    def constraints(self) -> Path:
        """The common constraints, the profile's own in place of theirs."""
        common = REQUIREMENTS / 'constraints.txt'
        pins = {
            line.partition('==')[0]: line
            for path in (common, self.requirements(common.name))
            for line in path.read_text().splitlines()
            if line and not line.startswith('#')
        }
        merged = self.state / 'constraints.txt'
        write_whole(merged, '\n'.join(pins.values()) + '\n')
        return merged

    def install_mmcv(self) -> None:
        """Install the cached wheel of mmcv, built first where there is none.

        pip's own cache is not used: it does not know for which torch a wheel
        was built.
        """
        requirement = read_requirement(self.requirements('mmcv.txt'))
        key = self.mmcv_key(requirement)
        installed = self.state / 'mmcv'
        if installed.exists() and installed.read_text() == key:
            return
        folder = self.cache_folder() / 'wheels' / key
        wheels = [path for path in folder.glob('*.whl') if has_ops(path)]
        if not wheels:
            try:
                wheels = [self.build_mmcv(requirement, folder)]
            except StepError as error:
                if not self.for_gpu:
                    raise
                raise StepError(
                    f'{error}\nOr go on without the GPU: '
                    'CUDA_VISIBLE_DEVICES= make demo.'
                ) from None
        self.step(
            'mmcv',
            [
                *self.pip('install'),
                '--no-deps',
                '--no-index',
                '--force-reinstall',
                str(wheels[0]),
            ],
        )
        write_whole(installed, key)

    def build_mmcv(self, requirement: str, folder: Path) -> Path:
        check_compiler(self.python)
        jobs = os.environ.get('MAX_JOBS') or str(os.cpu_count() or 1)
        flags = dict(
            MMCV_WITH_OPS='1',
            MAX_JOBS=jobs,
            CFLAGS='-g0',
            CXXFLAGS='-g0',
            PATH=f'{self.venv / "bin"}:{os.environ["PATH"]}',
        )
        flags['FORCE_CUDA'] = '1' if self.for_gpu else '0'
        if self.profile in FOR_CXX20:
            flags['CXX'] = str(self.make_compiler())
        minutes = '5 to 20'
        if self.for_gpu:
            flags['CUDA_HOME'] = str(self.install_cuda_compiler())
            flags['TORCH_CUDA_ARCH_LIST'] = self.gpus
            minutes = '5 to 60'
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            self.step(
                f'build of mmcv with {jobs} jobs ({minutes} minutes, once)',
                [
                    *self.pip('wheel'),
                    '--no-deps',
                    '--no-build-isolation',
                    '--no-cache-dir',
                    f'--no-binary={requirement.split("==")[0]}',
                    f'--wheel-dir={scratch}',
                    requirement,
                ],
                environment=flags,
                mark=False,
            )
            (built,) = Path(scratch).glob('*.whl')
            if not has_ops(built):
                raise StepError(
                    f'the build of {requirement} left out its compiled '
                    f'operators, see {self.log_path("build of mmcv")}.'
                )
            folder.mkdir(exist_ok=True)
            return Path(shutil.move(built, folder / built.name))

    def make_compiler(self) -> Path:
        """Write the compiler for C++20, around the one of the machine."""
        compiler = self.state / 'c++'
        write_whole(
            compiler, COMPILER.format(compiler=os.environ.get('CXX', 'c++'))
        )
        compiler.chmod(0o755)
        return compiler

    def install_cuda_compiler(self) -> Path:
        """Put nvcc beside torch's own CUDA headers and libraries.

        Not the machine's: torch refuses one of another major version, and few
        machines have any.
        """
        self.install('CUDA compiler', 'cuda.txt')
        pattern = 'lib/python*/site-packages/nvidia/cu[0-9]*/lib/libcudart.so*'
        libraries = [x for x in self.venv.glob(pattern) if not x.is_symlink()]
        if len(libraries) != 1:
            raise StepError(
                f"expected one library of torch's CUDA as {pattern} in "
                f'{self.venv}, but got {len(libraries)}.\nWhat to do: remove '
                f'{self.venv} and run it again.'
            )
        # The linker asks for the name without a version, which pip's package
        # of the library does not have.
        link = libraries[0].with_name('libcudart.so')
        link.unlink(missing_ok=True)
        link.symlink_to(libraries[0].name)
        return link.parents[1]

    def mmcv_key(self, requirement: str) -> str:
        """Name all that the wheel depends on; decide on CPU or GPU."""
        answer = subprocess.run(
            [str(self.python), '-c', TELL],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode:
            raise StepError(
                f'torch does not import:\n{answer.stderr}\nWhat to do: '
                f'remove {self.venv} and run it again.'
            )
        torch, python, self.gpus = answer.stdout.split()
        if self.for_gpu and self.profile not in FOR_GPUS:
            print(
                f'set-up: the {self.profile} profile is set up for the CPU '
                'alone; docs/installation.md says why.'
            )
            self.gpus = 'none'
        is_hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')
        if DRIVER.exists() and self.gpus == 'none' and not is_hidden:
            print(
                "set-up: NVIDIA's driver is here, but torch finds no GPU that "
                f'it can use:\n{answer.stderr.strip() or "no reason given"}\n'
                'Going on for the CPU. Once that is mended, remove '
                f'{self.venv} and run it again for the GPU.'
            )
        # pip takes what follows a semicolon in a path for a condition.
        gpus = self.gpus.replace(';', '-')
        target = f'sm{gpus}' if self.for_gpu else 'cpu'
        # With operators for the CPU alone, nothing may move to the GPU.
        hide = '' if self.for_gpu else 'CUDA_VISIBLE_DEVICES='
        write_whole(self.state / 'environment', hide)
        return '_'.join(
            (
                requirement.replace('==', '-'),
                f'torch-{torch}',
                python,
                ''.join(platform.libc_ver()),
                target,
            )
        )

    def cache_folder(self) -> Path:
        """The first of the cache folders that can be written."""
        home = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
        candidates = [home.expanduser() / 'era_mm', ROOT / '.cache']
        if os.environ.get('ERA_MM_CACHE'):
            candidates = [Path(os.environ['ERA_MM_CACHE']).absolute()]
        for folder in candidates:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    return folder
            except OSError:
                continue
        raise StepError(
            f'cannot write the cache folder {candidates[-1]}.\n'
            'What to do: set ERA_MM_CACHE to a folder of yours.'
        )

    # -- one command ------------------------------------------------------

    def pip(self, command: str) -> list[str]:
        return [
            str(self.python),
            '-m',
            'pip',
            command,
            '--disable-pip-version-check',
            '--no-input',
        ]

    def log_path(self, name: str) -> Path:
        stem = re.sub(r'\W+', '_', name.split('(')[0].strip())
        return self.logs / f'{stem}.log'

    def step(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
        mark: bool = True,
        remedy: str | None = None,
    ) -> None:
        """Run one command, its output in a log of its own.

        Args:
            name: Shown, and the log's name.
            command: What to run.
            environment: Variables on top of this process's.
            mark: Whether a cut-off leaves the environment unusable.
            remedy: What to do if it fails for no known reason.
        """
        log = self.log_path(name)
        print(f'set-up: {name} ...', end='', flush=True)
        if mark:
            write_whole(self.running, name)
        start = time.monotonic()
        # A user's own site-packages must not stand in for what is pinned.
        variables = {**os.environ, 'PYTHONNOUSERSITE': '1'}
        variables.pop('PYTHONPATH', None)
        variables.update(environment or {})
        with open(log, 'w') as file:
            code = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=variables,
                check=False,
            ).returncode
        # A command ended by a signal may have left anything behind.
        if mark and code >= 0:
            self.running.unlink()
        if code:
            print(' failed', flush=True)
            raise StepError(explain_failure(name, code, log, remedy))
        print(f' {time.monotonic() - start:.0f} s', flush=True)


def check_python(newest: tuple[int, int]) -> None:
    if not OLDEST_PYTHON <= sys.version_info[:2] <= newest:
        versions = dict.fromkeys(
            '.'.join(map(str, version)) for version in (OLDEST_PYTHON, newest)
        )
        raise StepError(
            f'expected Python {" or ".join(versions)}, but {sys.executable} '
            f'is {platform.python_version()}.\nWhat to do: install one '
            '(apt-get install python3.11 python3.11-venv python3.11-dev) '
            'and run make PYTHON=python3.11.'
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise StepError(
            f'{sys.executable} cannot make virtual environments.\nWhat to '
            'do: apt-get install python3-venv.'
        ) from None


def check_compiler(python: Path) -> None:
    compiler = (os.environ.get('CXX') or 'c++').split()[0]
    if not shutil.which(compiler):
        raise StepError(
            f'mmcv has to be built, but there is no C++ compiler '
            f'({compiler}).\nWhat to do: apt-get install g++ (or set CXX).'
        )
    script = 'import sysconfig; print(sysconfig.get_path("include"))'
    folder = subprocess.run(
        [str(python), '-c', script], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(folder, 'Python.h').exists():
        raise StepError(
            f"mmcv has to be built, but Python's headers are not in "
            f'{folder}.\nWhat to do: apt-get install python3-dev.'
        )


def has_ops(wheel: Path) -> bool:
    """Whether a wheel of mmcv is whole and carries its operators."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return any('mmcv/_ext' in name for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_requirement(path: Path) -> str:
    lines = path.read_text().splitlines()
    (requirement,) = (x for x in lines if x and not x.startswith('#'))
    return requirement


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either old or complete."""
    scratch = path.with_name(path.name + '.new')
    scratch.write_text(text)
    scratch.replace(path)


def explain_failure(
    name: str, code: int, log: Path, remedy: str | None
) -> str:
    text = log.read_text(errors='replace')
    tail = '\n'.join(f'  | {x}' for x in text.splitlines()[-LOG_LINES:])
    advice = next(
        (advice for pattern, advice in REMEDIES if re.search(pattern, text)),
        remedy or 'Read the log above; run it again once that is mended.',
    )
    return (
        f'step "{name}" failed (exit status {code}). The end of its log:\n'
        f'{tail}\nThe whole log: {log}\nWhat to do: {advice}'
    )


if __name__ == '__main__':
    sys.exit(main())
