# The weights of all methods on the digit crops, chosen on val with the same
# number of tries each: that of the configs, a fifth and five times it. One
# seed.
#   python -m era_mm suite suites/digit_crops_tuning.py --jobs 2
_base_ = '_base_/digit_crops.py'
title = 'Classification: digit crops, tries of weights'
metric = dict(split='val')
seeds = [0]

# Of each method the settings of its weights, by the name of the terms.
methods = dict()
for method, shown, scaled in (
    (
        'fitnet',
        'FitNet',
        lambda scale: {
            'model.distiller': dict(
                _delete_=True,
                type='era_mm.FeatureImitationDistiller',
                schedules=dict(loss_imitation=dict(scale=scale)),
            )
        },
    ),
    ('logit', 'KD', 'loss_logit_score'),
    ('lskd', 'KD, standardised logits', 'loss_logit_score'),
    ('dist', 'DIST', 'loss_logit_score'),
    (
        'dkd',
        'DKD',
        lambda scale: {
            'model.distiller.schedules': dict(
                loss_logit_score=dict(ramp=107, scale=scale)
            )
        },
    ),
    ('mgd', 'MGD', 'loss_mgd'),
    ('at', 'AT', 'loss_at'),
    ('reviewkd', 'ReviewKD', 'loss_reviewkd'),
    ('simkd', 'SimKD', 'loss_simkd'),
    ('dml', 'DML', 'loss_logit_score'),
    (
        'ie_kd',
        'IE-KD',
        lambda scale: {
            'model.distiller': dict(
                _delete_=True,
                type='era_mm.IEKDDistiller',
                source='backbone',
                pretrain_iters=64,
                schedules={'loss_iekd_*': dict(scale=scale)},
            )
        },
    ),
    ('ie_dml', 'IE-DML', 'loss_iekd_*'),
    ('residual_kd', 'Residual KD', 'loss_residual_kd_*'),
    (
        'sokd',
        'SoKD around FitNet',
        lambda scale: {
            'model.distiller': dict(
                _delete_=True,
                type='era_mm.SoKDDistiller',
                base=dict(type='era_mm.FeatureImitationDistiller'),
                dam=False,
                schedules=dict(loss_imitation=dict(scale=scale)),
            )
        },
    ),
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
            options=scaled(scale)
            if callable(scaled)
            else {'model.distiller.schedules': {scaled: dict(scale=scale)}},
        )
del method, shown, scaled, name, words, scale
