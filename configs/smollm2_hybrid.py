r"""SmolLM2-135M-Instruct with its last 15 of 30 layers made ladder, then distilled.

Command:   make smollm2
           ladder-jax convert ladderize runs/smollm2/checkpoint runs/smollm2_last15 \
               --layers last:15
           ladder-jax train configs/smollm2_hybrid.py
           fine-tuning without the parent:  --distill.parent ""
           the control:  --train.init-from runs/smollm2/checkpoint \
               --model.residual standard --distill.parent ""
           the annealed delay:  --distill.anneal-steps 50
Hardware:  any machine with 2 CPU cores and 8 GB of memory; better a GPU, with
           --train.global-batch 32
Time:      about half an hour on 2 idle cores, at 190 tokens/s: derived, not measured
Result:    see docs/conversion.md

A run takes 0.3M tokens of Python's documentation: --train.steps 1465 for 3M.
"""

from ladder_jax.config import Config, Data, Distill, Mesh, Model, Optimizer, Train

config = Config(
    model=Model(
        vocab_size=49152,
        dim=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        max_length=8192,
        residual="hybrid:last15",
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
    data=Data(source="builtin"),
    mesh=Mesh(data=1),
    optimizer=Optimizer(
        learning_rate=3e-4, lr_schedule="wsd", warmup_steps=10, weight_decay=0.0
    ),
    train=Train(
        out="runs/smollm2_hybrid",
        init_from="runs/smollm2_last15",
        steps=150,
        global_batch=4,
        seq_len=512,
        loss_chunk=512,
        log_every=5,
        eval_every=25,
        eval_batches=8,
        save_every=50,
        keep_checkpoints=1,
    ),
    distill=Distill(parent="runs/smollm2/checkpoint"),
)
