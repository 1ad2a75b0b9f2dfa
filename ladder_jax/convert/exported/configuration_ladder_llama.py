"""Configuration of a Llama-family decoder with a residual schedule."""

from typing import Any

from transformers import PretrainedConfig


class LadderLlamaConfig(PretrainedConfig):
    """A Llama-family decoder whose blocks read a delayed residual stream.

    A layer has two blocks, attention and MLP. With y_j the output of block j, block b
    with delay d reads `embedding + sum(y_j for j < b - d)`; the stream that the final
    norm reads is the sum of all. Delay 0 everywhere is a Llama model, delay 1
    everywhere is Ladder Residual (arXiv 2501.06589).

    Args:
      delays: a delay for each block, layer by layer: attention, MLP, attention, ...
        None: 0 for all.
      parallel: attention and MLP of a layer read the same normalised stream, and their
        outputs join it together (GPT-J, PaLM). `delays` must then be None or all 0.
      attention_bias: biases on query, key and value.
      attention_out_bias: a bias on attention's output projection.
      mlp_bias: biases on the three projections of the MLP.
      qk_norm: RMSNorm on the query and key of every head, before the rotary embedding.
      rope_parameters: {"rope_type": default, linear, llama3 or yarn, "rope_theta": ...}
        and the type's parameters, as transformers names them.
      sliding_window: tokens that a layer of type "sliding_attention" attends to, itself
        included; None: no layer has a window.
      layer_types: "full_attention" or "sliding_attention" for each layer; None: all the
        same, with the window if there is one.
      no_rope_layers: 1 for a layer with rotary embedding, 0 for one without; None: 1
        for all.
      residual: the schedule in ladder_jax's notation; for information.
    The other arguments are those of LlamaConfig.

    Raises:
      ValueError: if a list does not fit the number of layers, or a value is unknown.
    """

    model_type = "ladder_llama"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_out_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        sliding_window: int | None = None,
        layer_types: list[str] | None = None,
        no_rope_layers: list[int] | None = None,
        delays: list[int] | None = None,
        parallel: bool = False,
        residual: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_parameters = rope_parameters
        self.attention_bias = attention_bias
        self.attention_out_bias = attention_out_bias
        self.mlp_bias = mlp_bias
        self.qk_norm = qk_norm
        self.attention_dropout = attention_dropout
        self.sliding_window = sliding_window
        window_type = (
            "full_attention" if sliding_window is None else "sliding_attention"
        )
        self.layer_types = layer_types or [window_type] * num_hidden_layers
        self.no_rope_layers = no_rope_layers or [1] * num_hidden_layers
        self.delays = delays or [0] * (2 * num_hidden_layers)
        self.parallel = parallel
        self.residual = residual
        self._check_lists()
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check_lists(self) -> None:
        layers = self.num_hidden_layers
        for name, count in (
            ("delays", 2 * layers),
            ("layer_types", layers),
            ("no_rope_layers", layers),
        ):
            found = len(getattr(self, name))
            if found != count:
                raise ValueError(f"{name} has {found} items: it must have {count}")
        if min(self.delays, default=0) < 0:
            raise ValueError(f"delays={self.delays}: each must be 0 or more")
        if self.parallel and any(self.delays):
            raise ValueError("parallel=True takes no delays: leave `delays` out")
        unknown = set(self.layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(f"layer_types has unknown types: {sorted(unknown)}")
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            raise ValueError("sliding_window is missing, but layer_types has windows")


__all__ = ["LadderLlamaConfig"]
