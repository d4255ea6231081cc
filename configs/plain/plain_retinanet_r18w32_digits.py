# The teacher of the demo's pair alone: RetinaNet on a ResNet-18 of width 32.
# Digit scenes, 15 epochs:
#   python tools/train.py configs/plain/plain_retinanet_r18w32_digits.py
_base_ = [
    'mmdet::_base_/default_runtime.py',
    '../_base_/digit_scenes.py',
    '../_base_/retinanet_digits.py',
    '../_base_/schedule_digits.py',
]
model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64),
)
