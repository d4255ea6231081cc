# IE-DML, two RetinaNets of width 16 teach each other, digit scenes.
# Plain twin: plain_retinanet_r18w16_digits.py, of both students.
#   python tools/train.py \
#       configs/ie_kd/ie_dml_retinanet_r18w16_r18w16_digits.py
_base_ = '../plain/plain_retinanet_r18w16_digits.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
custom_hooks = [
    dict(type='era_mm.ModesHook', modes=['second']),
    dict(type='era_mm.StudentFilesHook'),
]

model = dict(
    _delete_=True,
    type='era_mm.MutualDistillation',
    students=dict(first=_base_.model, second=_base_.model),
    distiller=dict(type='era_mm.IEKDDistiller'),
)
optim_wrapper = dict(constructor='era_mm.MutualOptimWrapperConstructor')
