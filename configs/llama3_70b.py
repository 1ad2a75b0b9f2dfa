"""Llama 3.1 70B."""
from ladder_jax.config import Config, Mesh, Model, RopeScaling, Train

config = Config(
    model=Model(vocab_size=128256, dim=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn_dim=28672,
                max_length=131072, rope_theta=500000.0, rope_scaling=RopeScaling(), residual="ladder"),
    mesh=Mesh(data=-1, fsdp=1, tensor=8),
    train=Train(batch=1, length=2048, remat="reductions"),
)
