# Trunk-to-Branch, ResNet-18, ImageNet-1k, 100 epochs; no teacher.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm configs/trunk_to_branch/t2b_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['../plain/plain_resnet18_imagenet.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    distiller=dict(type='era_mm.TrunkToBranchDistiller'),
)
