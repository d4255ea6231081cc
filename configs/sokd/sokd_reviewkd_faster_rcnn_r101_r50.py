# SoKD around ReviewKD, Faster R-CNN R101 (39.8 AP) to Faster R-CNN R50, COCO
# 2017, 2x. Detector and base are the paper's; its pairs and weights are not
# known. [ours]
# Plain twin: plain_faster_rcnn_r50.py.
#   mim train era_mm sokd_reviewkd_faster_rcnn_r101_r50.py
_base_ = 'sokd_faster_rcnn_r101_r50.py'
model = dict(
    # Weight 1 is ReviewKD's released one for detectors.
    distiller=dict(base=dict(_delete_=True, type='era_mm.ReviewKDDistiller'))
)
