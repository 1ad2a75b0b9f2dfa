"""The 3.5B model that the ladder paper (arXiv 2501.06589) trains from scratch.

Command:   sbatch --nodes 16 launch/slurm.sh configs/scratch_3b.py
           (data, and other residual schedules to compare with: see scratch_1b.py)
Hardware:  128 NVIDIA H100 of 80 GB, 8 a node; a device holds 5.4 GB of parameters and
           AdamW state
Time:      12.3 hours = 25,000 steps of 1.77 s, an MFU of 42%: modelled
           (docs/scaling.md), not measured
Result:    not run yet. The paper's table 3, after as many tokens of FineWeb-edu:
             residual   Wikitext perplexity   mean of six tasks
             standard   14.48                 64.11
             parallel   14.96                 63.03
             ladder     14.90                 62.91

The paper counts 3.511B parameters, with one embedding. This model has an input and an
output embedding, as in the authors' training configuration. It has 36 heads of 64, as
in their training; their speed measurements have 32 heads of 72, since 36 does not
divide by 8. The mesh is theirs: shards within a node, replicas across nodes. A tensor
axis of 2, 3, 4, 6 or 12 divides this model; a tensor axis of 8 needs `--model.heads 32
--model.kv-heads 32 --model.head-dim 72`.
"""

from ladder_jax.config import Config, Data, Mesh, Model, Optimizer, Train

config = Config(
    model=Model(
        vocab_size=49152,
        dim=2304,
        layers=40,
        heads=36,
        kv_heads=36,
        head_dim=64,
        ffn_dim=9216,
        max_length=2048,
        residual="ladder",
    ),
    data=Data(
        source="data/fineweb-edu/**/*.parquet",
        tokenizer="data/starcoder/tokenizer.json",
        held_out_fraction=0.001,
        # On a disk that all nodes see.
        token_cache="data/tokens",
    ),
    mesh=Mesh(data=16, fsdp=8, tensor=1),
    optimizer=Optimizer(
        learning_rate=3e-4,
        lr_schedule="cosine",
        warmup_steps=2000,
        final_lr_fraction=0.1,
        beta1=0.9,
        beta2=0.95,
        eps=1e-10,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=Train(
        out="runs/scratch_3b",
        steps=25_000,
        global_batch=2048,
        seq_len=2048,  # 4.19M tokens a step, 104.9B in all
        grad_accum_steps=4,  # 4 sequences a device at a time, as in the paper
        remat="dots",
        loss_chunk=4096,
        eval_every=1000,
        eval_batches=4,
        save_every=500,
    ),
)
