# Trunk-to-Branch, CSWin-T, ImageNet-1k, 300 epochs with mixup and cutmix; no
# teacher.
# Plain twin: plain_cswin_t_imagenet.py.
#   mim train era_mm configs/trunk_to_branch/t2b_cswin_t_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['../plain/plain_cswin_t_imagenet.py']

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    distiller=dict(type='era_mm.TrunkToBranchDistiller'),
)
