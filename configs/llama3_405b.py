r"""Llama-3.1-405B's shape, trained from scratch with ladder residual on a TPU slice.

Command:   TPU=NAME ZONE=ZONE launch/tpu_pod.sh configs/llama3_405b.py \
               --data.tokenizer PATH/tokenizer.json
Hardware:  1024 TPU v5p of 95 GB (a slice v5p-2048); a device holds 4.9 GB of parameters
           and AdamW state
Time:      19.8 days = 25,000 steps of 68.3 s, an MFU of 33%: modelled
           (docs/scaling.md), not measured
Result:    not run yet, and no result is published: the paper (arXiv 2501.06589)
           measures only the inference speed of this shape

The model has 16 key-value heads, as in the paper's measurements, so that they divide by
a tensor axis of 16; Llama 3.1 has 8. So this model has 410,081,247,232 parameters;
Llama 3.1 has 405,853,388,800, and these options train exactly it: `--model.kv-heads 8
--mesh.fsdp 128 --mesh.tensor 8 --train.grad-accum-steps 8`. Learning rate, tokens of a
step and sequence length are those that Llama 3 began with (arXiv 2407.21783, section
3.4). The run takes 104.9B tokens, as the paper's runs from scratch do; Llama 3's took
15T. Rotary embedding is Llama 3.1's, scaled for long contexts from the start.
"""

from ladder_jax.config import Config, Data, Mesh, Model, Optimizer, RopeScaling, Train

config = Config(
    model=Model(
        vocab_size=128256,
        dim=16384,
        layers=126,
        heads=128,
        kv_heads=16,
        head_dim=128,
        ffn_dim=53248,
        max_length=131072,
        residual="ladder",
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor=8.0),
    ),
    data=Data(
        source="data/fineweb-edu/**/*.parquet",
        tokenizer="data/llama3/tokenizer.json",
        held_out_fraction=0.001,
        # On a disk that all hosts see.
        token_cache="data/tokens",
    ),
    mesh=Mesh(data=1, fsdp=64, tensor=16),
    optimizer=Optimizer(learning_rate=8e-5, warmup_steps=2000, final_lr_fraction=0.01),
    train=Train(
        out="runs/llama3_405b",
        steps=25_000,
        global_batch=1024,
        seq_len=4096,  # 4.19M tokens a step
        grad_accum_steps=16,  # a sequence at a time for every 16 chips
        remat="reductions",
        loss_chunk=4096,
        eval_every=1000,
        eval_batches=4,
        save_every=500,
    ),
)
