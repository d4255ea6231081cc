# The digit scenes' first pair, and every method and baseline with the settings
# of its config, at one schedule.
metric = dict(key='coco/bbox_mAP', name='AP', scale=100)
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
)

# For this pair alone: what unlike heads cannot have, and what has no teacher.
methods = dict(
    plain=dict(config='{student}', role='plain'),
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
)
