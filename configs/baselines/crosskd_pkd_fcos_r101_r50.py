# CrossKD and PKD, FCOS R101 (40.8 AP) to FCOS R50, COCO 2017, 2x, multi-
# scale.
# Plain twin: plain_fcos_r50.py.
#   mim train era_mm crosskd_pkd_fcos_r101_r50.py
_base_ = 'crosskd_fcos_r101_r50.py'
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
