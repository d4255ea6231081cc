# IE-DML, two ResNet-18s of width 8 teach each other, digit crops, 40 epochs.
# Plain twin: plain_resnet18w8_digit_crops.py, of both students.
#   python tools/train.py \
#       configs/ie_kd/ie_dml_resnet18w8_resnet18w8_digit_crops.py
_base_ = '../baselines/dml_resnet18w8_resnet18w8_digit_crops.py'
model = dict(
    distiller=dict(
        # The last stage, before pooling. [official code]
        _delete_=True,
        type='era_mm.IEKDDistiller',
        source='backbone',
    )
)
