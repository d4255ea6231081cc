# MGD, RepPoints X101-DCN (44.2 AP) to RepPoints R50, COCO 2017, 2x.
# Plain twin: plain_reppoints_r50.py.
#   mim train era_mm mgd_reppoints_x101_r50.py
_base_ = 'pkd_reppoints_x101_r50.py'
model = dict(
    # The student starts from the teacher's neck and head. [official code]
    inherit=['neck', 'bbox_head'],
    distiller=dict(_delete_=True, type='era_mm.MGDDistiller'),
)
