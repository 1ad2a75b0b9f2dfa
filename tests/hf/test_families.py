"""Every family and option: logits, tokens and files beside those of transformers."""

import dataclasses
import json

import foreign
import jax
import numpy as np
import pytest
import transformers

import ladder_jax
from ladder_jax import sharding
from ladder_jax.convert.families import FAMILIES, read_config
from ladder_jax.generate import empty_cache, generate, make_forward

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=32,
)
MSCALE = dict(mscale=0.8, mscale_all_dim=0.5, beta_fast=16.0, truncate=False)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
GRANITE = dict(
    embedding_multiplier=3.0,
    attention_multiplier=0.2,
    residual_multiplier=0.5,
    logits_scaling=0.5,
)
SOME_SLIDE = ["full_attention", "sliding_attention", "full_attention"]
WINDOW = dict(sliding_window=8)
SWITCHED = dict(use_sliding_window=True) | WINDOW
# name: (model_type, fields of its config, the class that the export is written for)
CASES = {
    "llama": ("llama", {}, "llama"),
    "llama, wide heads": ("llama", dict(head_dim=16), "llama"),
    "llama, one kv head": ("llama", dict(num_key_value_heads=1), "llama"),
    "llama, as many kv heads": ("llama", dict(num_key_value_heads=4), "llama"),
    "llama, tied": ("llama", dict(tie_word_embeddings=True), "llama"),
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True), "llama"),
    "llama, llama3": ("llama", dict(rope_parameters=LLAMA3), "llama"),
    "llama, linear": ("llama", dict(rope_parameters=LINEAR), "llama"),
    "llama, yarn": ("llama", dict(rope_parameters=YARN), "llama"),
    "llama, yarn, mscale": ("llama", dict(rope_parameters=YARN | MSCALE), "llama"),
    "llama, gelu": ("llama", dict(hidden_act="gelu"), "llama"),
    "mistral": ("mistral", dict(sliding_window=None), "llama"),
    "mistral, window": ("mistral", WINDOW, "mistral"),
    "mistral, odd width": (
        "mistral",
        dict(hidden_size=36, num_attention_heads=8, head_dim=4, sliding_window=None),
        "mistral",
    ),
    "ministral": (
        "ministral",
        dict(head_dim=8, layer_types=SOME_SLIDE) | WINDOW,
        "ministral",
    ),
    "ministral, all slide": ("ministral", dict(head_dim=8) | WINDOW, "mistral"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True), "qwen2"),
    "qwen2, window": ("qwen2", SWITCHED | dict(max_window_layers=1), "qwen2"),
    "qwen3": ("qwen3", dict(head_dim=16), "qwen3"),
    "qwen3, biases": ("qwen3", dict(attention_bias=True, head_dim=8), "qwen3"),
    "qwen3, window": (
        "qwen3",
        SWITCHED | dict(head_dim=8, layer_types=SOME_SLIDE),
        "qwen3",
    ),
    "seed_oss": ("seed_oss", dict(head_dim=8), "qwen2"),
    "seed_oss, out bias": (
        "seed_oss",
        dict(head_dim=8, attention_bias=False, attention_out_bias=True),
        "seed_oss",
    ),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2), "smollm3"),
    "smollm3, rope everywhere": ("smollm3", dict(no_rope_layers=[1, 1, 1]), "llama"),
    "smollm3, window": (
        "smollm3",
        SWITCHED | dict(no_rope_layers=[1, 0, 1], attention_bias=True),
        "smollm3",
    ),
    "phi3": ("phi3", {}, "llama"),
    "phi3, window": ("phi3", WINDOW, "mistral"),
    "granite": ("granite", GRANITE, "llama"),
    "granite, tied, biases": (
        "granite",
        GRANITE | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        "llama",
    ),
    "gemma": ("gemma", dict(head_dim=16, tie_word_embeddings=True), "llama"),
}
# Their options are in other cases, too: in `make test-slow`.
SLOW = {
    "llama, wide heads",
    "llama, one kv head",
    "llama, yarn",
    "mistral",
    "ministral, all slide",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "smollm3, rope everywhere",
    "phi3",
    "granite",
}
T = 40


def logits_of(loaded, ids_BT):
    """Our logits [B, T, V] of rows without padding."""
    model, mesh = loaded.config.model, loaded.mesh
    B, T = ids_BT.shape
    cache = empty_cache(model, mesh, B, T)
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    forward = make_forward(model, mesh)
    return np.asarray(
        forward(loaded.model, ids_BT.astype(np.int32), positions_BT, cache)[0]
    )


def random_ids(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape)


def packed_logits(loaded, ids_BT, segments_BT, positions_BT):
    """Our logits of rows that hold several documents."""
    from jax.sharding import PartitionSpec as P

    from ladder_jax import model as models

    config = loaded.config.model

    def local(model, ids, positions, segments):
        x, _ = models.hidden(model, config, ids, positions, segments)
        return models.logits(model, config, x)

    specs = sharding.parameter_specs(models.abstract(config))
    tokens = (P(), P(), P())
    f = sharding.shard_map(local, loaded.mesh, (specs, *tokens), sharding.LOGITS)
    arrays = (x.astype(np.int32) for x in (ids_BT, positions_BT, segments_BT))
    return np.asarray(jax.jit(f)(loaded.model, *arrays))


