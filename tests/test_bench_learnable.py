"""The benches of models that are trained on before what learning gains with them is measured."""

import json

import pytest
import torch

from bench import finetune, learnable
from slotfast import shipped
from slotfast.errors import InputError

from .folders import V, write_folder

_DOCUMENT = "Return the number of items, or raise ValueError if there are none. " * 12


def test_models_are_trained_on_as_asked_and_charged(tmp_path, monkeypatch):
    text, out = tmp_path / "text.jsonl", tmp_path / "out.jsonl"
    text.write_text("".join(json.dumps({"text": f"{number} {_DOCUMENT}"}) + "\n" for number in range(2)))
    given = ["learnable", "--artifact", str(shipped.MODEL), "--tokenizer", str(shipped.TOKENIZER), "--seconds", "1"]
    given += ["--text", str(text), "--val", str(text), "--out", str(out)]
    for more in (["none"], ["reptile", "--share", "0"], ["reptile"], ["plain"]):
        monkeypatch.setattr("sys.argv", [*given, "--how", *more])
        learnable.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    untrained, still, *trained = (line["bpb"]["none"] for line in lines)
    assert untrained == still and max(trained) < untrained and lines[-1]["trained_tokens"] > 0
    for line in lines:
        found = line["learn+causal over causal"]["gain_bpb"]
        assert abs(found - line["bpb"]["causal"] + line["bpb"]["learn+causal"]) < 1e-9


def test_a_model_of_transformers_is_trained_on_and_charged(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="Hugging Face models need transformers (the extra hf)")
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 128}
    write_folder(tmp_path / "m", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    text, out, tuned = tmp_path / "text.jsonl", tmp_path / "out.jsonl", tmp_path / "tuned"
    text.write_text("".join(json.dumps({"text": f"{number} {_DOCUMENT[:200]}"}) + "\n" for number in range(2)))
    how = ["--seconds", "1", "--seq-len", "32", "--batch", "2", "--lr", "0.01", "--out", str(tuned)]
    monkeypatch.setattr("sys.argv", ["finetune", "--model", str(tmp_path / "m"), "--text", str(text), *how])
    finetune.main()
    with pytest.raises(InputError, match="tuned: it exists"):
        finetune.main()
    for folder in (tmp_path / "m", tuned):
        given = ["--model", str(folder), "--val", str(text), "--seq-len", "64", "--row", "learn:chunk=16"]
        monkeypatch.setattr("sys.argv", ["learnable", *given, "--max-tokens", "150", "--out", str(out)])
        learnable.main()
    before, after = (json.loads(line) for line in out.read_text().splitlines())
    assert after["bpb"]["none"] < before["bpb"]["none"] - 0.1 and (after["tokens"], after["seq_len"]) == (150, 64)
    assert after["finetune"]["trained_tokens"] > 0 and "finetune" not in before
    monkeypatch.setattr("sys.argv", ["learnable", *given, "--how", "plain", "--out", str(out)])
    with pytest.raises(SystemExit, match="--how plain: takes --artifact and --text"):
        learnable.main()
