# Detection on data where no setting was chosen: the pair, schedule and weights
# of the digit scenes, with the demo's betas, on letters in fonts that training
# does not show.
#   python -m era_mm suite suites/letter_scenes.py --jobs 2
title = 'Detection: letter scenes, where nothing was chosen'
metric = dict(key='coco/bbox_mAP', name='AP', scale=100)
keep = ['era_unexplained_*']
seeds = [0, 1, 2, 3, 4]
note = """\
Plain, ERA and its terms on the student's own head alone have three seeds so
far, plain with twice the schedule two, for the first pair; FitNet none. Runs
of the second pair had other work beside them, so they have no time.
`python -m era_mm suite suites/letter_scenes.py` runs the rest. The weights are
those that were best on the digit scenes' val."""
options = {
    # Windows of ten iterations that follow one another: their mean times add
    # up to the training's.
    'default_hooks.logger.interval': 10,
}
pairs = dict(
    r18w32_r18w16=dict(
        title='RetinaNet of width 32 to RetinaNet of width 16',
        teacher='plain_retinanet_r18w32_letters',
        student='plain_retinanet_r18w16_letters',
    ),
    r18w32_r18w8=dict(
        title='RetinaNet of width 32 to RetinaNet of width 8: a wide gap',
        teacher='plain_retinanet_r18w32_letters',
        student='plain_retinanet_r18w8_letters',
    ),
)
methods = dict(
    plain=dict(config='{student}', role='plain'),
    plain_x2=dict(
        config='{student}',
        role='plain',
        schedule=2,
        title='plain, twice the schedule',
    ),
    fitnet=dict(
        config='fitnet_retinanet_{pair}_letters',
        role='baseline',
        title='FitNet',
    ),
    logit=dict(
        config='logit_retinanet_{pair}_letters',
        role='baseline',
        title='scores and boxes',
    ),
    era=dict(config='era_retinanet_{pair}_letters', title='ERA'),
)
