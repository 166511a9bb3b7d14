"""Read GGUF files: the same model and tokenizer as from a folder, and nothing of a file that is not what it says."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hecompile.checkpoint.formats import gguf_tensors
from hecompile.checkpoint.formats.gguf_header import GgufHeader
from hecompile.checkpoint.loading import answer_ends, load_configuration, load_model
from hecompile.cli.main import app
from hecompile.compiler.frontend import load_checkpoint
from hecompile.errors import InputError
from tests.support.gguf_files import Kind, gguf_name, interleaved, write_gguf
from tests.support.tiny import tiny_llama
from tests.support.training import make_tokenizer

TOKENS = torch.tensor([[1, 70, 80, 90]])
TURNED = "llama.rope.dimension_count"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in float32, not to be changed."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


def close(model: LlamaForCausalLM, reference: LlamaForCausalLM) -> None:
    """Compare weights exactly, and logits but for the norms' epsilon, which the file has in float32."""
    found, wanted = model.state_dict(), reference.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits, rtol=1e-4, atol=1e-4)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(str(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and "/tmp/hecompile-gguf" not in message
    return message


def test_a_file_is_the_model_and_the_tokenizer_of_the_folder(plain: Path, saved: Path) -> None:
    model, tokenizer = load_model(plain)
    reference, other = load_model(saved)
    close(model, reference)
    found, wanted = model.config.to_dict(), reference.config.to_dict()
    differing = {key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)}
    assert differing <= {"rms_norm_eps", "dtype"} and found["rms_norm_eps"] == pytest.approx(1e-6)
    assert tokenizer.get_vocab() == other.get_vocab()
    for text in ("ab", "Question: Who?\nÄ ", "x</s>y"):
        assert tokenizer(text)["input_ids"] == other(text)["input_ids"]
    assert tokenizer.decode([70, 71]) == other.decode([70, 71])
    assert answer_ends(model) == answer_ends(reference) == {2}


def test_quantised_weights_are_what_gguf_dequantises(tmp_path: Path) -> None:
    def kind(name: str) -> Kind:
        if "norm" in name:
            return Kind.F32
        if "down_proj" in name:  # 48 columns are no multiple of a block
            return Kind.F16
        return {"q": Kind.Q8_0, "k": Kind.Q4_0, "v": Kind.Q5_1, "o": Kind.BF16}.get(
            name.split("_proj")[0][-1], Kind.Q4_1
        )

    path = write_gguf(tmp_path / "quantised.gguf", tiny_llama(), kind)
    model, _ = load_model(path)
    heads = {"q_proj": 4, "k_proj": 2}
    for name, value in model.model.named_parameters():
        whole = f"model.{name}"
        array = tiny_llama().state_dict()[whole].numpy()
        count = heads.get(name.split(".")[-2], 0)
        ordered = interleaved(array, count) if count else array
        wanted = gguf.dequantize(gguf.quantize(ordered, kind(whole)), kind(whole))
        rows = np.arange(len(array))
        back = np.argsort(interleaved(rows[:, None], count)[:, 0]) if count else rows
        np.testing.assert_array_equal(value.detach().numpy(), wanted[back] if array.ndim == 2 else wanted)
    error = (model(TOKENS).logits - tiny_llama()(TOKENS).logits).std() / tiny_llama()(TOKENS).logits.std()
    assert 0 < error < 0.5  # it is another model: what was rounded away is gone


def test_a_head_of_its_own_and_more_rows_than_tokens(tmp_path: Path) -> None:
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "tie_word_embeddings": False, "vocab_size": 264})
    torch.manual_seed(5)
    reference = LlamaForCausalLM(config).eval()
    model, tokenizer = load_model(write_gguf(tmp_path / "untied.gguf", reference))
    assert model.config.tie_word_embeddings is False and len(tokenizer) == 259
    close(model, reference)


def test_the_end_of_a_turn_ends_an_answer_too(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "chat.gguf", tiny_llama(), keys={"tokenizer.ggml.eot_token_id": 9})
    assert answer_ends(load_model(path)[0]) == {2, 9}