@pytest.mark.parametrize(
    "kind, fields, exported",
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, case in CASES.items()
    ],
)
def test_numbers_tokens_and_the_way_back(tmp_path, kind, fields, exported):
    theirs = foreign.write(tmp_path / "model", kind, **fields)
    ours = ladder_jax.load_hf(tmp_path / "model")
    ids_BT = random_ids((2, T))
    expected = foreign.logits_of(theirs, ids_BT)
    scale = max(expected.std(), 1.0)
    np.testing.assert_allclose(
        logits_of(ours, ids_BT), expected, rtol=0, atol=2e-5 * scale
    )
    # Packed: a row of two documents has the logits of both alone.
    cut = 15
    segments = np.repeat([[0] * cut + [1] * (T - cut)], 2, 0)
    positions = np.repeat([[*range(cut), *range(T - cut)]], 2, 0)
    packed = packed_logits(ours, ids_BT, segments, positions)
    alone = [foreign.logits_of(theirs, x) for x in (ids_BT[:, :cut], ids_BT[:, cut:])]
    np.testing.assert_allclose(
        packed, np.concatenate(alone, 1), rtol=0, atol=2e-5 * scale
    )
    # Greedy tokens, through the cache.
    ids = [int(x) for x in ids_BT[0, :9]]
    ends = dict(eos_token_id=None, pad_token_id=0)
    tokens = theirs.generate(
        input_ids=jax_to_torch([ids]),
        attention_mask=jax_to_torch([[1] * len(ids)]),
        max_new_tokens=24,
        do_sample=False,
        **ends,
    )[0, len(ids) :].tolist()
    mine = generate(
        ours.model, ours.config.model, ours.mesh, ids, max_tokens=24, vocabulary=288
    )
    assert [int(x) for x in mine] == tokens
    # Export: the class, its numbers, and the same parameters when imported again.
    out = ladder_jax.save_hf(ours, tmp_path / "out")
    written = foreign.load(out)
    assert written.config.model_type == exported
    np.testing.assert_allclose(
        foreign.logits_of(written, ids_BT), expected, rtol=0, atol=2e-5 * scale
    )
    again = ladder_jax.load_hf(out)
    assert again.config.model == ours.config.model
    for a, b in zip(jax.tree.leaves(ours.model), jax.tree.leaves(again.model)):
        assert np.array_equal(a, b)


def jax_to_torch(values):
    import torch

    return torch.tensor(values)


@pytest.mark.parametrize("residual", ["ladder", "hybrid:last1", "ladder:1,2"])
@pytest.mark.parametrize("name", ["llama", "qwen3, window", "smollm3"])
def test_other_schedules_run_in_their_own_class(tmp_path, name, residual):
    kind, fields, _ = CASES[name]
    foreign.write(tmp_path / "model", kind, **fields)
    ours = ladder_jax.load_hf(tmp_path / "model", residual=residual)
    out = ladder_jax.save_hf(ours, tmp_path / "out")
    theirs = foreign.load(out, trust_remote_code=True)
    assert theirs.config.model_type == "ladder_llama"
    ids_BT = random_ids((2, T))
    expected = foreign.logits_of(theirs, ids_BT)
    np.testing.assert_allclose(logits_of(ours, ids_BT), expected, rtol=0, atol=2e-5)
    assert ladder_jax.load_hf(out).config.model == ours.config.model


@pytest.mark.parametrize("kind", [k for k in FAMILIES if "adder" not in k])
def test_defaults_are_those_of_transformers(kind):
    """A config.json with the sizes alone means the same here and there."""
    sizes = dict(vocab_size=512, hidden_size=4096, intermediate_size=64)
    sizes |= dict(num_hidden_layers=4, num_attention_heads=32)
    theirs = transformers.AutoConfig.for_model(kind, **sizes).to_dict()
    model = read_config(sizes | dict(model_type=kind)).model
    head_dim = theirs.get("head_dim") or 4096 // 32
    assert (model.kv_heads, model.head_dim) == (
        theirs["num_key_value_heads"],
        head_dim,
    )
    assert model.max_length == theirs["max_position_embeddings"]
    assert model.norm_eps == theirs["rms_norm_eps"]
    assert model.rope_theta == theirs["rope_parameters"]["rope_theta"]
    assert model.tie_embeddings == theirs["tie_word_embeddings"]
    assert model.activation == theirs["hidden_act"]
    assert model.sliding_window == theirs.get("sliding_window")
    bias = theirs.get("attention_bias", kind == "qwen2")
    assert model.qkv_bias == bias
    # What transformers writes about the same model means the same, too.
    assert read_config(theirs).model == model


