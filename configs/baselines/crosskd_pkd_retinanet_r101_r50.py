# CrossKD and PKD, RetinaNet R101 (38.9 AP) to RetinaNet R50, COCO 2017, 2x.
# Plain twin: plain_retinanet_r50.py.
#   mim train era_mm crosskd_pkd_retinanet_r101_r50.py
_base_ = 'crosskd_retinanet_r101_r50.py'
model = dict(
    distiller=dict(
        _delete_=True,
        crosskd=_base_.model.distiller,
        # On all five levels. [official code]
        pkd=dict(
            type='era_mm.PKDDistiller',
            loss_weight=2.0,
            num_levels=5,
        ),
    )
)
