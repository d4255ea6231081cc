# The one schedule of every digit-scenes run: teacher, plain student and
# distilled student. `digits_epochs` stretches all of it.
digits_epochs = 15

train_cfg = dict(
    type='EpochBasedTrainLoop',
    max_epochs=digits_epochs,
    val_interval=digits_epochs,
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=10, norm_type=2),
)
param_scheduler = [
    # Long: with 100 iterations some runs lost their first epochs.
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=450),
    dict(
        type='CosineAnnealingLR',
        T_max=digits_epochs,
        eta_min=0,
        by_epoch=True,
        begin=0,
        end=digits_epochs,
        convert_to_iter_based=True,
    ),
]
randomness = dict(seed=0)
