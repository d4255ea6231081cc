# The student of the letters' pair alone: RetinaNet on a ResNet-18 of width 16.
# Letter scenes, 15 epochs; the betas are meant to keep trainings from
# collapsing (docs/digit_scenes.md):
#   python tools/train.py configs/plain/plain_retinanet_r18w16_letters.py
_base_ = [
    'mmdet::_base_/default_runtime.py',
    '../_base_/letter_scenes.py',
    '../_base_/retinanet_digits.py',
    '../_base_/schedule_digits.py',
]
model = dict(
    backbone=dict(base_channels=16, stem_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64),
)
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.99)))