def test_bfloat16_files_and_their_old_rope_keys(tmp_path):
    theirs = foreign.write(
        tmp_path / "model", "llama", bfloat16=True, rope_parameters=LLAMA3
    )
    ids_BT = random_ids((2, T))
    expected = foreign.logits_of(theirs, ids_BT)
    old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    for fields in (
        {},
        dict(rope_parameters="absent", rope_theta=5e5, rope_scaling=old),
        dict(rope_theta=5e5, rope_scaling=old),
    ):
        foreign.change_config(tmp_path / "model", **fields)
        ours = ladder_jax.load_hf(tmp_path / "model", compute_dtype="float32")
        np.testing.assert_allclose(logits_of(ours, ids_BT), expected, rtol=0, atol=2e-5)


def test_the_padded_vocabulary_is_kept_and_never_drawn(tmp_path):
    foreign.write(tmp_path / "model", "llama", vocab_size=320)
    ours = ladder_jax.load_hf(tmp_path / "model")
    assert ours.config.model.vocab_size == 320 and ours.tokenizer.size == 259
    mine = generate(
        ours.model,
        ours.config.model,
        ours.mesh,
        [1, 2],
        max_tokens=40,
        vocabulary=ours.tokenizer.size,
        temperature=5.0,
    )
    assert max(int(x) for x in mine) < 259
    out = ladder_jax.save_hf(ours, tmp_path / "out")
    assert foreign.load(out).config.vocab_size == 320


TEXTS = [
    "",
    "Hello, world",
    " two  spaces",
    "naïve 東京 🙂",
    "<s>a</s><|im_end|>",
    "a\nb",
]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_auto_tokenizer_encodes_the_exported_folder_alike(tmp_path, bos, add_bos):
    folder = tmp_path / "model"
    foreign.write(folder, "llama")
    foreign.write_tokenizer(folder, bos)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if add_bos is not None and bos:
        settings["add_bos_token"] = add_bos
    path.write_text(json.dumps(settings))
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    before = transformers.AutoTokenizer.from_pretrained(folder)
    ours = ladder_jax.load_hf(folder)
    out = ladder_jax.save_hf(ours, tmp_path / "out")
    after = transformers.AutoTokenizer.from_pretrained(out)
    for text in filter(None, TEXTS):  # a prompt of ours has at least one id
        ids = before(text, add_special_tokens=False).input_ids
        # The plain class of transformers ignores add_bos_token: export says it in
        # tokenizer.json.
        starts = [ours.tokenizer.bos] if bos and add_bos else []
        assert after(text).input_ids == starts + ids
        # Ours adds no second bos.
        assert ours.tokenizer.prompt(text) == (
            ids if ids[:1] == [ours.tokenizer.bos] else starts + ids
        )
    messages = [dict(role="user", content="Hi")]
    assert after.apply_chat_template(messages, tokenize=False) == "Hi<|im_end|>"
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token)


def test_end_ids_reach_generate_of_transformers(tmp_path):
    folder = tmp_path / "model"
    foreign.write(folder, "llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    ours = ladder_jax.load_hf(folder)
    assert ours.tokenizer.eos_ids == (257, 258)
    theirs = foreign.load(ladder_jax.save_hf(ours, tmp_path / "out"))
    assert theirs.generation_config.eos_token_id == [257, 258]


def test_sharded_files_load_there_and_here(tmp_path):
    theirs = foreign.write(tmp_path / "model", "llama", num_hidden_layers=2)
    sharded = tmp_path / "sharded"
    theirs.save_pretrained(sharded, max_shard_size="20kB")
    foreign.write_tokenizer(sharded)
    ours = ladder_jax.load_hf(sharded)
    out = ladder_jax.save_hf(ours, tmp_path / "out", shard_size="20kB")
    assert len(list(out.glob("*.safetensors"))) > 2
    ids_BT = random_ids((1, T))
    for model in (theirs, foreign.load(out)):
        np.testing.assert_allclose(
            foreign.logits_of(model, ids_BT), logits_of(ours, ids_BT), rtol=0, atol=2e-5
        )


def test_padding_on_the_left_there_is_no_padding_here(tmp_path):
    theirs = foreign.write(tmp_path / "model", "qwen3", head_dim=8)
    ours = ladder_jax.load_hf(tmp_path / "model")
    ids_BT = random_ids((1, 12))
    padded = np.concatenate([np.zeros((1, 5), int), ids_BT], 1)
    mask = np.concatenate([np.zeros((1, 5)), np.ones((1, 12))], 1)
    expected = foreign.logits_of(theirs, padded, mask)[:, 5:]
    np.testing.assert_allclose(logits_of(ours, ids_BT), expected, rtol=0, atol=2e-5)


def test_a_mesh_gives_the_same_logits(tmp_path):
    theirs = foreign.write(tmp_path / "model", "granite", **GRANITE)
    mesh = ladder_jax.config.Mesh(data=1, fsdp=2, tensor=2)
    ours = ladder_jax.load_hf(tmp_path / "model", mesh=mesh)
    one = dataclasses.asdict(ladder_jax.load_hf(tmp_path / "model").config.model)
    assert dataclasses.asdict(ours.config.model) == one
    ids_BT = random_ids((2, T))
    expected = foreign.logits_of(theirs, ids_BT)
    np.testing.assert_allclose(logits_of(ours, ids_BT), expected, rtol=0, atol=2e-5)
