r"""Llama-3.1-8B-Instruct with its last 16 layers made ladder, fine-tuned on chat.

Command:   ladder-jax convert from-hf meta-llama/Llama-3.1-8B-Instruct runs/llama31_8b
           ladder-jax convert ladderize runs/llama31_8b runs/llama31_8b_last16 \
               --layers last:16
           ladder-jax train configs/llama31_8b_hybrid.py
           distillation instead:  --distill.parent runs/llama31_8b
           the control:  --train.init-from runs/llama31_8b --model.residual standard
Hardware:  8 NVIDIA H100 of 80 GB, one node; a device holds 12.0 GB of parameters and
           AdamW state, and 2.0 GB of the parent with distillation
Time:      16.2 hours = 11,444 steps of 5.11 s, an MFU of 31%: modelled
           (docs/scaling.md), not measured
Result:    not run yet. The paper (arXiv 2501.06589, section 4.3) reports an average of
           56.2 to 57.6 over nine tasks, beside 56.1 of the unmodified model and 41.7
           of the conversion without training. It has no control: the unmodified model
           trained on the same data.

The paper's settings: 3 billion tokens of Infinity-Instruct, learning rate 5e-6, 200
steps of warm-up, the loss on the assistant's tokens. It does not give the length of a
sequence, the batch, or the fall of the learning rate: those are ours. Every GPU has the
stream of its own tokens (`mesh.sequence_parallel`), which makes a step shorter
(docs/scaling.md).
"""

from ladder_jax.config import (
    Config,
    Data,
    Mesh,
    Model,
    Optimizer,
    RopeScaling,
    Train,
)

config = Config(
    model=Model(
        vocab_size=128256,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        max_length=131072,
        residual="hybrid:last16",
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor=8.0),
    ),
    data=Data(source="data/infinity-instruct/*.jsonl", held_out_fraction=0.001),
    mesh=Mesh(data=1, fsdp=1, tensor=8, sequence_parallel=True),
    optimizer=Optimizer(learning_rate=5e-6, warmup_steps=200, weight_decay=0.0),
    train=Train(
        out="runs/llama31_8b_hybrid",
        init_from="runs/llama31_8b_last16",
        steps=11_444,  # 3.0B tokens
        global_batch=64,
        seq_len=4096,
        grad_accum_steps=8,
        remat="reductions",
        loss_chunk=4096,
        eval_every=500,
        eval_batches=4,
        save_every=500,
    ),
)
