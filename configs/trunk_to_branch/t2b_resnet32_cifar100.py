# Trunk-to-Branch, ResNet-32, CIFAR-100, 240 epochs; no teacher.
# Plain twin: plain_resnet32_cifar100.py.
#   mim train era_mm configs/trunk_to_branch/t2b_resnet32_cifar100.py
_base_ = ['../plain/plain_resnet32_cifar100.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    distiller=dict(type='era_mm.TrunkToBranchDistiller'),
)
