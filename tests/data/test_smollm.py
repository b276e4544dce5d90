"""The real packaged model and text (downloaded on first use)."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune import packaged
from pyprune.calibration.tokens import calibration_tokens
from pyprune.data import gguf_llama
from pyprune.evaluate import perplexity
from pyprune.packaged import packaged_documents, packaged_model_dir

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def directory():
    return packaged_model_dir()


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def digest(*parts: bytes) -> str:
    combined = hashlib.sha256()
    for part in parts:
        combined.update(part)
    return combined.hexdigest()


def test_weights_are_those_of_the_stock_conversion(directory):
    """The digest was taken after comparing every tensor bit for bit with what transformers makes of
    the same GGUF file."""
    with safe_open(directory / "model.safetensors", "np") as file:
        names = sorted(file.keys())
        found = digest(*(name.encode() + file.get_tensor(name).tobytes() for name in names))
    assert len(names) == 272
    assert found == "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"


def test_second_call_only_looks(directory, monkeypatch):
    """It neither downloads nor converts."""
    monkeypatch.delattr(packaged, "read_member")
    monkeypatch.delattr(gguf_llama, "write_hugging_face")
    told: list[str] = []
    assert packaged_model_dir(told.append) == directory
    assert told == []


def test_tokenizer(tokenizer):
    """Every digit is a token of its own, as in the published tokenizer; no BOS; text comes back."""
    text = "Hello world! It's 1234 in 2016.\n\n  Two  spaces; naïve 3.14\tTab"
    tokens = tokenizer.tokenize(text)
    assert tokens[:10] == ["Hello", "Ġworld", "!", "ĠIt", "'s", "Ġ", "1", "2", "3", "4"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("Hello").input_ids == [19556]
    assert tokenizer("<|im_start|>user").input_ids == [1, 4093]
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_wiki_text():
    assert [len(packaged_documents("wiki", part)) for part in ("calibration", "evaluation")] == [
        52,
        34,
    ]
    text = "\n\n".join(packaged_documents("wiki"))
    assert (
        digest(text.encode()) == "44ea854649782887cdf10abe91264e52ae933c1144935e22dcce8f2b147b91f5"
    )


def test_calibration_tokens_are_the_same_everywhere(tokenizer):
    tokens = calibration_tokens("wiki", tokenizer, nsamples=4, seqlen=256, seed=0, batch_size=4)
    assert tokens.tokens == 1024
    assert tokens.sha256 == "5eb5cd63155714710545281ee4337094a1423e064f53d2ab0d83c9215789c528"


def dense_perplexity(directory, tokenizer, text, windows):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    result = perplexity(model, tokenizer, text=text, seqlen=1024, max_tokens=windows * 1024)
    assert (result.windows, result.tokens, result.bos) == (windows, windows * 1023, False)
    return result.ppl


@pytest.mark.parametrize(("text", "expected"), [("wiki", 16.4192), ("sotu", 27.4383)])
def test_dense_perplexity_of_the_first_windows(directory, tokenizer, text, expected):
    """The rest are scored alike: eight give 15.7823 and 25.2454."""
    found = dense_perplexity(directory, tokenizer, text, windows=2)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_dense_perplexity(directory, tokenizer):
    """49,104 tokens of a text that needs no cleaning: the figure known from elsewhere."""
    assert round(dense_perplexity(directory, tokenizer, "sotu", windows=48), 2) == 22.49
