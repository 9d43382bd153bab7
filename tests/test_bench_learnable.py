"""The bench of models that are trained on with learning in view."""

import json

from bench import learnable
from slotfast import shipped

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
