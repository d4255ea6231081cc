# DML, two ResNet-18s of width 8 teach each other, digit crops, 40 epochs.
# Plain twin: plain_resnet18w8_digit_crops.py, of both students.
#   python tools/train.py \
#       configs/baselines/dml_resnet18w8_resnet18w8_digit_crops.py
_base_ = ['../plain/plain_resnet18w8_digit_crops.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
custom_hooks = [
    dict(type='era_mm.ModesHook', modes=['second']),
    dict(type='era_mm.StudentFilesHook'),
]

model = dict(
    _delete_=True,
    type='era_mm.MutualDistillation',
    students=dict(first=_base_.model, second=_base_.model),
    # KL at temperature 1 beside the labels, both with weight 1. [paper]
    distiller=dict(
        type='era_mm.LogitDistiller', logit=dict(weight=1.0, temperature=1.0)
    ),
)
optim_wrapper = dict(constructor='era_mm.MutualOptimWrapperConstructor')
