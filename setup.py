"""Package metadata, and the `.mim` folder through which mim finds us."""

import atexit
import runpy
import shutil
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(HERE / 'era_mm' / 'version.py'))['__version__']
# What mim starts by name.
ENTRY_SCRIPTS = (
    'train.py',
    'test.py',
    'export_student.py',
    'make_config.py',
    'print_sources.py',
    'benchmark.py',
    'report.py',
)
# Needs the checkout.
NOT_IN_WHEEL = ('__pycache__', 'setup_env.py')
REPOSITORY = 'https://github.com/era-mm/era_mm'


class BuildElsewhere(build):
    """Builds in a temporary folder.

    A `build/` left in the checkout would put deleted files into the next
    wheel, and mim, which searches the checkout of an editable install for a
    config's name, would find every config twice.
    """

    def initialize_options(self):
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix='era_mm-build-')
        atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


class BuildWithMim(build_py):
    """Adds to the package what `mim train era_mm ...` looks for.

    In a wheel that is `.mim/{tools,configs,model-index.yml}`, twice, because
    no place is read by both mims and a wheel holds no links:

    - openmim reads `era_mm/.mim`, and so do our own commands.
    - onedl-mim (0.5.1) takes the folder in the first line of the installed
      RECORD for the package. pip sorts that file, and `era_mm-<version>
      .dist-info` sorts before `era_mm/`. The data-only folder `_era_mm_mim`
      sorts before both. It goes when onedl-mim looks the module up by name.

    In an editable install onedl-mim reads the checkout itself. openmim looks
    in site-packages/era_mm, so the entry scripts are put there. Configs
    are not: copies would go stale.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            installed = self.get_finalized_command('install').install_lib
            scripts = Path(installed, 'era_mm', '.mim', 'tools')
            scripts.mkdir(parents=True)
            for name in ENTRY_SCRIPTS:
                shutil.copy(HERE / 'tools' / name, scripts)
            return
        for package in ('era_mm', '_era_mm_mim'):
            mim = Path(self.build_lib, package, '.mim')
            for folder in ('tools', 'configs'):
                shutil.copytree(
                    HERE / folder,
                    mim / folder,
                    ignore=shutil.ignore_patterns(*NOT_IN_WHEEL),
                    dirs_exist_ok=True,
                )
            shutil.copy(HERE / 'model-index.yml', mim)


setup(
    name='era_mm',
    version=VERSION,
    description='Residual-approximation distillation for OpenMMLab',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The era_mm authors',
    license='Apache-2.0',
    # openmim reads Home-page, onedl-mim the project URL named Repository.
    url=REPOSITORY,
    project_urls={'Repository': REPOSITORY},
    packages=find_packages(include=['era_mm', 'era_mm.*']),
    package_data={
        'era_mm': ['py.typed'],
        'era_mm.report': ['template/*'],
    },
    # Makes an editable install a plain .pth line: with setuptools' import
    # finder, site-packages/era_mm/.mim would hide the checkout's package.
    package_dir={'': '.'},
    python_requires='>=3.11',
    install_requires=['packaging'],
    # Exactly one profile fits in an environment, see era_mm/hosts.py.
    extras_require={
        'onedl': [
            'torch>=2.6,<2.16',
            'onedl-mmengine>=0.10.12,<0.11',
            'onedl-mmcv>=2.3.6,<2.4',
            'onedl-mmdetection>=3.5.1,<3.6',
            'onedl-mmpretrain>=1.3.6,<1.4',
        ],
        'openmmlab': [
            'torch>=2.1,<2.2',
            'mmengine>=0.10.7,<0.11',
            'mmcv>=2.1,<2.2',
            'mmdet>=3.3,<3.4',
            'mmpretrain>=1.2,<1.3',
        ],
        # era_mm/report
        'report': ['jinja2', 'plotly>=6'],
        # `make demo` and the tools that make data
        'demo': [
            'matplotlib',
            'pillow',
            'rich',
            'scikit-learn',
            'scipy',
            'tqdm',
        ],
    },
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    cmdclass={'build': BuildElsewhere, 'build_py': BuildWithMim},
    zip_safe=False,
)
