# Residual KD, progressive: the student for 50 epochs, the assistant for 20,
# then the head for 30, of 5005 iterations each (256 images). The lengths are
# [inference]. Plain twin: plain_resnet18_imagenet.py, whose rates fall once:
# here they begin anew with each phase, for each begins with what has not
# learnt yet. [ours]
#   mim train era_mm \
#   configs/residual_kd/residual_kd_progressive_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'residual_kd_resnet34_resnet18_imagenet.py'

model = dict(
    distiller=dict(
        phases=dict(student=50 * 5005, assistant=20 * 5005, head=None)
    )
)

param_scheduler = dict(
    _delete_=True,
    type='CosineRestartLR',
    periods=[50, 20, 30],
    restart_weights=[1, 1, 1],
    eta_min=0,
    by_epoch=True,
)
