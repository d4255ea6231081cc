# ERA in its normalised form, ResNet-18 of width 16 to width 8, digit crops,
# 40 epochs.
# Plain twin: plain_resnet18w8_digit_crops.py; train the teacher first.
#   python tools/train.py configs/plain/plain_resnet18w16_digit_crops.py
#   python tools/train.py \
#       configs/era/era_normalised_resnet18w16_resnet18w8_digit_crops.py
_base_ = 'era_resnet18w16_resnet18w8_digit_crops.py'

# Without the term on the student's own logits: the best on val of all runs of
# the form (docs/methods/era.md). TWI by the teacher stays, which `logit=None`
# would replace by the labels. The default for classifiers is the released
# form. [ours]
model = dict(
    distiller=dict(
        form='normalised', schedules=dict(loss_era_logit=dict(scale=0.0))
    )
)
