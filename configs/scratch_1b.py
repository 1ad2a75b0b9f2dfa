r"""The 1.2B model that the ladder paper (arXiv 2501.06589) trains from scratch.

Command:   sbatch --nodes 8 launch/slurm.sh configs/scratch_1b.py
           data:     hf download HuggingFaceFW/fineweb-edu --repo-type dataset \
                         --include "sample/100BT/*" --local-dir data/fineweb-edu
                     hf download bigcode/starcoder tokenizer.json \
                         --local-dir data/starcoder
           compare:  --model.residual standard --train.out runs/scratch_1b_standard
                     (or parallel, desync:2, ...)
           smaller:  8 devices: --mesh.data 1 --train.grad-accum-steps 32
Hardware:  64 NVIDIA H100 of 80 GB, 8 a node; a device holds 1.9 GB of parameters and
           AdamW state
Time:      9.7 hours = 25,000 steps of 1.4 s, an MFU of 38%: modelled
           (docs/scaling.md), not measured
Result:    not run yet. The paper's table 3, after as many tokens of FineWeb-edu:
             residual   Wikitext perplexity   mean of six tasks
             standard   18.54                 59.98
             parallel   18.95                 58.75
             ladder     18.42                 58.92

The paper counts 1.208B parameters, with one embedding. This model has an input and an
output embedding, as in the authors' training configuration. It needs no tensor
parallelism at this size: the run measures ladder's quality, not its speed. `--mesh.fsdp
1 --mesh.tensor 8` trains the same model with tensor parallelism.
"""

from ladder_jax.config import Config, Data, Mesh, Model, Optimizer, Train

config = Config(
    model=Model(
        vocab_size=49152,
        dim=1536,
        layers=40,
        heads=24,
        kv_heads=24,
        head_dim=64,
        ffn_dim=4096,
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
    mesh=Mesh(data=8, fsdp=8, tensor=1),
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
        out="runs/scratch_1b",
        steps=25_000,
        global_batch=2048,
        seq_len=2048,  # 4.19M tokens a step, 104.9B in all
        grad_accum_steps=4,  # 8 sequences a device at a time, as in the paper
        remat="dots",
        loss_chunk=4096,
        eval_every=1000,
        eval_batches=4,
        save_every=500,
    ),
)
