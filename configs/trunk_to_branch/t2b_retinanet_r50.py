# Trunk-to-Branch, RetinaNet R50, COCO 2017, 2x; no teacher. The detection form
# is our own extension.
# Plain twin: plain_retinanet_r50.py.
#   mim train era_mm configs/trunk_to_branch/t2b_retinanet_r50.py
_base_ = ['../plain/plain_retinanet_r50.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    distiller=dict(type='era_mm.TrunkToBranchDistiller'),
)
