# CrossKD and PKD, GFL R101 (44.7 AP, 2x multi-scale) to GFL R50, COCO 2017,
# 1x.
# Plain twin: plain_gfl_r50.py.
#   mim train era_mm crosskd_pkd_gfl_r101_r50.py
_base_ = 'crosskd_gfl_r101_r50.py'
model = dict(
    distiller=dict(
        _delete_=True,
        crosskd=_base_.model.distiller,
        # On all five levels. [official code]
        pkd=dict(
            type='era_mm.PKDDistiller',
            loss_weight=6.0,
            num_levels=5,
        ),
    )
)