def llama3(factor: float) -> LlamaForCausalLM:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "rope_parameters": rope, "head_dim": 32})
    torch.manual_seed(6)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaled_rotary_embedding_of_llama_3(tmp_path: Path, factor: float) -> None:
    """Reads the divisors that the converter writes in place of the settings."""
    reference = llama3(factor)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    divisors = plain / reference.model.rotary_emb.inv_freq
    keys = {"llama.attention.key_length": 32, "llama.attention.value_length": 32}
    path = write_gguf(tmp_path / "llama3.gguf", reference, keys=keys, tensors={"rope_freqs.weight": divisors})
    model, _ = load_model(path)
    assert model.config.rope_parameters == reference.config.rope_parameters
    close(model, reference)
    path = write_gguf(tmp_path / "other.gguf", reference, keys=keys, tensors={"rope_freqs.weight": divisors.flip(0)})
    assert "rope_freqs.weight scales the rotary embedding in another way" in refused(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'; supported in GGUF files: llama"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, which is not computed"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window is 64"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4; supported: a head's 8 features"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope.scaling.type is 'yarn'"),
        ({"llama.attention.head_count": 5, TURNED: None}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"llama.attention.head_count": "4", TURNED: None}, "num_attention_heads must be a whole number"),
        ({"llama.block_count": 3}, "lack 9 tensors, first: model.layers.2.self_attn.q_proj.weight"),
        ({"llama.block_count": None}, "lacks num_hidden_layers"),
        ({"llama.embedding_length": 2**30, TURNED: None}, "hidden_size must be a whole number"),
        ({"llama.vocab_size": 300}, "model.embed_tokens.weight is [259, 32], but config.json asks for [300, 32]"),
        ({"llama.vocab_size": 200}, "has ids for 259 tokens, the model an embedding for 200"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999, which is no token"),
        ({"tokenizer.ggml.bos_token_id": 999}, "bos_token_id is 999, which is no token"),
    ],
)  # fmt: skip
def test_keys_that_are_not_computed_are_refused(tmp_path: Path, keys: dict[str, object], words: str) -> None:
    assert words in refused(write_gguf(tmp_path / "m.gguf", tiny_llama(), keys=keys))


def test_a_linear_scale_is_read_and_unused_experts_are_not_asked_for(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0, "llama.expert_count": 0}
    config = load_configuration(write_gguf(tmp_path / "m.gguf", tiny_llama(), keys=keys))
    assert config.rope_parameters["rope_type"] == "linear" and config.rope_parameters["factor"] == 2.0


