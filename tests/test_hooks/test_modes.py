"""Metrics of further modes."""

from era_mm.hooks.modes import for_mode


def test_modes__files_of_an_evaluator_get_the_modes_name():
    config = [
        dict(type='CocoMetric', outfile_prefix='out/res'),
        dict(type='DumpResults', out_file_path='out/res.pkl'),
    ]
    found = for_mode(config, 'T')
    assert found[0]['outfile_prefix'] == 'out/res.T'
    assert found[1]['out_file_path'] == 'out/res.T.pkl'
    assert config[0]['outfile_prefix'] == 'out/res'


def test_modes__files_of_a_single_metric_get_it_too():
    metric = dict(type='CocoMetric', outfile_prefix='out/res')
    found = for_mode(dict(type='Evaluator', metrics=metric), 'T')
    assert found['metrics']['outfile_prefix'] == 'out/res.T'
    assert metric['outfile_prefix'] == 'out/res'
