# ERA, RetinaNet of width 32 to GFL of width 16, digit scenes: unlike heads.
# TWI is by the teacher's RetinaNet head, which judges estimates by its own
# outputs; those of GFL have another form, so terms on the student's own head
# are off.
# Plain twin: plain_gfl_r18w16_digits.py; train the teacher first.
#   python tools/train.py configs/era/era_retinanet_r18w32_gfl_r18w16_digits.py
_base_ = '../feature_imitation/fitnet_retinanet_r18w32_gfl_r18w16_digits.py'
custom_hooks = [dict(type='era_mm.TWIHook', modes=['E0', 'T', 'ST'])]
model = dict(distiller=dict(_delete_=True, type='era_mm.ERADistiller'))
