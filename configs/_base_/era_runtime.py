# What every ERA config adds to a host's runtime.
# Imported here so that a broken installation shows its own traceback.
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
# Beside the student's own metrics: the final estimate through the teacher's
# head (T), the blend (ST) and the aligned feature through the head (E0).
custom_hooks = [dict(type='era_mm.TWIHook', modes=['E0', 'T', 'ST'])]
