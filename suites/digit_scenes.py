# Detection on the digit scenes: every method and baseline, and ERA by parts,
# five seeds each, at one schedule.
#   python -m era_mm suite suites/digit_scenes.py --jobs 2
_base_ = '_base_/digit_scenes.py'
title = 'Detection: digit scenes'
seeds = [0, 1, 2, 3, 4]
note = """\
Every method has a first run, with the weights that were best of three tries on
val (ERA's recipe had 13 tries before and its first form 14, AT and DML three
each). Methods of which it was more than 2 AP below that of the best baseline
have one or two, for want of processor time: their rank may change. Where a
method has several runs with these weights, its values differ by at most 1.6 AP
from seed to seed, without the collapsed plain run; with other weights by up to
10.8 (AT, with the weight of its config). ERA's parts have one or two as well,
but for the one without terms on the student's own head. For the second pair,
with the weights chosen on the first, every method but SoKD has a first run;
plain, ERA and Residual KD have three, FitNet and PKD two, for the same reason.
Methods that compare the heads' outputs, and those without a teacher, are left
out there.
`python -m era_mm suite suites/digit_scenes.py` runs the rest."""
pairs = dict(
    r18w32_gfl_r18w16=dict(
        title='RetinaNet of width 32 to GFL of width 16: unlike heads',
        teacher='plain_retinanet_r18w32_digits',
        student='plain_gfl_r18w16_digits',
    ),
)

# For the first pair alone: parts that say nothing of heads.
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
    # The terms on the student's own head rest; TWI by the teacher, which
    # compares in the same way, stays.
    era_no_logit=dict(
        part_of='era',
        title="without terms on the student's own head",
        options={
            'model.distiller.schedules': dict(
                loss_era_logit=dict(scale=0.0), loss_era_box=dict(scale=0.0)
            )
        },
        pairs=['r18w32_r18w16'],
    ),
    # One branch without any loss: it stays at zero, where it starts. The one
    # estimate has the weight of all five of ERA.
    era_no_branches=dict(
        part_of='era',
        title='without branches',
        options={
            'model.distiller.mbrnet.num_branches': 1,
            'model.distiller.loss.residual_weight': 0.0,
            'model.distiller.loss.twi_scales': (2.0, 0.0),
        },
        pairs=['r18w32_r18w16'],
    ),
    era_no_space=dict(
        part_of='era',
        title='without the normalised space',
        options={'model.distiller.mbrnet.normalize': False},
        pairs=['r18w32_r18w16'],
    ),
    era_released=dict(
        part_of='era',
        title='released form',
        options={'model.distiller.form': 'released'},
        pairs=['r18w32_r18w16'],
    ),
    era_inherit=dict(
        part_of='era',
        title="neck and head start as the teacher's",
        options={'model.inherit': ['neck', 'bbox_head']},
        pairs=['r18w32_r18w16'],
    ),
)

# What was best on val (digit_scenes_tuning.py), where it is not the config's
# weight. Chosen on the first pair.
for method, shown, terms, words, scale in (
    ('cwd', 'CWD', 'loss_cwd', 'a fifth of the weight', 0.2),
    ('mgd', 'MGD', 'loss_mgd', 'five times the weight', 5.0),
    ('at', 'AT', 'loss_at', 'a fifth of the weight', 0.2),
    ('crosskd', 'CrossKD', 'loss_crosskd_*', 'a fifth of the weights', 0.2),
    ('dml', 'DML', 'loss_logit_*', 'a fifth of the weights', 0.2),
    ('ie_kd', 'IE-KD', 'loss_iekd_*', 'a fifth of the weights', 0.2),
    (
        'residual_kd',
        'Residual KD',
        'loss_residual_kd_*',
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
