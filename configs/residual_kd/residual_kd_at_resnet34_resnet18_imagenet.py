# Residual KD on top of AT, ResNet-34 (73.6 top-1) to a pair cut out of
# ResNet-18, ImageNet-1k, 100 epochs, end-to-end. AT trains the student in
# place of its distance to the teacher; the assistant repairs the rest.
# [inference]
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm residual_kd_at_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'residual_kd_resnet34_resnet18_imagenet.py'
model = dict(
    distiller=dict(
        _delete_=True,
        at=dict(
            type='era_mm.ATDistiller',
            source=dict(
                student=[
                    'backbone.student.backbone.layer1',
                    'backbone.student.backbone.layer2',
                    'backbone.student.backbone.layer3',
                    'backbone.student.backbone.layer4',
                ],
                teacher=[
                    'backbone.layer1',
                    'backbone.layer2',
                    'backbone.layer3',
                    'backbone.layer4',
                ],
            ),
        ),
        residual=dict(_base_.model.distiller, student_weight=0.0),
    )
)
