"""What hosts call their parts; their configs."""

from mmengine.config import Config

from era_mm.core.host_models import whole_model


def test_whole_model__has_the_preprocessor_that_lies_beside_it():
    cfg = Config(
        dict(
            model=dict(type='A'),
            data_preprocessor=dict(type='Pre', mean=[1.0]),
        )
    )
    assert whole_model(cfg) == dict(
        type='A', data_preprocessor=dict(type='Pre', mean=[1.0])
    )
    assert 'data_preprocessor' not in cfg.model
    cfg.model.data_preprocessor = dict(type='Own')
    assert whole_model(cfg).data_preprocessor == dict(type='Own')
