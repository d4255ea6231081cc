# The digit crops' pair, and every method and baseline with the settings of its
# config, at one schedule.
metric = dict(key='accuracy/top1', name='top-1')
keep = ['era_mse_*', 'iekd_cos_*', 'residual_kd_mse_*', 'sokd_*']
options = {
    # Windows of ten iterations that follow one another: their mean times add
    # up to the training's.
    'default_hooks.logger.interval': 10,
}

pairs = dict(
    resnet18w16_resnet18w8=dict(
        title='ResNet-18 of width 16 to ResNet-18 of width 8',
        teacher='plain_resnet18w16_digit_crops',
        student='plain_resnet18w8_digit_crops',
        words=dict(self='resnet18w8_resnet18w8'),
    ),
)

# Without CWD and PKD, which compare positions of maps for dense prediction.
methods = dict(
    plain=dict(config='{student}', role='plain'),
    fitnet=dict(
        config='era_{pair}_digit_crops',
        role='baseline',
        title='FitNet',
        options={
            'model.distiller': dict(
                _delete_=True, type='era_mm.FeatureImitationDistiller'
            ),
            'custom_hooks': [],
        },
    ),
    logit=dict(config='logit_{pair}_digit_crops', role='baseline', title='KD'),
    # The labels count fully beside DIST and DKD, 0.1 beside the others.
    lskd=dict(
        config='logit_{pair}_digit_crops',
        role='baseline',
        title='KD, standardised logits',
        options={'model.distiller.logit': dict(kind='kl', standardise=True)},
    ),
    dist=dict(
        config='logit_{pair}_digit_crops',
        role='baseline',
        title='DIST',
        options={
            'model.distiller.logit': dict(kind='dist'),
            'model.distiller.label_weight': 1.0,
        },
    ),
    dkd=dict(
        config='logit_{pair}_digit_crops',
        role='baseline',
        title='DKD',
        options={
            'model.distiller.logit': dict(kind='dkd'),
            'model.distiller.label_weight': 1.0,
            # 20 of 240 epochs in the paper.
            'model.distiller.schedules': dict(loss_logit_score=dict(ramp=107)),
        },
    ),
    mgd=dict(config='mgd_{pair}_digit_crops', role='baseline', title='MGD'),
    at=dict(config='at_{pair}_digit_crops', role='baseline', title='AT'),
    reviewkd=dict(
        config='reviewkd_{pair}_digit_crops',
        role='baseline',
        title='ReviewKD',
    ),
    simkd=dict(
        config='simkd_{pair}_digit_crops',
        role='baseline',
        title='SimKD, with its projector',
    ),
    dml=dict(
        config='dml_{self}_digit_crops',
        role='baseline',
        title='DML, two students',
    ),
    ie_kd=dict(
        config='era_{pair}_digit_crops',
        title='IE-KD',
        options={
            # Two epochs of 2000 crops in batches of 64 come first, and the
            # schedule of the others after them.
            'model.distiller': dict(
                _delete_=True,
                type='era_mm.IEKDDistiller',
                source='backbone',
                pretrain_iters=64,
            ),
            'custom_hooks': [],
            'train_cfg.max_epochs': 42,
            'train_cfg.val_interval': 42,
            'param_scheduler': [
                dict(
                    type='LinearLR',
                    start_factor=0.05,
                    by_epoch=False,
                    begin=64,
                    end=164,
                ),
                dict(
                    type='CosineAnnealingLR',
                    T_max=40,
                    eta_min=0,
                    by_epoch=True,
                    begin=2,
                    end=42,
                    convert_to_iter_based=True,
                ),
            ],
        },
    ),
    ie_dml=dict(
        config='ie_dml_{self}_digit_crops', title='IE-DML, two students'
    ),
    residual_kd=dict(
        config='residual_kd_{pair}_digit_crops',
        title='Residual KD, student and assistant at the FLOPs of plain',
    ),
    sokd=dict(
        config='era_{pair}_digit_crops',
        title='SoKD around FitNet, without DAM',
        options={
            # DAM looks for areas on maps; pooled features have none.
            'model.distiller': dict(
                _delete_=True,
                type='era_mm.SoKDDistiller',
                base=dict(type='era_mm.FeatureImitationDistiller'),
                dam=False,
                # A fifth of this run is 256 iterations: at DADA's 3e-4
                # nothing would move by more than 0.08.
                optimizer=dict(type='Adam', lr=0.01, betas=(0.5, 0.999)),
            ),
            'custom_hooks': [],
        },
    ),
    t2b=dict(
        config='t2b_resnet18w8_digit_crops',
        title='Trunk-to-Branch, no teacher',
    ),
    era=dict(config='era_{pair}_digit_crops', title='ERA'),
)
