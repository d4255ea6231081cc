# Detection on the digit scenes: every method and baseline, and ERA by parts,
# five seeds each, at one schedule.
#   python -m era_mm suite suites/digit_scenes.py --jobs 2
title = 'Detection: digit scenes'
metric = dict(key='coco/bbox_mAP', name='AP', scale=100)
seeds = [0, 1, 2, 3, 4]
keep = [
    'era_unexplained_*',
    'iekd_cos_*',
    'residual_kd_mse_*',
    'sokd_*',
]
options = {
    # Windows of ten iterations that follow one another: their mean times add
    # up to the training's.
    'default_hooks.logger.interval': 10,
}

pairs = dict(
    r18w32_r18w16=dict(
        title='RetinaNet of width 32 to RetinaNet of width 16',
        teacher='plain_retinanet_r18w32_digits',
        student='plain_retinanet_r18w16_digits',
        words=dict(self='r18w16_r18w16'),
    ),
    r18w32_gfl_r18w16=dict(
        title='RetinaNet of width 32 to GFL of width 16: unlike heads',
        teacher='plain_retinanet_r18w32_digits',
        student='plain_gfl_r18w16_digits',
    ),
)

# For the first pair alone: what unlike heads cannot have, what has no teacher,
# and parts that say nothing of heads.
methods = dict(
    plain=dict(config='{student}', role='plain'),
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
    fitnet=dict(
        config='fitnet_retinanet_{pair}_digits',
        role='baseline',
        title='FitNet',
    ),
    logit=dict(
        config='logit_retinanet_{pair}_digits',
        role='baseline',
        title='scores and boxes',
        pairs=['r18w32_r18w16'],
    ),
    cwd=dict(
        config='cwd_retinanet_{pair}_digits', role='baseline', title='CWD'
    ),
    mgd=dict(
        config='mgd_retinanet_{pair}_digits', role='baseline', title='MGD'
    ),
    at=dict(config='at_retinanet_{pair}_digits', role='baseline', title='AT'),
    pkd=dict(
        config='pkd_retinanet_{pair}_digits', role='baseline', title='PKD'
    ),
    crosskd=dict(
        config='crosskd_retinanet_{pair}_digits',
        role='baseline',
        title='CrossKD',
    ),
    reviewkd=dict(
        config='reviewkd_retinanet_{pair}_digits',
        role='baseline',
        title='ReviewKD',
    ),
    dml=dict(
        config='dml_retinanet_{self}_digits',
        role='baseline',
        title='DML, two students',
        pairs=['r18w32_r18w16'],
    ),
    ie_kd=dict(config='ie_kd_retinanet_{pair}_digits', title='IE-KD'),
    ie_dml=dict(
        config='ie_dml_retinanet_{self}_digits',
        title='IE-DML, two students',
        pairs=['r18w32_r18w16'],
    ),
    residual_kd=dict(
        config='residual_kd_retinanet_{pair}_digits',
        title='Residual KD, student and assistant',
    ),
    sokd=dict(
        config='sokd_retinanet_{pair}_digits', title='SoKD around FitNet'
    ),
    t2b=dict(
        config='t2b_retinanet_r18w16_digits',
        title='Trunk-to-Branch, no teacher',
        pairs=['r18w32_r18w16'],
    ),
    era=dict(config='era_retinanet_{pair}_digits', title='ERA'),
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
