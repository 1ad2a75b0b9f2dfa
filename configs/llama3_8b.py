r"""Llama-3-8B's shape, trained from scratch with ladder residual on 64 GPUs.

Command:   sbatch --nodes 8 launch/slurm.sh configs/llama3_8b.py \
               --data.tokenizer PATH/tokenizer.json
           compare:  --model.residual standard --train.out runs/llama3_8b_standard
                     (or hybrid:last16, ...; desync:2 with --mesh.sequence-parallel
                     false --train.grad-accum-steps 16)
Hardware:  64 NVIDIA H100 of 80 GB, 8 a node; a device holds 12.0 GB of parameters and
           AdamW state
Time:      3.0 days = 25,000 steps of 10.4 s, an MFU of 33%: modelled
           (docs/scaling.md), not measured
Result:    not run yet, and no result is published. The paper (arXiv 2501.06589) says
           that ladder trains an 8B model 5 to 7% faster than standard on 64 H100. It
           measures quality at 8B for another model: Llama-3.1-8B-Instruct, converted
           to hybrid:last16 and trained on 3B tokens.

Tensor parallelism is within a node. Every GPU has the stream of its own tokens
(`mesh.sequence_parallel`), which makes a step shorter (docs/scaling.md). The learning
rate is Llama 3's (arXiv 2407.21783, table 3). The run takes 104.9B tokens, as the
paper's own runs do; Llama 3's took 15T. Rotary embedding is Llama 3's, for 8192
tokens. For Llama 3.1's, add `--model.rope-scaling.factor 8
--model.max-length 131072`.
"""

from ladder_jax.config import Config, Data, Mesh, Model, Optimizer, Train

config = Config(
    model=Model(
        vocab_size=128256,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        max_length=8192,
        residual="ladder",
        rope_theta=500_000.0,
    ),
    data=Data(
        source="data/fineweb-edu/**/*.parquet",
        tokenizer="data/llama3/tokenizer.json",
        held_out_fraction=0.001,
        # On a disk that all nodes see.
        token_cache="data/tokens",
    ),
    mesh=Mesh(data=8, fsdp=1, tensor=8, sequence_parallel=True),
    optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2000),
    train=Train(
        out="runs/llama3_8b",
        steps=25_000,
        global_batch=512,
        seq_len=8192,  # 4.19M tokens a step
        grad_accum_steps=8,  # 8 sequences a node at a time
        remat="reductions",
        loss_chunk=4096,
        eval_every=1000,
        eval_batches=4,
        save_every=500,
    ),
)