def test_tensors_that_a_llama_has_no_place_for_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), tensors={"blk.0.attn_q.bias": torch.ones(32)})
    assert "model.layers.0.self_attn.q_proj.bias: the model of config.json has no place for it" in refused(path)
    path = write_gguf(tmp_path / "n.gguf", tiny_llama(), tensors={"blk.0.ffn_gate_exps.weight": torch.ones(2, 48, 32)})
    assert "blk.0.ffn_gate_exps.weight" in refused(path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(tiny_llama().config)
    model.load_state_dict(tiny_llama().state_dict())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    message = refused(write_gguf(tmp_path / "m.gguf", model))
    assert "model.layers.1.mlp.up_proj.weight has values that are infinite" in message


def damaged(plain: Path, tmp_path: Path, change: Callable[[bytearray], object]) -> Path:
    content = bytearray(plain.read_bytes())
    change(content)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    return path


def put(offset: int, format_: str, *values: int) -> Callable[[bytearray], object]:
    return lambda content: struct.pack_into("<" + format_, content, offset, *values)


FIRST_KEY = 24
"""After the magic, version, and the numbers of tensors and of keys."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(0, "4s", b"GGML"), "it does not begin with GGUF"),  # type: ignore[arg-type]
        (put(4, "I", 1), "version 1 is not read"),
        (put(4, "I", 3 << 24), "version 50331648 is not read; supported: 2, 3, little-endian"),
        (put(8, "Q", 1 << 60), "tensors, more than 131072"),
        (put(16, "Q", 1 << 60), "keys, more than 16384"),
        (put(8, "Q", 1000), "cannot be read as a GGUF file"),
        (put(16, "Q", 10000), "cannot be read as a GGUF file"),
        (put(FIRST_KEY, "Q", 1 << 62), "bytes in a name, more than 1024"),
        (lambda content: content.__delitem__(slice(200, None)), "it is not complete"),
        (lambda content: content.__delitem__(slice(-4000, None)), "ends after the file's end: it is not complete"),
        (lambda content: content.clear(), "cannot be read as a GGUF file"),
    ],
)  # fmt: skip
def test_what_a_head_says_is_bounded_by_the_file(
    plain: Path, tmp_path: Path, change: Callable[[bytearray], object], words: str
) -> None:
    assert words in refused(damaged(plain, tmp_path, change))


def pairs(*entries: bytes) -> bytes:
    """Return a head without tensors."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pairs(text("k") + struct.pack("<IQ", 8, 1 << 62)), "it ends before byte"),
        (pairs(text("k") + struct.pack("<IIQ", 9, 0, 1 << 62)), "elements in k, more than 1048576"),
        (pairs(text("k") + struct.pack("<IIQ", 9, 0, 1 << 19)), "it ends before byte"),
        (pairs(text("k") + struct.pack("<IIQ", 9, 8, 1 << 19)), "it ends before byte"),
        (pairs(text("k") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1)), "array of type 9"),
        (pairs(text("k") + struct.pack("<I", 13)), "values of type 13, which GGUF has not"),
        (pairs(*[text("k") + struct.pack("<IB", 0, 1)] * 2), "the key k is there twice"),
        (pairs(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)), "is not UTF-8"),
        (pairs(text("general.alignment") + struct.pack("<II", 4, 0)), "general.alignment must be a power of two"),
        (pairs(text("general.alignment") + struct.pack("<IQ", 10, 1 << 40)), "general.alignment must be a power of two"),
        (pairs(), "general.architecture is None"),
    ],
)  # fmt: skip
def test_heads_of_somebody_elses_making(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert words in refused(path)


def test_every_byte_of_the_head_may_be_another(plain: Path, tmp_path: Path) -> None:
    """Fails as InputError or reads on, whatever stands in the head; never with another error, nor without end."""
    content = plain.read_bytes()
    end = content.index(b"output_norm.weight")
    path, read = tmp_path / "m.gguf", 0
    for position in [*range(0, 300, 3), *range(300, end, 997)]:
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            load_configuration(path)
            read += 1
        except InputError as error:
            assert str(path) in str(error) and len(str(error)) < 600
    assert read > 0


def test_tensors_that_share_bytes_or_lie_outside_are_refused(plain: Path, tmp_path: Path) -> None:
    content = plain.read_bytes()
    at = content.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16 + 4

    def refused_with(offset: int) -> str:
        path = damaged(plain, tmp_path, put(at, "Q", offset))
        return refused(path)

    assert "share bytes" in refused_with(0)
    assert "is not aligned" in refused_with(1)
    assert "begins after the file's end" in refused_with(1 << 50)
    assert "ends after the file's end" in refused_with(len(content) // 32 * 32 - 64)


def test_types_that_are_not_known_are_refused(plain: Path, tmp_path: Path) -> None:
    at = plain.read_bytes().index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16
    assert "has ggml type 4000, which is not known" in refused(damaged(plain, tmp_path, put(at, "I", 4000)))
    message = refused(damaged(plain, tmp_path, put(at, "I", Kind.Q6_K.value)))
    assert "blk.1.ffn_up.weight is [48, 32], no multiple of Q6_K's 256" in message
    assert "is I32; supported" in refused(damaged(plain, tmp_path, put(at, "I", Kind.I32.value)))


def test_without_the_package_it_says_how_to_install_it(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "GGUF files are read by a package that is not installed: pip install" in refused(plain)
    assert load_configuration(plain).hidden_size == 32  # which takes the head alone


def test_what_is_not_there_or_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model at"):
        load_checkpoint(str(tmp_path / "none.gguf"))
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match=r"is a file; give the directory that holds config\.json, or a \.gguf file"):
        load_checkpoint(str(tmp_path / "model.bin"))


def test_a_folder_of_a_gguf_file_names_it(plain: Path) -> None:
    with pytest.raises(InputError, match=rf"has no config\.json; give the file {plain}"):
        load_checkpoint(str(plain.parent))


def test_inspect_predicts_the_sizes_of_a_file(plain: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(plain)], catch_exceptions=False)
    assert "15 products, 704 rows of hints; predicted" in shown.output


def test_names_there_and_here() -> None:
    names = list(tiny_llama().state_dict())
    assert [gguf_tensors.model_name(gguf_name(name)) for name in names] == names
    assert gguf_tensors.model_name("blk.0.attn_rot_embd") == "blk.0.attn_rot_embd"


def test_a_head_is_read_without_the_values(plain: Path) -> None:
    header = GgufHeader.read(plain)
    assert header.counts["tokenizer.ggml.tokens"] == 259 and len(header.tensors) == 2 * 9 + 2
    assert header.values["llama.block_count"] == 2 and "tokenizer.ggml.tokens" not in header.values
    assert make_tokenizer().vocab_size == 259
