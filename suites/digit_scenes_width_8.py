# Where the gap to the teacher is wide: a student of width 8 on the digit
# scenes, on val, for trying designs of ERA. The demo's betas.
#   python -m era_mm suite suites/digit_scenes_width_8.py --jobs 2
_base_ = '_base_/digit_scenes.py'
title = 'Detection: digit scenes, tries with a student of width 8'
metric = dict(split='val')
seeds = [0]
note = """\
Feature and TWI terms that stop after two thirds of the training were tried in
vain, so ERA is as it was. The teacher was given as a file: it has AP 53.7 on
test."""
options = {'optim_wrapper.optimizer.betas': (0.9, 0.99)}
pairs = dict(
    r18w32_r18w16=dict(title='RetinaNet of width 32 to RetinaNet of width 8'),
)

# The configs are those of a student of width 16.
narrow = {
    'backbone.base_channels': 8,
    'backbone.stem_channels': 8,
    'neck.in_channels': [8, 16, 32, 64],
}
student = {f'model.student.{key}': narrow[key] for key in narrow}
stopping = {
    f'loss_era_{term}': dict(stop=1500)
    for term in ('align', 'residual', 'twi_*')
}
methods = dict(
    _delete_=True,
    plain=dict(
        config='{student}',
        role='plain',
        options={f'model.{key}': narrow[key] for key in narrow},
    ),
    logit=dict(
        config='logit_retinanet_{pair}_digits',
        role='baseline',
        title='scores and boxes',
        options=student,
    ),
    era=dict(
        config='era_retinanet_{pair}_digits', title='ERA', options=student
    ),
    era_fade=dict(
        part_of='era',
        title='feature and TWI terms for two thirds of the training',
        options={'model.distiller.schedules': stopping},
    ),
)
del narrow, student, stopping
