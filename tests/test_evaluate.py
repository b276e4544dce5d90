"""Perplexity against the plain computation on full logits."""

import math

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pyprune import evaluate
from pyprune.errors import UserError
from pyprune.evaluate import perplexity, text_ids

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": COMMON,
    "gemma2": {**COMMON, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "granite": {**COMMON, "logits_scaling": 3.0},
    "mixtral": {**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1},
    "opt": {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 8},
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
    },
    "gpt_neox": COMMON,
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2,
               "num_attention_heads": 2, "max_position_embeddings": 64},
    "phi": COMMON,
    "llama4_text": {**COMMON, "num_local_experts": 2, "intermediate_size_mlp": 24},
}  # fmt: skip


def tiny(family: str = "llama"):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # sharper than the initialisation, so that predictions differ
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


IDS = torch.randint(3, VOCABULARY, (100,), generator=torch.Generator().manual_seed(1))


def naive(model, windows: list[list[int]], scored: list[int]) -> list[float]:
    """Summed losses of the last `scored` tokens of each window, one window at a time."""
    sums = []
    for window, count in zip(windows, scored, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0].double()
        log_p = logits.log_softmax(-1)
        terms = [-log_p[t - 1, window[t]].item() for t in range(1, len(window))]
        sums.append(sum(terms[-count:]))
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_full_logits(family, monkeypatch):
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 4 * VOCABULARY * 2 * 7)  # chunks of 7 positions
    model = tiny(family)
    result = perplexity(model, IDS, text="ids", seqlen=24, batch_size=2)
    windows = [IDS[i : i + 24].tolist() for i in (0, 24, 48, 72)]
    sums = naive(model, windows, [23] * 4)
    assert result.nll == pytest.approx(sum(sums) / 92, rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(sum(sums) / 92), rel=1e-5)
    assert result.window_nll == pytest.approx(result.nll, rel=1e-12)
    assert (result.tokens, result.windows, result.stride, result.bos) == (92, 4, 24, False)


def test_logits_are_chunked(monkeypatch):
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 4 * VOCABULARY * 2 * 7)
    model = tiny()
    sizes = []
    model.lm_head.register_forward_hook(lambda _m, _i, logits: sizes.append(logits.shape[:2]))
    together = []  # of rows that lie apart PyTorch's bf16 product may take 150 times as long
    model.lm_head.register_forward_pre_hook(lambda _m, x: together.append(x[0].is_contiguous()))
    blocks = []
    model.model.layers[0].register_forward_hook(lambda *_: blocks.append(1))
    perplexity(model, IDS, seqlen=24, batch_size=2)
    assert sizes == [(2, 7), (2, 7), (2, 7), (2, 2)] * 2
    assert all(together)
    assert len(blocks) == 2  # the decoder itself ran once a batch


@pytest.mark.parametrize("stride", [5, 10, 23])
def test_stride_scores_each_token_once(stride):
    model = tiny()
    result = perplexity(model, IDS, seqlen=24, stride=stride)
    starts = list(range(0, 100 - 24 + 1, stride))
    scored = [23] + [stride] * (len(starts) - 1)
    sums = naive(model, [IDS[i : i + 24].tolist() for i in starts], scored)
    assert result.tokens == sum(scored) == starts[-1] + 23
    assert result.nll == pytest.approx(sum(sums) / sum(scored), rel=1e-5)
    means = [s / c for s, c in zip(sums, scored, strict=True)]
    assert result.window_nll == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert f"stride {stride}" in result.protocol


def test_a_window_is_no_longer_than_the_model_unless_asked():
    ids = IDS.repeat(2)
    assert perplexity(tiny(), ids).seqlen == 64
    assert perplexity(tiny(), ids).nll == perplexity(tiny(), ids, seqlen=64).nll
    assert perplexity(tiny("bloom"), IDS.repeat(11)).seqlen == evaluate.DEFAULT_SEQLEN
    with pytest.raises(UserError, match="stride: expected 1 to seqlen = 64, got 65"):
        perplexity(tiny(), ids, stride=65)


def test_bos_takes_one_place_and_every_text_token_is_scored():
    model = tiny()
    result = perplexity(model, IDS, seqlen=24, bos=True, bos_token_id=1)
    windows = [[1, *IDS[i : i + 23].tolist()] for i in (0, 23, 46, 69)]
    assert result.nll == pytest.approx(sum(naive(model, windows, [23] * 4)) / 92, rel=1e-5)
    assert (result.bos, result.windows, result.stride) == (True, 4, 24)
    assert "no BOS" not in result.protocol


