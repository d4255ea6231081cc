# A narrower student for the letters' teacher: RetinaNet on a ResNet-18 of
# width 8. Letter scenes, 15 epochs; the betas as in the base:
#   python tools/train.py configs/plain/plain_retinanet_r18w8_letters.py
_base_ = ['plain_retinanet_r18w16_letters.py']
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64]),
)
