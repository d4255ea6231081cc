# ERA, Swin-L (86.2 top-1) to ResNet-50, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet50_imagenet.py.
#   mim train era_mm configs/era/era_swin_l_resnet50_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['../plain/plain_resnet50_imagenet.py', '../_base_/era_runtime.py']

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmpretrain::swin_transformer/swin-large_16xb64_in1k.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/swin-transformer/convert/'
        'swin_large_patch4_window7_224_22kto1k-5f0996db.pth',
    ),
    distiller=dict(
        type='era_mm.ERADistiller',
        # Layer norms, as the released code has for Swin teachers.
        mbrnet=dict(norm_cfg=dict(type='LN')),
    ),
)
