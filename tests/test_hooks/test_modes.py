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
