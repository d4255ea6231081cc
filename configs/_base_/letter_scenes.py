# Letter scenes as COCO data; made by tools/make_letter_scenes.py.
_base_ = 'digit_scenes.py'

data_root = 'data/letter_scenes/'
metainfo = dict(classes=tuple('ABDEGHKMRS'))

train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))

val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = dict(ann_file=data_root + 'annotations/test.json')
