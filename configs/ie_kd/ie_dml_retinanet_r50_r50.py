# IE-DML, two RetinaNets R50 teach each other, COCO 2017, 2x.
# Plain twin: plain_retinanet_r50.py, of both students.
#   mim train era_mm configs/ie_kd/ie_dml_retinanet_r50_r50.py
_base_ = ['../plain/plain_retinanet_r50.py']
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
