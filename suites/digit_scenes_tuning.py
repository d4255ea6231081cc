# The weights of all methods on the digit scenes, chosen on val with the same
# number of tries each: that of the configs, a fifth and five times it. One
# seed.
#   python -m era_mm suite suites/digit_scenes_tuning.py --jobs 2
_base_ = '_base_/digit_scenes.py'
title = 'Detection: digit scenes, tries of weights'
metric = dict(split='val')
seeds = [0]
# Factor on all terms of a method, as `schedules` of its distiller has it.
methods = dict()
for method, shown, terms in (
    ('fitnet', 'FitNet', 'loss_imitation'),
    ('logit', 'scores and boxes', 'loss_logit_*'),
    ('cwd', 'CWD', 'loss_cwd'),
    ('mgd', 'MGD', 'loss_mgd'),
    ('at', 'AT', 'loss_at'),
    ('pkd', 'PKD', 'loss_imitation'),
    ('crosskd', 'CrossKD', 'loss_crosskd_*'),
    ('reviewkd', 'ReviewKD', 'loss_reviewkd'),
    ('dml', 'DML', 'loss_logit_*'),
    ('ie_kd', 'IE-KD', 'loss_iekd_*'),
    ('ie_dml', 'IE-DML', 'loss_iekd_*'),
    ('residual_kd', 'Residual KD', 'loss_residual_kd_*'),
    ('sokd', 'SoKD around FitNet', 'loss_imitation'),
    ('t2b', 'Trunk-to-Branch', 'loss_t2b_*'),
    ('era', 'ERA', 'loss_era_*'),
):
    for name, words, scale in (
        ('fifth', 'a fifth of the weights', 0.2),
        ('fivefold', 'five times the weights', 5.0),
    ):
        methods[f'{method}_{name}'] = dict(
            part_of=method,
            title=f'{shown}, {words}',
            options={f'model.distiller.schedules.{terms}.scale': scale},
        )
del method, shown, terms, name, words, scale
