"""Configuration: a mistake is one line that names the field, its value and what is
accepted; JSON preserves every field.
"""

import dataclasses
import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.config import (
    Config,
    ConfigError,
    Data,
    Mesh,
    Model,
    Optimizer,
    RopeScaling,
    Train,
    from_dict,
    require,
    to_dict,
)

SECTIONS = [RopeScaling, Model, Mesh, Data, Optimizer, Train]
FIELDS = [
    (section, field.name)
    for section in SECTIONS
    for field in dataclasses.fields(section)
]
HINTS = {
    (section, name): typing.get_type_hints(section)[name] for section, name in FIELDS
}


def mistake(make):
    """The message of the ConfigError that `make` raises: one line."""
    with pytest.raises(ConfigError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


WRONG = {  # fields of a section that cannot be -> what the message says
    RopeScaling: [
        (dict(factor=0.0), "factor=0.0", "greater than 0"),
        (dict(low_freq_factor=-1.0), "low_freq_factor=-1.0", "greater than 0"),
        (dict(original_length=0), "original_length=0", "greater than 0"),
        (dict(kind="ntk"), "kind='ntk'", "one of 'llama3', 'linear', 'yarn'"),
        (dict(beta_slow=0.0), "beta_slow=0.0", "greater than 0"),
        (dict(beta_fast=0.5), "beta_fast=0.5", "at least as large as beta_slow"),
        (dict(attention_factor=0.0), "attention_factor=0.0", "greater than 0, or None"),
        (dict(mscale=-1.0), "mscale=-1.0", "greater than 0, or None"),
        (
            dict(high_freq_factor=1.0),
            "high_freq_factor=1.0",
            "greater than low_freq_factor",
        ),
    ],
    Model: [
        *(
            (({name: 0}), f"{name}=0", "greater than 0")
            for name in (
                "vocab_size",
                "dim",
                "layers",
                "heads",
                "kv_heads",
                "head_dim",
                "ffn_dim",
                "max_length",
                "rope_theta",
                "norm_eps",
                "init_std",
            )
        ),
        (dict(heads=12, kv_heads=8), "kv_heads=8", "a divisor of model.heads=12"),
        (dict(head_dim=33), "head_dim=33", "even, for rotary embedding"),
        (dict(activation="relu"), "activation='relu'", "one of 'silu', 'gelu'"),
        (dict(dtype="float16"), "dtype='float16'", "one of 'float32', 'bfloat16'"),
        (
            dict(residual="ladders"),
            "residual='ladders'",
            "standard, ladder, ladder:A,M",
        ),
        (
            dict(residual="hybrid:last5"),
            "residual='hybrid:last5'",
            "more than the 4 layers",
        ),
        (
            dict(residual="delays:0,1"),
            "residual='delays:0,1'",
            "4 layers have 8 blocks",
        ),
        (dict(layers=10_001), "layers=10001", "at most 10000"),
        (dict(sliding_window=0), "sliding_window=0", "greater than 0, or None"),
        (
            dict(sliding_window=4, window_layers="1,4"),
            "window_layers='1,4'",
            "layers run from 0 to 3",
        ),
        (
            dict(sliding_window=4, window_layers="0-99999999999"),
            "window_layers='0-99999999999'",
            "layers run from 0 to 3",
        ),
        (
            dict(sliding_window=4, window_layers="some"),
            "window_layers='some'",
            "all, none, lastK or layers such as 0,2,5-9",
        ),
        (
            dict(window_layers="1"),
            "window_layers='1'",
            "all, unless model.sliding_window is given",
        ),
        (
            dict(rope_theta=0.5, rope_scaling=RopeScaling(kind="yarn", factor=2.0)),
            "rope_theta=0.5",
            "greater than 1 with yarn",
        ),
        (dict(nope_layers="4"), "nope_layers='4'", "layers run from 0 to 3"),
    ],
    Mesh: [
        (dict(data=0), "data=0", "greater than 0, or -1 for the rest"),
        (dict(fsdp=-2), "fsdp=-2", "greater than 0, or -1 for the rest"),
        (dict(data=-1, tensor=-1), "tensor=-1", "given, where mesh.data is -1"),
        (dict(data=2, fsdp=-1, tensor=-1), "tensor=-1", "given, where mesh.fsdp is -1"),
    ],
    Data: [
        *(
            (({name: ""}), f"{name}=''", "non-empty")
            for name in ("source", "text_field", "tokenizer", "token_cache")
        ),
        (dict(held_out_fraction=0.0), "held_out_fraction=0.0", "between 0 and 1"),
        (dict(held_out_fraction=1.0), "held_out_fraction=1.0", "between 0 and 1"),
    ],
    Optimizer: [
        (dict(learning_rate=0.0), "learning_rate=0.0", "greater than 0"),
        (dict(learning_rate=float("nan")), "learning_rate=nan", "a finite number"),
        (dict(eps=0.0), "eps=0.0", "greater than 0"),
        (
            dict(lr_schedule="linear"),
            "lr_schedule='linear'",
            "one of 'cosine', 'wsd', 'constant'",
        ),
        (dict(warmup_steps=-1), "warmup_steps=-1", "0 or more"),
        (dict(weight_decay=-0.1), "weight_decay=-0.1", "0 or more"),
        (dict(beta1=1.0), "beta1=1.0", "from 0 to below 1"),
        (dict(beta2=-0.1), "beta2=-0.1", "from 0 to below 1"),
        (dict(final_lr_fraction=1.5), "final_lr_fraction=1.5", "from 0 to 1"),
        (dict(decay_steps=0), "decay_steps=0", "greater than 0"),
        (
            dict(clip_norm=0.0),
            "clip_norm=0.0",
            "greater than 0, or None for no clipping",
        ),
    ],
    Train: [
        *(
            (({name: 0}), f"{name}=0", "greater than 0")
            for name in (
                "steps",
                "global_batch",
                "seq_len",
                "grad_accum_steps",
                "log_every",
                "eval_every",
                "eval_batches",
                "save_every",
                "keep_checkpoints",
            )
        ),
        *(
            (({name: -1}), f"{name}=-1", "0 or more")
            for name in ("loss_chunk", "profile_steps", "sample_tokens")
        ),
        (dict(seed=-1), "seed=-1", "from 0 to 2 ** 32 - 1"),
        (dict(work_dir="gs://bucket/run"), "work_dir='gs://bucket/run'", "a folder"),
        (dict(out=""), "out=''", "a folder"),
        (
            dict(global_batch=8, grad_accum_steps=3),
            "grad_accum_steps=3",
            "a divisor of train.global_batch=8",
        ),
        (
            dict(remat="some"),
            "remat='some'",
            "one of 'none', 'dots', 'reductions', 'full'",
        ),
        (dict(peak_tflops=0.0), "peak_tflops=0.0", "greater than 0"),
    ],
}


@pytest.mark.parametrize(
    "section, fields, value, accepted",
    [
        pytest.param(section, *case, id=f"{section.section}.{case[1]}")
        for section in SECTIONS
        for case in WRONG[section]
    ],
)
def test_a_value_out_of_range_is_refused(section, fields, value, accepted):
    message = mistake(lambda: section(**fields))
    assert (
        message.startswith(f"{section.section}.{value} is not accepted: ")
        and accepted in message
    )


@pytest.mark.parametrize("section, name", FIELDS)
def test_a_wrong_type_is_refused(section, name):
    """Text is no number, a bool is no number, and a number is no text."""
    hint = HINTS[section, name]
    kinds = {hint, *typing.get_args(hint)}
    wrong = [[1], {}, object]
    wrong += [] if str in kinds else ["3"]
    wrong += [] if bool in kinds else [True]
    wrong += [] if kinds & {int, float} else [3]
    wrong += [] if float in kinds else [3.0]
    wrong += [] if type(None) in kinds else [None]
    for value in wrong:
        message = mistake(lambda value=value: section(**{name: value}))
        assert message.startswith(
            f"{section.section}.{name}={value!r} is not accepted: it must be "
        )


@pytest.mark.parametrize(
    "section, name", [key for key in FIELDS if HINTS[key] in (int, int | None)]
)
def test_a_whole_number_that_no_computer_counts_to_is_refused(section, name):
    """JAX would fail late, some with a traceback."""
    message = mistake(lambda: section(**{name: 10**20}))
    assert f"{name}={10**20} is not accepted: it must be " in message


def test_a_whole_number_is_accepted_where_a_float_is():
    assert Optimizer(learning_rate=1, clip_norm=1).learning_rate == 1


@pytest.mark.parametrize(
    "make, start",
    [
        (lambda: Config(model=3), "model=3 is not accepted: it must be Model"),
        (lambda: Config(train=Model()), "train=Model("),
        (
            lambda: Model(rope_scaling=8.0),
            "model.rope_scaling=8.0 is not accepted: it must be RopeScaling",
        ),
        (
            lambda: Config(train=Train(seq_len=4096)),
            "train.seq_len=4096 is not accepted: it must be at most "
            "model.max_length=2048",
        ),
    ],
)
def test_sections_of_a_wrong_type_or_that_contradict_each_other_are_refused(
    make, start
):
    assert mistake(make).startswith(start)


EVERY_KIND = Config(
    model=Model(
        rope_scaling=RopeScaling(factor=4.0, original_length=4096),
        residual="hybrid:1,2",
        tie_embeddings=True,
    ),
    data=Data(source="data/*.parquet", held_out_fraction=0.1),
    mesh=Mesh(data=1, fsdp=-1, tensor=2),
    optimizer=Optimizer(lr_schedule="wsd", decay_steps=10, clip_norm=None),
    train=Train(peak_tflops=989.0, seed=3),
)


@pytest.mark.parametrize("config", [Config(), EVERY_KIND])
def test_a_config_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict({}) == Config()  # what is not said is the default


@pytest.mark.parametrize(
    "values, start",
    [
        (
            dict(modle={}),
            "modle is not a field: it must be one of data, distill, mesh, model, "
            "optimizer, train (perhaps model)",
        ),
        (dict(model=dict(layer=3)), "model.layer is not a field: it must be one of "),
        (
            dict(model=dict(rope_scaling=dict(by=3))),
            "model.rope_scaling.by is not a field: it must be one of attention",
        ),
        (dict(mesh=None), "mesh=None is not accepted: it must be Mesh"),
        (
            dict(train=dict(steps="9")),
            "train.steps='9' is not accepted: it must be a whole number",
        ),
        (
            dict(model=dict(rope_scaling=dict(factor=0))),
            "model.rope_scaling.factor=0 is not accepted",
        ),
    ],
)
def test_json_that_is_no_config_is_refused(values, start):
    assert mistake(lambda: from_dict(values)).startswith(start)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9000),
    st.floats(),
    st.text(),
    st.lists(st.integers()),
    st.sampled_from(
        ["ladder", "parallel", "desync:2", "ladder:1,2", "hybrid:last2", "wsd", "full"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(where=st.sampled_from(FIELDS), value=values)
def test_any_value_is_accepted_unchanged_or_refused_in_one_line(where, value):
    section, name = where
    try:
        built = section(**{name: value})
    except ConfigError as error:
        assert name in str(error) and len(str(error).splitlines()) == 1
        return
    assert getattr(built, name) is value
    assert from_dict(json.loads(json.dumps(to_dict(built))), section) == built


@pytest.mark.parametrize(
    "value",
    [10**400, 10**5000, "x" * 400, [7] * 400],
    ids=["an integer", "an integer without a repr", "text", "a list"],
)
def test_a_message_cuts_a_long_value(value):
    with pytest.raises(ConfigError) as caught:
        require(False, "name", value, "short")
    message = str(caught.value)
    assert message.startswith("name=") and len(message) < 120, message
    assert message.endswith(" is not accepted: it must be short"), message


def test_a_config_cannot_be_changed_and_a_changed_copy_is_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.dim = 3
    assert "model.heads=7" in mistake(
        lambda: dataclasses.replace(Model(kv_heads=4), heads=7)
    )
