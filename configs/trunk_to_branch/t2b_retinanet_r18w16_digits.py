# Trunk-to-Branch, RetinaNet of width 16, digit scenes, 15 epochs; no teacher.
# Plain twin: plain_retinanet_r18w16_digits.py.
#   python tools/train.py \
#       configs/trunk_to_branch/t2b_retinanet_r18w16_digits.py
_base_ = ['../plain/plain_retinanet_r18w16_digits.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    distiller=dict(type='era_mm.TrunkToBranchDistiller'),
)
