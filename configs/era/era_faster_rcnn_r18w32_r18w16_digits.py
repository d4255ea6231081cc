# ERA, Faster R-CNN of width 32 to Faster R-CNN of width 16, digit scenes.
# Plain twin: plain_faster_rcnn_r18w16_digits.py; train the teacher first.
#   python tools/train.py configs/era/era_faster_rcnn_r18w32_r18w16_digits.py
_base_ = [
    '../plain/plain_faster_rcnn_r18w16_digits.py',
    '../_base_/era_runtime.py',
]

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_faster_rcnn_r18w32_digits.py',
        checkpoint='work_dirs/plain_faster_rcnn_r18w32_digits/epoch_15.pth',
    ),
    distiller=dict(type='era_mm.ERADistiller'),
)
