"""The exported modeling file under `generate`: transformers' own tests of generation,
written again, as its wheel does not ship them (tests/generation/test_utils.py).
"""

import exported
import numpy as np
import pytest
import torch
from transformers import pipeline
from transformers.cache_utils import StaticCache

RESIDUALS = ["ladder", "hybrid:last1", "ladder:2,1", "parallel"]
# Greedy choices are equal between two ways of computing where no two logits are equal.
GREEDY = dict(do_sample=False, max_new_tokens=10, min_new_tokens=10)


@pytest.fixture(scope="module", params=RESIDUALS)
def folder(request, tmp_path_factory):
    made = exported.make(request.param, qk_norm=request.param == "ladder")
    return exported.write(tmp_path_factory.mktemp("m"), *made)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, folder):
    return exported.load(folder, attn_implementation=request.param)


def prompt(B=2, T=9, seed=0):
    ids = np.random.default_rng(seed).integers(3, 97, (B, T))
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.ones(B, T, dtype=torch.long),
    }


@torch.no_grad()
def test_prefill_and_decode_equal_one_forward_pass(model):
    ids = prompt(T=24)["input_ids"]
    expected = model(ids).logits
    cache, found = None, []
    for start, stop in (
        (0, 10),
        (10, 11),
        (11, 15),
        *((i, i + 1) for i in range(15, 24)),
    ):
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-5)
    last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, expected[:, -2:], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padding_does_not_matter(model):
    short, long = prompt(1, 5)["input_ids"], prompt(1, 9, seed=1)["input_ids"]
    ids = torch.cat([torch.nn.functional.pad(short, (4, 0)), long])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for extra in ({}, {"position_ids": positions}):
        found = model(ids, attention_mask=mask, **extra).logits
        for row, alone in zip((found[:1, 4:], found[1:]), (short, long)):
            expected = model(alone).logits
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-5)
    both = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, alone in ((both[:1, 4:], short), (both[1:], long)):
        mask = torch.ones_like(alone)
        assert torch.equal(model.generate(alone, attention_mask=mask, **GREEDY), row)


def test_the_cache_does_not_change_the_text(model):
    for options in (
        GREEDY,
        dict(GREEDY, num_beams=3),
        dict(GREEDY, do_sample=True, top_k=5),
    ):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(model.generate(**prompt(), **options, use_cache=use_cache))
        assert texts[0].shape == (2, 19)
        assert torch.equal(*texts), options


def test_greedy_is_the_argmax_of_the_forward_pass(model):
    given = prompt()
    output = model.generate(
        **given,
        **GREEDY,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    sequences = output.sequences
    with torch.no_grad():
        logits = model(sequences).logits
    new = torch.stack(output.logits, 1)
    torch.testing.assert_close(new, logits[:, 8:-1], atol=2e-5, rtol=1e-5)
    assert len(output.scores) == 10 and output.scores[0].shape == (2, 97)
    scores = torch.stack(output.scores, 1)
    assert torch.equal(scores.argmax(-1), sequences[:, 9:])
    # The embedding and each layer's stream, of the prompt and then of one token a step.
    assert [len(states) for states in output.hidden_states] == [4] * 10
    assert output.hidden_states[0][3].shape == (2, 9, 32)
    assert output.hidden_states[1][3].shape == (2, 1, 32)
    assert output.past_key_values.get_seq_length() == 18


def test_attention_weights(folder):
    model = exported.load(folder, attn_implementation="eager")
    with torch.no_grad():
        output = model(**prompt(), output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 3 and len(output.hidden_states) == 4
    for weights in output.attentions:
        assert weights.shape == (2, 4, 9, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
        assert not weights.triu(1).any()
    final = model.model(**prompt()).last_hidden_state
    torch.testing.assert_close(output.hidden_states[-1], final)
    as_tuple = model(**prompt(), return_dict=False, use_cache=False)
    torch.testing.assert_close(as_tuple[0], output.logits)


def test_beam_search_finds_no_worse_text_than_greedy(model):
    def log_probability(sequence):
        with torch.no_grad():
            logp = model(sequence[None]).logits[0, 8:-1].log_softmax(-1)
        return logp.gather(-1, sequence[9:, None]).sum()

    given = prompt(1)
    greedy = model.generate(**given, **GREEDY)[0]
    beams = model.generate(
        **given,
        **GREEDY,
        num_beams=4,
        num_return_sequences=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    best, second = beams.sequences
    assert log_probability(best) >= log_probability(greedy) - 1e-4
    assert log_probability(best) >= log_probability(second) - 1e-4
    expected = torch.stack([log_probability(s) for s in beams.sequences])
    torch.testing.assert_close(beams.sequences_scores, expected, atol=1e-3, rtol=1e-4)


def test_sampling(model):
    torch.manual_seed(0)
    options = dict(do_sample=True, max_new_tokens=5, num_return_sequences=3, top_p=0.9)
    found = model.generate(**prompt(), **options)
    assert found.shape[0] == 6 and found.shape[1] <= 14
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(**prompt(), **options))


def test_continue_from_a_cache(model):
    given = prompt()
    whole = model.generate(**given, **GREEDY)
    options = dict(do_sample=False, return_dict_in_generate=True)
    first = model.generate(**given, **options, max_new_tokens=4, min_new_tokens=4)
    second = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
    )
    assert torch.equal(whole, second)


def test_assisted_decoding_gives_the_greedy_text(model, folder):
    given = prompt(1)
    greedy = model.generate(**given, **GREEDY)
    assistant = exported.load(folder)
    with torch.no_grad():  # a poor assistant: some of its tokens are rejected
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    assert torch.equal(
        greedy, model.generate(**given, **GREEDY, assistant_model=assistant)
    )
    assert torch.equal(
        greedy, model.generate(**given, **GREEDY, prompt_lookup_num_tokens=3)
    )


def test_from_embeddings(model):
    given = prompt()
    embeddings = model.get_input_embeddings()(given["input_ids"])
    mask = given["attention_mask"]
    text = model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert torch.equal(text, model.generate(**given, **GREEDY)[:, 9:])
    with pytest.raises(ValueError, match="not both"):
        model(inputs_embeds=embeddings, **given)
    with pytest.raises(ValueError, match="not both"):
        model()


@torch.no_grad()
def test_a_static_cache(model):
    ids = prompt(T=12)["input_ids"]
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=20)
    found = [model(ids[:, :7], past_key_values=cache, use_cache=True).logits]
    for i in range(7, 12):
        step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-5)


def test_stops_at_its_end_token(model):
    given = prompt(1)
    text = model.generate(**given, **GREEDY)[0, 9:].tolist()
    end = text[3]
    options = dict(do_sample=False, max_new_tokens=10, eos_token_id=[96, end])
    stopped = model.generate(**given, **options, pad_token_id=0)[0, 9:].tolist()
    assert stopped == text[: text.index(end) + 1]


def test_resized_embeddings_and_deep_copies(folder):
    model = exported.load(folder)
    before = model(**prompt()).logits
    model.resize_token_embeddings(101)
    assert model.config.vocab_size == 101
    after = model(**prompt()).logits
    assert after.shape[-1] == 101
    torch.testing.assert_close(after[..., :97], before)


def test_a_pipeline(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    pipe = pipeline("text-generation", model=exported.load(folder), tokenizer=fast)
    text = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7w")
