# Trunk-to-Branch, ConvNeXt-T, ImageNet-1k, 300 epochs with mixup and cutmix;
# no teacher. A trunk of the thesis; its branches tap maps before the norm.
# Plain twin: plain_convnext_t_imagenet.py.
#   mim train era_mm configs/trunk_to_branch/t2b_convnext_t_imagenet.py \
#       --launcher pytorch --gpus 32
_base_ = ['../plain/plain_convnext_t_imagenet.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    distiller=dict(type='era_mm.TrunkToBranchDistiller'),
)
