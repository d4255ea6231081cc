# The weights of ERA and of the baselines on the digit scenes, chosen on val
# with the same number of tries each: that of the configs, a third and three
# times it. One seed.
#   python -m era_mm suite suites/digit_scenes_tuning.py --jobs 2
title = 'Detection: digit scenes, tries of weights'
metric = dict(key='coco/bbox_mAP', name='AP', scale=100, split='val')
seeds = [0]
# As in digit_scenes.py, so that its rows of unchanged configs count here too.
options = {'default_hooks.logger.interval': 10}

pairs = dict(
    r18w32_r18w16=dict(
        title='RetinaNet of width 32 to RetinaNet of width 16',
        teacher='plain_retinanet_r18w32_digits',
        student='plain_retinanet_r18w16_digits',
    ),
)

methods = dict(plain=dict(config='{student}', role='plain'))
# Scale of all terms of a method by name of the method, as `schedules` of its
# distiller has it. AT and DML have three tries each in
# results/baselines_tuning.jsonl.
for method, shown, terms in (
    ('fitnet', 'FitNet', 'loss_imitation'),
    ('logit', 'scores and boxes', 'loss_logit_*'),
    ('cwd', 'CWD', 'loss_cwd'),
    ('mgd', 'MGD', 'loss_mgd'),
    ('pkd', 'PKD', 'loss_imitation'),
    ('crosskd', 'CrossKD', 'loss_crosskd_*'),
    ('reviewkd', 'ReviewKD', 'loss_reviewkd'),
    ('era', 'ERA', 'loss_era_*'),
):
    about = dict(
        config=method + '_retinanet_{pair}_digits',
        role='method' if method == 'era' else 'baseline',
    )
    methods[method] = dict(about, title=shown)
    for try_name, words, scale in (
        ('third', 'a third of the weights', 1 / 3),
        ('triple', 'three times the weights', 3.0),
    ):
        methods[f'{method}_{try_name}'] = dict(
            about,
            title=f'{shown}, {words}',
            options={'model.distiller.schedules': {terms: dict(scale=scale)}},
        )
del method, shown, terms, about, try_name, words, scale
