# CWD of the class scores, GFL R101 (44.7 AP, 2x multi-scale) to GFL R50, COCO
# 2017, 1x.
# Plain twin: plain_gfl_r50.py.
#   mim train era_mm cwd_gfl_r101_r50.py
_base_ = 'crosskd_gfl_r101_r50.py'
model = dict(
    distiller=dict(
        # 5 on the scores of each level, before the sigmoid. [mmrazor]
        _delete_=True,
        type='era_mm.CWDDistiller',
        source='bbox_head.gfl_cls',
        loss_weight=5.0,
    )
)
