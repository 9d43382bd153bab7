"""Models of other projects: the scores of their own forward, exact bytes, and plain words for what is wrong."""

import functools
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slotfast.data import write_shard
from slotfast.errors import InputError
from slotfast.eval.__main__ import main
from slotfast.foreign import read_foreign
from slotfast.slot import PRESETS

TEXT = "The quick brown fox — naïve, 日本, 🦊 — jumps.\n\n\tNext  line <|endoftext|> </s> end. "

# A module of another project, written to disk and imported by name: three ways to be a model, and some that are none.
FACTORIES = '''
import torch
from torch import nn

V = 1024

class Causal(nn.Module):
    """Embeds, sums up what came before, and gives logits."""
    seq_len = 32

    def __init__(self, vocabulary=V):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, 8)
        self.out = nn.Linear(8, vocabulary)

    def states(self, tokens):
        x = self.embed(tokens)
        return x.cumsum(1) / torch.arange(1, x.size(1) + 1, device=x.device)[:, None]

    def forward(self, tokens):
        return self.out(self.states(tokens))

class Apart(Causal):
    def hidden(self, tokens):
        return self.states(tokens)

    def head(self, hidden):
        return self.out(hidden)

def stored_narrow():
    return Apart().bfloat16()

class WithLoss(Causal):
    def forward(self, tokens, targets=None):
        return super().forward(tokens), None

class Listed(Causal):
    def forward(self, tokens):
        return [super().forward(tokens), [], 1]

class Empty(Causal):
    def forward(self, tokens):
        return ()

class Sees(Causal):
    def forward(self, tokens):
        x = self.embed(tokens)
        return self.out(x + x.mean(1, keepdim=True))

class Short(Causal):
    def forward(self, tokens):
        return super().forward(tokens)[:, -1:]

def wide():
    return Causal(50_257)

def narrow():
    return Causal(60)

def broken():
    model = Causal()
    with torch.no_grad():
        model.out.bias[3] = float("nan")
    return model

def fails():
    raise RuntimeError("no such checkpoint\\nat all")

def number():
    return 3

def shipped():
    from importlib import resources
    from slotfast.artifact import read_artifact
    return read_artifact(resources.files("slotfast") / "demo" / "demo.slotfast").model()
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(FACTORIES)
    (tmp_path / "t.txt").write_text(TEXT * 6, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("theirs", None)


def _run(capsys, *arguments):
    main([*map(str, arguments), "--json", "-"])
    return json.loads(capsys.readouterr().out)


def test_a_factory_with_its_head_apart_scores_like_the_same_model_in_one_piece(project, capsys):
    whole, apart = (
        _run(capsys, "--model", f"theirs:{name}", "--text", project / "t.txt", "--stride", 8, "--preset", "causal")
        for name in ("Causal", "Apart")
    )
    assert apart["model"]["head_apart"] and not whole["model"]["head_apart"]
    assert whole["model"]["seq_len"] == 32 == whole["plan"]["seq_len"]
    assert (whole["artifact_bytes"], whole["model"]["metadata"], whole["calibrated"]) == (None, None, False)
    assert whole["bytes"] == whole["text"]["raw"] and whole["text"]["exact"]
    for row in (0, 1):
        assert apart["presets"][row]["adapted"]["nats"] == pytest.approx(whole["presets"][row]["adapted"]["nats"])
    assert whole["adapted"]["nats"] != pytest.approx(whole["base"]["nats"], rel=1e-4)


def test_logits_may_be_the_first_of_several_things(project, capsys):
    expected = _run(capsys, "--model", "theirs:Causal", "--text", project / "t.txt", "--preset", "none")
    for name in ("WithLoss", "Listed"):
        found = _run(capsys, "--model", f"theirs:{name}", "--text", project / "t.txt", "--preset", "none")
        assert found["base"] == expected["base"]


def test_the_shipped_model_scores_alike_as_an_artifact_and_as_a_module(project, capsys):
    row = "causal-unigram:scale=0.7,k=2,decay=0.999"
    arguments = ("--max-tokens", 700, "--forward", "windows", "--preset", row, "causal-lbfgs")
    ours, theirs = _run(capsys, *arguments), _run(capsys, "--model", "theirs:shipped", *arguments)
    assert [r["adapted"] for r in ours["presets"]] == [r["adapted"] for r in theirs["presets"]]
    assert theirs["plan"] == ours["plan"] and ours["adapted"]["gain_bpb"] != 0
    assert theirs["artifact_bytes"] is None and ours["artifact_bytes"] > 1_000_000


def test_the_table_leaves_out_what_a_factory_does_not_have(project, capsys):
    main(["--model", "theirs:Causal", "--text", str(project / "t.txt"), "--stride", "8", "--preset", "causal"])
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("model"))
    assert "bytes" not in line and "None" not in out and "windows" in line and "uncalibrated" in out


def test_a_large_vocabulary_scores_its_shards_like_plain_torch(project, capsys, monkeypatch):
    import theirs

    tokens = np.random.default_rng(0).integers(4, 1024, 90)
    tokens[[0, 40]] = 1
    write_shard(project / "a.bin", tokens)
    # the shipped tokenizer stands for the bytes of the first 1,024 ids alone
    with pytest.raises(InputError, match="1024 pieces; the model gives 50257 logits"):
        main(["--model", "theirs:wide", "--tokens", str(project / "a.bin")])
    monkeypatch.setattr("slotfast.foreign.models._PADDING_ROWS", 1 << 20)
    arguments = ("--tokens", project / "a.bin", "--preset", "none", "--seq-len", 128)
    found = _run(capsys, "--model", "theirs:wide", *arguments)
    ids = torch.from_numpy(tokens)
    with torch.inference_mode():
        expected = F.cross_entropy(theirs.wide()(ids[None, :-1])[0], ids[1:], reduction="sum")
    assert found["base"]["nats"] == pytest.approx(float(expected), rel=1e-5)
    assert found["model"]["vocab_size"] == 50_257


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "no such folder, and not of the form package.module:factory"),
        (["--model", "nowhere:model"], "ModuleNotFoundError: No module named 'nowhere'"),
        (["--model", "theirs:nothing"], "AttributeError: .*nothing"),
        (["--model", "theirs:fails"], "RuntimeError: no such checkpoint$"),
        (["--model", "theirs:number"], "returned int, expected a torch.nn.Module"),
        (
            ["--model", "theirs:Short"],
            r"gives \[2, 1, 1024\] for tokens \[2, 16\], expected logits .*of every position",
        ),
        (["--model", "theirs:Empty"], "'tuple'|tuple"),
        (["--model", "theirs:Sees"], "moves logits before it by up to .*: not a causal language model"),
        (["--model", "theirs:broken"], "parameter 'out.bias' holds NaN"),
        (["--model", "theirs:narrow"], "1024 pieces; the model gives 60 logits: pass its own --tokenizer"),
        (["--model", "theirs:Causal", "--weights", "int6"], "--weights int6: needs an --artifact"),
        (["--model", "theirs:Causal", "--artifact", "x"], "--model and --artifact .*: give one of them"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_wrong_models_are_one_clear_line(project, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


# Hugging Face folders: tiny random models, tokenizers built here.


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="Hugging Face models need transformers (the extra hf)")


def _save_tokenizer(transformers, tokenizer, folder, **special):
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def _byte_level(transformers, folder, vocabulary=50_257, prefix=False):
    """GPT-2's kind: 256 bytes, three merges, entries that never come, and <|endoftext|> for BOS and EOS alike."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "b"), ("Ã", "¯")]
    pieces = [*alphabet, *map("".join, merges)]
    pieces += [f"never{number}" for number in range(vocabulary - len(pieces) - 1)]
    tokenizer = Tokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    _save_tokenizer(transformers, tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def _fallback(transformers, folder):
    """Llama's kind: spaces as U+2581, one put in front of the text, byte pieces for what has no piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Theabcnoqukj"]
    merges = [("▁", "▁"), ("▁", "b"), ("T", "h")]
    pieces += map("".join, merges)
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _save_tokenizer(transformers, tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def gpt2(transformers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50_257, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    _byte_level(transformers, folder)
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": TEXT + str(n)}) for n in range(3)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llama(transformers, tmp_path_factory):
    """With 24 rows more in the embedding than the tokenizer has pieces."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    _fallback(transformers, folder)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "t.txt").write_text(TEXT + " " + TEXT, encoding="utf-8")
    return folder


def test_a_byte_level_tokenizer_counts_every_byte(gpt2):
    _, tokenizer = read_foreign(str(gpt2))
    ids, count = tokenizer.encode_documents([TEXT, " " + TEXT, "", "\n"])
    assert count.exact and count.rule == sum(len(t.encode()) for t in (TEXT, " " + TEXT, "\n"))
    assert tokenizer.bos_id == 50_256 and int((ids == 50_256).sum()) == 4  # <|endoftext|> in a text is text
    # each piece for itself: its bytes are what it decodes to, also inside a character
    pieces = [bytes(map(_BYTES.__getitem__, tokenizer._backend.id_to_token(token))) for token in ids if token != 50_256]
    kept = ids[ids != 50_256]
    np.testing.assert_array_equal(tokenizer.byte_table.base[kept], [len(piece) for piece in pieces])
    assert b"".join(pieces).decode() == TEXT + " " + TEXT + "\n"


def _byte_of_character():
    """GPT-2's spelling of bytes as characters: itself where printable, else from U+0100 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(other)}


_BYTES = _byte_of_character()


def test_a_tokenizer_with_byte_pieces_counts_every_byte(llama):
    _, tokenizer = read_foreign(str(llama))
    texts = [TEXT, " " + TEXT, "  b", "<0x41>"]
    ids, count = tokenizer.encode_documents(texts)
    assert count.exact and count.rule == count.raw == sum(len(text.encode()) for text in texts)
    assert count.unknown == 0 and tokenizer.bos_id == 1


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_has_its_bytes(gpt2, llama, text):
    for folder in (gpt2, llama):
        _, count = _tokenizer(str(folder)).encode_documents([text, text])
        assert count.exact and count.rule == 2 * len(text.encode())


@functools.cache
def _tokenizer(folder):
    return read_foreign(folder)[1]


def test_a_space_in_front_of_every_text_is_left_out(transformers, tmp_path):
    from slotfast.foreign import HuggingFaceTokenizer

    _byte_level(transformers, tmp_path, 400, prefix=True)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    _, count = tokenizer.encode_documents([TEXT])
    assert count.rule == count.raw == len(TEXT.encode())
    # what it does to a text that starts with a space cannot be undone, and is said
    _, count = tokenizer.encode_documents([" b"])
    assert (count.rule, count.raw, count.exact) == (1, 2, False)


def test_a_unigram_tokenizer_counts_what_it_keeps(transformers, tmp_path):
    """T5's and XLNet's kind: U+2581 put in front by the pre-tokenizer, no byte pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from slotfast.foreign import HuggingFaceTokenizer

    pieces = ["<unk>", "</s>", "\u2581", "\u2581the", *"thefoxé", "fox"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _save_tokenizer(transformers, tokenizer, tmp_path, eos_token="</s>", unk_token="<unk>")
    tokenizer = HuggingFaceTokenizer(tmp_path)
    _, count = tokenizer.encode_documents(["the  fox é", "fox"])
    assert count.exact and count.rule == len("the  fox éfox".encode())
    _, count = tokenizer.encode_documents(["the fox!"])
    assert (count.rule, count.raw, count.unknown, count.exact) == (7, 8, 1, False)


def test_what_a_tokenizer_loses_is_reported(transformers, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from slotfast.foreign import HuggingFaceTokenizer

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "quick": 2, "fox": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    _save_tokenizer(transformers, words, tmp_path, eos_token="</s>", unk_token="<unk>")
    _, count = HuggingFaceTokenizer(tmp_path).encode_documents(["quick brown fox"])
    assert (count.rule, count.raw, count.unknown, count.exact) == (8, 15, 1, False)


def test_a_gpt2_scores_what_its_own_forward_gives(gpt2, transformers, capsys):
    found = _run(capsys, "--model", gpt2, "--text", gpt2 / "t.jsonl", "--preset", "none", "--max-tokens", 60)
    assert found["model"]["head_apart"] and found["model"]["vocab_size"] == 50_257
    assert found["versions"]["transformers"] == transformers.__version__
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    ids, _ = read_foreign(str(gpt2))[1].encode_documents([TEXT + "0"], 60)
    ids = torch.from_numpy(ids.astype(np.int64))
    with torch.inference_mode():
        expected = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum")
    assert found["base"]["nats"] == pytest.approx(float(expected), rel=1e-6)


def test_documents_of_a_hugging_face_model_are_counted(gpt2, capsys):
    found = _run(capsys, "--model", gpt2, "--text", gpt2 / "t.jsonl", "--preset", "causal", "--stride", 32)
    assert found["adapted"]["nats"] != found["base"]["nats"]
    assert found["text"]["documents"] == 3 and found["text"]["exact"]
    assert found["bytes"] == 3 * len((TEXT + "0").encode())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_llama_adapts_by_every_preset(llama, capsys, name):
    arguments = ["--model", llama, "--text", llama / "t.txt", "--stride", 16, "--preset", name, "--allow-noncausal"]
    found = _run(capsys, *arguments)
    assert found["text"]["exact"] and found["plan"]["seq_len"] == 64
    assert found["base"]["bpb"] == pytest.approx(found["base"]["nats"] / math.log(2) / found["bytes"])
    changed = found["adapted"]["nats"] != found["base"]["nats"]
    assert changed == (name not in ("none", "film-lowrank")) and math.isfinite(found["adapted"]["bpb"])


def test_a_llama_trains_on_what_it_has_scored(llama, capsys):
    arguments = ("--model", llama, "--text", llama / "t.txt", "--stride", 16, "--preset", "none")
    none, trained = _run(capsys, *arguments, "--ttt", "--ttt-chunk", 64, "--ttt-lr", 0.1)["presets"]
    assert trained["adapted"]["nats"] < none["adapted"]["nats"]


def test_a_capped_output_keeps_its_head_in_one_piece(transformers, llama, tmp_path):
    """Gemma 2 caps its logits behind the output matrix: hidden and head apart would lose that."""
    config = transformers.Gemma2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=0.1,
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    model, _ = read_foreign(str(tmp_path), str(llama))
    assert not model.config.head_apart
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        expected = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits
        torch.testing.assert_close(model.module.head(model.module.hidden(tokens)), expected)


def test_damaged_folders_are_one_clear_line(transformers, llama, gpt2, tmp_path):
    from safetensors.torch import load_file, save_file

    def copy(name, edit=None, without=()):
        folder = tmp_path / name
        folder.mkdir()
        for file in llama.iterdir():
            if file.name not in without:
                (folder / file.name).write_bytes(file.read_bytes())
        if edit:
            weights = load_file(folder / "model.safetensors")
            edit(weights)
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    def nan(weights):
        weights["model.norm.weight"][0] = float("nan")

    truncated = copy("truncated")
    with open(f"{truncated}/model.safetensors", "r+b") as file:
        file.truncate(1000)
    wrong = {
        str(tmp_path): "not a causal language model",
        truncated: "not a causal language model",
        copy("no weights", without=["model.safetensors"]): "not a causal language model",
        copy("less", lambda weights: weights.pop("model.norm.weight")): "no weights for model.norm.weight",
        copy("nan", nan): "parameter 'model.norm.weight' holds NaN",
        copy("no tokenizer", without=["tokenizer.json"]): "not a tokenizer of the tokenizers library",
    }
    for folder, message in wrong.items():
        with pytest.raises(InputError, match=message) as caught:
            read_foreign(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="50257 pieces; the model gives 300 logits"):
        read_foreign(str(llama), str(gpt2))
    with pytest.raises(InputError, match="--seq-len 65: the model has 64 positions"):
        read_foreign(str(llama), window=65)


def test_code_inside_a_folder_is_not_run(transformers, llama, tmp_path):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    with pytest.raises(InputError, match="not a causal language model"):
        read_foreign(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_narrow_types_run_by_autocast(project):
    model, _ = read_foreign("theirs:Apart")
    tokens = torch.arange(20)[None]
    hidden = model.module.hidden(tokens, torch.bfloat16)
    assert hidden.dtype == torch.bfloat16 and model.module.head(hidden).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.module.parameters())
    narrow, _ = read_foreign("theirs:stored_narrow")
    logits = narrow.module.head(narrow.module.hidden(tokens, torch.float32))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.module.head(hidden), rtol=0.05, atol=0.05)
