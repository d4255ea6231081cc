# The student of the classification demo's pair alone: ResNet-18 of width 8 at
# half the teacher's resolution. Digit crops, 40 epochs:
#   python tools/train.py configs/plain/plain_resnet18w8_digit_crops.py
_base_ = '../_base_/digit_crops.py'
model = dict(
    backbone=dict(stem_channels=8, base_channels=8, strides=(2, 2, 2, 2)),
    head=dict(in_channels=64),
)
