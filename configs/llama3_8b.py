"""Llama 3.1 8B."""
from ladder_jax.config import Config, Mesh, Model, RopeScaling, Train

config = Config(
    model=Model(vocab_size=128256, dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn_dim=14336,
                max_length=131072, rope_theta=500000.0, rope_scaling=RopeScaling(), residual="ladder"),
    mesh=Mesh(data=-1, fsdp=1, tensor=8),
    train=Train(batch=1, length=2048, remat="reductions"),
)
