r"""Llama-3-70B's shape, trained from scratch with ladder residual on a TPU slice.

Command:   TPU=NAME ZONE=ZONE launch/tpu_pod.sh configs/llama3_70b.py \
               --data.tokenizer PATH/tokenizer.json
Hardware:  256 TPU v5p of 95 GB (a slice v5p-512); a device holds 3.3 GB of parameters
           and AdamW state
Time:      12.0 days = 25,000 steps of 41.6 s, an MFU of 39%: modelled
           (docs/scaling.md), not measured
Result:    not run yet, and no result is published: the paper (arXiv 2501.06589)
           measures only the inference speed of this shape

The learning rate is Llama 3's (arXiv 2407.21783, table 3). The run takes 104.9B tokens,
as the paper's runs from scratch do; Llama 3's took 15T. Rotary embedding is Llama 3's,
for 8192 tokens. For Llama 3.1's, add `--model.rope-scaling.factor 8 --model.max-length
131072`.
"""

from ladder_jax.config import Config, Data, Mesh, Model, Optimizer, Train

config = Config(
    model=Model(
        vocab_size=128256,
        dim=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        ffn_dim=28672,
        max_length=8192,
        residual="ladder",
        rope_theta=500_000.0,
    ),
    data=Data(
        source="data/fineweb-edu/**/*.parquet",
        tokenizer="data/llama3/tokenizer.json",
        held_out_fraction=0.001,
        # On a disk that all hosts see.
        token_cache="data/tokens",
    ),
    mesh=Mesh(data=1, fsdp=32, tensor=8),
    optimizer=Optimizer(learning_rate=1.5e-4, warmup_steps=2000),
    train=Train(
        out="runs/llama3_70b",
        steps=25_000,
        global_batch=512,
        seq_len=8192,  # 4.19M tokens a step
        grad_accum_steps=16,  # a sequence at a time for every 8 chips
        remat="reductions",
        loss_chunk=4096,
        eval_every=1000,
        eval_batches=4,
        save_every=500,
    ),
)
