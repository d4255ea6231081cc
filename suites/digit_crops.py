# Classification of digit crops: every method and baseline, and ERA by parts,
# five seeds each, at one schedule.
#   python -m era_mm suite suites/digit_crops.py --jobs 2
_base_ = '_base_/digit_crops.py'
title = 'Classification: digit crops'
seeds = [0, 1, 2, 3, 4]
note = """\
Every method has a first run, with the weights that were best of three tries on
val (ERA in each of its two forms, and also with the weights of the config). Of
three parts of its normalised form, which were run besides, the one without the
term on the student's own logits was the best on val and stands among the
methods. Methods of which it was more than 2 points below that of the best
baseline have no more so far, nor has ReviewKD, which takes five times plain's
time, for want of processor time: their rank may change. DIST was 1.0 below and
has five, SoKD has two. ERA's parts were run with one seed, those of its
normalised form with two.
`python -m era_mm suite suites/digit_crops.py` runs the rest."""
methods = dict(
    plain_x2=dict(
        config='{student}',
        role='plain',
        schedule=2,
        title='plain, twice the schedule',
    ),
    plain_x4=dict(
        config='{student}',
        role='plain',
        schedule=4,
        title='plain, four times the schedule',
    ),
    era_no_twi=dict(
        part_of='era',
        title='without TWI',
        options={'model.distiller.twi_steps': 'none'},
    ),
    era_no_logit=dict(
        part_of='era',
        title="without the term on the student's own logits",
        options={
            'model.distiller.schedules': dict(loss_era_logit=dict(scale=0.0))
        },
    ),
    # One branch without any loss, and an e_1 that no head judges: S and E0 are
    # those of an ERA without branches (T and ST mean nothing). TWI on e_0 has
    # weight 1, as in ERA, where e_1 to e_4 have 0.47 besides.
    era_no_branches=dict(
        part_of='era',
        title='without branches',
        options={
            'model.distiller.mbrnet.num_branches': 1,
            'model.distiller.loss.residual_weight': 0.0,
            'model.distiller.loss.twi_scales': (1.0, 0.0),
        },
    ),
    era=dict(title='ERA, weights of the config'),
    era_fifth=dict(
        config='era_{pair}_digit_crops',
        title='ERA, a fifth of the weights',
        options={'model.distiller.schedules.loss_era_*.scale': 0.2},
    ),
    era_normalised=dict(
        config='era_{pair}_digit_crops',
        title='ERA, normalised form, weights of the config',
        options={'model.distiller.form': 'normalised'},
    ),
    era_normalised_no_twi=dict(
        part_of='era_normalised',
        title='normalised, without TWI',
        options={'model.distiller.twi_steps': 'none'},
    ),
    # As above; the one estimate has the weight of both that are drawn.
    era_normalised_no_branches=dict(
        part_of='era_normalised',
        title='normalised, without branches',
        options={
            'model.distiller.mbrnet.num_branches': 1,
            'model.distiller.loss.residual_weight': 0.0,
            'model.distiller.loss.twi_scales': (2.0, 0.0),
        },
    ),
    era_normalised_fifth=dict(
        config='era_{pair}_digit_crops',
        title='ERA, normalised form, a fifth of the weights',
        options={
            'model.distiller.form': 'normalised',
            'model.distiller.schedules.loss_era_*.scale': 0.2,
        },
    ),
    # A part, but the best on val of all runs: beside the baselines.
    era_normalised_no_logit=dict(
        config='era_normalised_{pair}_digit_crops',
        title='ERA, normalised form, features and TWI alone',
    ),
)

# What was best on val (digit_crops_tuning.py), where it is not the config's
# weight. Of ERA, a fifth was, in both forms; the parts of the released form
# have the weights of the config, which are the released ones.
for method, shown, terms, words, scale in (
    ('fitnet', 'FitNet', 'loss_imitation', 'five times the weight', 5.0),
    (
        'lskd',
        'KD, standardised logits',
        'loss_logit_score',
        'a fifth of the weight',
        0.2,
    ),
    ('dist', 'DIST', 'loss_logit_score', 'a fifth of the weight', 0.2),
    ('dkd', 'DKD', 'loss_logit_score', 'a fifth of the weight', 0.2),
    ('mgd', 'MGD', 'loss_mgd', 'five times the weight', 5.0),
    ('at', 'AT', 'loss_at', 'a fifth of the weight', 0.2),
    ('reviewkd', 'ReviewKD', 'loss_reviewkd', 'five times the weight', 5.0),
    (
        'simkd',
        'SimKD, with its projector',
        'loss_simkd',
        'five times the weight',
        5.0,
    ),
    ('ie_kd', 'IE-KD', 'loss_iekd_*', 'a fifth of the weights', 0.2),
    (
        'sokd',
        'SoKD around FitNet, without DAM',
        'loss_imitation',
        'five times the weight',
        5.0,
    ),
    (
        'ie_dml',
        'IE-DML, two students',
        'loss_iekd_*',
        'a fifth of the weights',
        0.2,
    ),
    (
        't2b',
        'Trunk-to-Branch, no teacher',
        'loss_t2b_*',
        'a fifth of the weights',
        0.2,
    ),
):
    methods[method] = dict(
        title=f'{shown}, {words}',
        options={f'model.distiller.schedules.{terms}.scale': scale},
    )
del method, shown, terms, words, scale
