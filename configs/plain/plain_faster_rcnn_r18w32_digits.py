# The teacher of the pair with two stages alone: Faster R-CNN on a ResNet-18 of
# width 32. Digit scenes, 15 epochs:
#   python tools/train.py configs/plain/plain_faster_rcnn_r18w32_digits.py
_base_ = [
    'mmdet::_base_/default_runtime.py',
    '../_base_/digit_scenes.py',
    '../_base_/faster_rcnn_digits.py',
    '../_base_/schedule_digits.py',
]
model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
)
