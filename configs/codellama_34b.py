r"""CodeLlama-34B's shape, trained from scratch with ladder residual on 64 GPUs.

Command:   sbatch --nodes 8 launch/slurm.sh configs/codellama_34b.py \
               --data.source 'PATH/*.parquet' --data.text-field content \
               --data.tokenizer PATH/tokenizer.json
Hardware:  64 NVIDIA H100 of 80 GB, 8 a node; a device holds 6.3 GB of parameters and
           AdamW state
Time:      13.3 days = 25,000 steps of 45.8 s, an MFU of 30%: modelled
           (docs/scaling.md), not measured
Result:    not run yet, and no result is published: the paper (arXiv 2501.06589)
           measures only the inference speed of this shape

Tensor parallelism is within a node. Every GPU has the stream of its own tokens
(`mesh.sequence_parallel`): that leaves room for 8 sequences of a node at once, so that
parameters cross the network half as often as with 4 (docs/scaling.md).

Learning rate, warm-up, decay and tokens a step are
CodeLlama's (arXiv 2308.12950, section 2). CodeLlama began with the weights of Llama 2
and took 500B tokens; this run begins with fresh weights and takes 104.9B, as the
paper's runs from scratch do. Rotary base and longest context are those of CodeLlama's
long-context fine-tuning.
"""

from ladder_jax.config import Config, Data, Mesh, Model, Optimizer, Train

config = Config(
    model=Model(
        vocab_size=32000,
        dim=8192,
        layers=48,
        heads=64,
        kv_heads=8,
        head_dim=128,
        ffn_dim=22016,
        max_length=16384,
        residual="ladder",
        rope_theta=1_000_000.0,
    ),
    data=Data(
        source="data/code/**/*.parquet",
        tokenizer="data/codellama/tokenizer.json",
        held_out_fraction=0.001,
        # On a disk that all nodes see.
        token_cache="data/tokens",
    ),
    mesh=Mesh(data=1, fsdp=8, tensor=8, sequence_parallel=True),
    optimizer=Optimizer(
        learning_rate=1.5e-4, warmup_steps=1000, final_lr_fraction=1 / 30
    ),
    train=Train(
        out="runs/codellama_34b",
        steps=25_000,
        global_batch=1024,
        seq_len=4096,  # 4.19M tokens a step
        grad_accum_steps=16,  # 8 sequences a node at a time
        remat="reductions",
        loss_chunk=4096,
        eval_every=1000,
        eval_batches=4,
        save_every=500,
    ),
)