def test_result_does_not_depend_on_batch_or_chunk(monkeypatch):
    model = tiny()
    first = perplexity(model, IDS, seqlen=16)
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 1)
    assert perplexity(model, IDS, seqlen=16, batch_size=4).nll == pytest.approx(first.nll, rel=1e-6)


def test_model_is_left_as_it_was():
    model = tiny().train()
    own = model.model.forward = model.model.forward  # as a library that wraps forwards does
    perplexity(model, IDS, seqlen=16)
    assert model.training
    assert model.model.forward is own
    del model.model.forward
    perplexity(model, IDS, seqlen=16)
    assert "forward" not in model.model.__dict__


def test_reads_a_text_with_the_tokenizer(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\nthree")
    ids = text_ids(path, byte_tokenizer())
    assert byte_tokenizer().decode(ids) == "one\n\ntwo\n\nthree"
    assert torch.equal(text_ids(path, byte_tokenizer(), 5), ids[:5])
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["llama"](**{**COMMON, "vocab_size": 258})
    )
    result = perplexity(model, byte_tokenizer(), text=path, seqlen=8, bos=True)
    assert (result.text, result.windows, result.tokens) == (str(path), 2, 14)
    assert result.protocol.startswith(f"text {path}, 14 tokens scored in 2 windows of 8, BOS")


def test_text_is_tokenised_as_one_whatever_is_read(monkeypatch):
    """Reading in growing steps must give a prefix of the tokens of the whole text."""
    tokenizer = byte_tokenizer()
    whole = text_ids("sotu", tokenizer)
    monkeypatch.setattr(evaluate, "CHARACTERS_PER_TOKEN", 0.001)
    assert torch.equal(text_ids("sotu", tokenizer, 300_000), whole[:300_000])


def test_long_sources_are_not_read_to_the_end(monkeypatch):
    read = []

    def endless(_source, part):
        assert part == "evaluation"
        while True:
            read.append("x" * 100)
            yield read[-1]

    monkeypatch.setattr(evaluate, "documents", endless)
    assert len(text_ids("endless", byte_tokenizer(), 1000)) == 1000
    assert len(read) < 100


def test_progress_and_json():
    seen = []
    result = perplexity(
        tiny(), IDS, seqlen=16, batch_size=4, progress=lambda *done: seen.append(done)
    )
    assert seen == [(4, 6), (6, 6)]
    assert result.to_json()["ppl"] == result.ppl
    assert result.tokens_per_second > 0
    assert len(result.sha256) == 64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_logits_are_refused(value):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[:, 0] = value
    with pytest.raises(UserError, match="NaN or infinite logits in window 0"):
        perplexity(model, IDS, seqlen=16)
    assert not model.training


def test_tokens_that_the_model_does_not_have_are_refused():
    model = tiny()
    ids = IDS.clone()
    ids[5] = model.config.vocab_size
    with pytest.raises(UserError, match=r"text wiki: expected token ids in \[0, .*another model"):
        perplexity(model, ids, seqlen=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 101, "max_tokens": None}, "the model has 64 positions, got 101"),
        ({"seqlen": 1}, "seqlen: expected at least 2"),
        ({"seqlen": 8, "stride": 9}, "stride: expected 1 to seqlen = 8, got 9"),
        ({"seqlen": 8, "stride": 0}, "stride"),
        ({"seqlen": 8, "batch_size": 0}, "batch_size"),
        ({"seqlen": 8, "max_tokens": 0}, "max_tokens"),
        (
            {"seqlen": 8, "max_tokens": 7},
            "max_tokens: expected 8 or more, one window of the text, got 7",
        ),
        ({"seqlen": 8, "bos": True}, "expected a tokenizer with a BOS token"),
    ],
)
def test_bad_protocols(options, message):
    with pytest.raises(UserError, match=message):
        perplexity(tiny(), IDS, **options)


def test_decoder_that_the_model_does_not_call():
    model = tiny()
    model.get_decoder = lambda: tiny().model
    with pytest.raises(UserError, match=r"LlamaForCausalLM does not run the decoder"):
        perplexity(model, IDS, seqlen=8, batch_size=1)


def test_every_module_is_back_in_its_mode():
    for mode in (True, False):
        model = tiny().train(mode)
        model.model.layers[1].train(not mode)
        before = {name: module.training for name, module in model.named_modules()}
        seen = []
        model.model.layers[1].mlp.register_forward_hook(
            lambda m, *_, to=seen: to.append(m.training)
        )
        perplexity(model, IDS, seqlen=24)
        assert seen and not any(seen)
        assert {name: module.training for name, module in model.named_modules()} == before


def test_model_without_a_head():
    with pytest.raises(UserError, match=r"language-model head, got LlamaModel"):
        perplexity(tiny().model, IDS, seqlen=8)
