r"""BLOOM-176B's shape, trained from scratch with ladder residual on 256 GPUs.

Command:   sbatch --nodes 32 launch/slurm.sh configs/bloom_176b.py \
               --data.source 'PATH/*.parquet' --data.tokenizer PATH/tokenizer.json
Hardware:  256 NVIDIA H100 of 80 GB, 8 a node; a device holds 10.0 GB of parameters and
           AdamW state
Time:      30.7 days = 25,000 steps of 106 s, an MFU of 20%: modelled
           (docs/scaling.md), not measured
Result:    not run yet, and no result is published: the paper (arXiv 2501.06589)
           measures only the inference speed of this shape

Tensor parallelism is within a node. Every GPU has the stream of its own tokens
(`mesh.sequence_parallel`): that leaves room for 4 sequences of a node at once, so that
parameters cross the network half as often as with 2. `--train.grad-accum-steps 8`
halves it again, and takes nearly all of the memory (docs/scaling.md).

Layers, dimension, heads and vocabulary are
BLOOM's. This model has SwiGLU (50176 wide, as the paper measures it), RMSNorm and
rotary embedding; BLOOM has GELU (57344 wide), LayerNorm, biases and ALiBi. So this
model has 212,202,346,496 parameters; BLOOM has 176,247,271,424. Learning rate and batch
are BLOOM's (arXiv 2211.05100). The run takes 104.9B tokens, as the paper's runs from
scratch do; BLOOM's took 366B.
"""

from ladder_jax.config import Config, Data, Mesh, Model, Optimizer, Train

config = Config(
    model=Model(
        vocab_size=250880,
        dim=14336,
        layers=70,
        heads=112,
        kv_heads=112,
        head_dim=128,
        ffn_dim=50176,
        max_length=2048,
        residual="ladder",
        tie_embeddings=True,
    ),
    data=Data(
        source="data/text/**/*.parquet",
        tokenizer="data/bloom/tokenizer.json",
        held_out_fraction=0.001,
        # On a disk that all nodes see.
        token_cache="data/tokens",
    ),
    mesh=Mesh(data=1, fsdp=32, tensor=8, sequence_parallel=True),
    optimizer=Optimizer(learning_rate=6e-5, warmup_steps=2000),
    train=Train(
        out="runs/bloom_176b",
        steps=25_000,
        global_batch=2048,
        seq_len=2048,  # 4.19M tokens a step
        grad_accum_steps=16,  # 4 sequences a node at a time
        remat="reductions",
        loss_chunk=2048,
        eval_every=1000,
        eval_batches=4,
        save_every=500,
    ),
)
