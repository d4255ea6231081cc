# MGD, RetinaNet X101-64x4d (41.0 AP) to RetinaNet R50, COCO 2017, 2x.
# Plain twin: plain_retinanet_r50.py.
#   mim train era_mm mgd_retinanet_x101_r50.py
_base_ = 'pkd_retinanet_x101_r50.py'
model = dict(
    # The student starts from the teacher's neck and head. [official code]
    inherit=['neck', 'bbox_head'],
    distiller=dict(_delete_=True, type='era_mm.MGDDistiller'),
)
