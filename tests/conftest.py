"""Fixtures that every test folder shares."""

import copy
import functools

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from era_mm import testing


def pytest_collection_modifyitems(items):
    # One file, minutes long: begun last, it would run alone at the end.
    items.sort(key=lambda item: 'packaging' not in item.keywords)


@pytest.fixture(autouse=True)
def _one_thread_and_a_fresh_hub(request):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    init_default_scope('mmdet')
    # A run before would leave its iteration in the current hub.
    MessageHub.get_instance(f'{request.node.nodeid}-fresh')
    # And its logger would write to what is closed by now.
    MMLogger.get_instance(f'{request.node.nodeid}-fresh')


@pytest.fixture(scope='session')
def read_config():
    """Reads a config file, which is parsed once in a session."""
    parse = functools.cache(Config.fromfile)
    return lambda file: copy.deepcopy(parse(str(file)))


@pytest.fixture(scope='session')
def coco(tmp_path_factory):
    """A tiny data set in COCO format."""
    return testing.write_coco(tmp_path_factory.mktemp('coco'))


@pytest.fixture(scope='session')
def teacher_file(tmp_path_factory):
    """A checkpoint of the toy teacher."""
    config = testing.detector_config(width=16, channels=24)
    return testing.save_teacher(
        config, tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    )


@pytest.fixture
def make_runner(coco, tmp_path):
    """Builds a Runner of a model config on the tiny data set."""

    def make(model, work_dir=None, **kwargs):
        return Runner.from_cfg(
            Config(
                testing.run_config(
                    model, coco, work_dir or tmp_path / 'run', **kwargs
                )
            )
        )

    return make
