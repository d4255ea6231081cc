# Residual KD at the end of every stage, ResNet-34 (73.6 top-1) to a pair cut
# out of ResNet-18, ImageNet-1k, 100 epochs, end-to-end.
# Plain twin: plain_resnet18_imagenet.py, the given model. That features are
# taken at each down-sampling is the first author's earlier work; the head sees
# the last sum alone. [inference]
#   mim train era_mm \
#       configs/residual_kd/residual_kd_cuts_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'residual_kd_resnet34_resnet18_imagenet.py'
model = dict(distiller=dict(cuts=['layer1', 'layer2', 'layer3']))
