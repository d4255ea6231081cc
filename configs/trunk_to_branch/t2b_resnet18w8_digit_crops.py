# Trunk-to-Branch, ResNet-18 of width 8, digit crops, 40 epochs; no teacher.
# Plain twin: plain_resnet18w8_digit_crops.py.
#   python tools/train.py configs/trunk_to_branch/t2b_resnet18w8_digit_crops.py
_base_ = ['../plain/plain_resnet18w8_digit_crops.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    distiller=dict(type='era_mm.TrunkToBranchDistiller'),
)
