# The weights of all methods on the digit crops, chosen on val with the same
# number of tries each: that of the configs, a fifth and five times it. One
# seed.
#   python -m era_mm suite suites/digit_crops_tuning.py --jobs 2
_base_ = '_base_/digit_crops.py'
title = 'Classification: digit crops, tries of weights'
metric = dict(split='val')
seeds = [0]

# Factor on all terms of a method, as `schedules` of its distiller has it.
methods = dict()
for method, shown, terms in (
    ('fitnet', 'FitNet', 'loss_imitation'),
    ('logit', 'KD', 'loss_logit_score'),
    ('lskd', 'KD, standardised logits', 'loss_logit_score'),
    ('dist', 'DIST', 'loss_logit_score'),
    ('dkd', 'DKD', 'loss_logit_score'),
    ('mgd', 'MGD', 'loss_mgd'),
    ('at', 'AT', 'loss_at'),
    ('reviewkd', 'ReviewKD', 'loss_reviewkd'),
    ('simkd', 'SimKD', 'loss_simkd'),
    ('dml', 'DML', 'loss_logit_score'),
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
# ERA's other form has terms of another size, so tries of its own.
methods['era_normalised'] = dict(
    part_of='era',
    title='ERA, normalised form',
    options={'model.distiller.form': 'normalised'},
)
for name, words, scale in (
    ('fifth', 'a fifth of the weights', 0.2),
    ('fivefold', 'five times the weights', 5.0),
):
    methods[f'era_normalised_{name}'] = dict(
        part_of='era',
        title=f'ERA, normalised form, {words}',
        options={
            'model.distiller.form': 'normalised',
            'model.distiller.schedules.loss_era_*.scale': scale,
        },
    )
del method, shown, terms, name, words, scale
