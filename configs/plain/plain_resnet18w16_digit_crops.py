# The teacher of the classification demo's pair alone: ResNet-18 of width 16.
# Digit crops, 40 epochs:
#   python tools/train.py configs/plain/plain_resnet18w16_digit_crops.py
_base_ = '../_base_/digit_crops.py'
model = dict(
    backbone=dict(stem_channels=16, base_channels=16),
    head=dict(in_channels=128),
)
