# DML on scores and boxes, two RetinaNets of width 16, digit scenes.
# Plain twin: plain_retinanet_r18w16_digits.py, of both students.
#   python tools/train.py \
#       configs/baselines/dml_retinanet_r18w16_r18w16_digits.py
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
    # The dense form; the paper is about classifiers. [ours]
    distiller=dict(type='era_mm.LogitDistiller'),
)
optim_wrapper = dict(constructor='era_mm.MutualOptimWrapperConstructor')
