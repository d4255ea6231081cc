# ERA, RTMDet-l (51.3 AP) to RTMDet-s, COCO 2017, 300 epochs, 8 GPUs x 32
# images. Plain twin: plain_rtmdet_s.py. Teacher before student in the name.
#   mim train era_mm configs/era/era_rtmdet_l_s.py --launcher pytorch --gpus 8
_base_ = '../plain/plain_rtmdet_s.py'

custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
# Not from _base_/era_runtime.py: RTMDet has hooks of its own.
# The first, EMA, averages align and branches as well.
custom_hooks = [
    dict(_base_.custom_hooks[0], type='era_mm.EMAHook'),
    *_base_.custom_hooks[1:],
    dict(type='era_mm.TWIHook', modes=['E0', 'T', 'ST']),
]
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/'
        'rtmdet_l_8xb32-300e_coco/'
        'rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4.pth',
    ),
    distiller=dict(type='era_mm.ERADistiller'),
)
