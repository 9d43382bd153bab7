"""--report: pages that hold all that they show, that no document can break, and that a browser opens without a word."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from slotfast import record
from slotfast.audit.__main__ import main as audit
from slotfast.audit.page import write_page as write_audit
from slotfast.command import page
from slotfast.errors import InputError
from slotfast.eval.__main__ import main as evaluate
from slotfast.eval.page import headline

pytest.importorskip("matplotlib", reason="the extra `plot`")
RESULT = Path(__file__).parents[1] / "bench" / "results" / "amd-epyc-2-threads" / "eval.json"
HOSTILE = '<script>alert("1")</script> ]]> &amp; <!-- $x^{$ \x01\u202e </svg> <img src="http://x.y/z" onerror="f()"/>'
LOOP = """
def future(tokens, log):
    import torch
    return torch.full((len(tokens),), 2.5).add(tokens.roll(-1) / 16)
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of every command; whatever they are given that anybody may have written is hostile."""
    folder = tmp_path_factory.mktemp("<b>&folder")
    path = {name: str(folder / f"{name}.html") for name in ("eval", "audit", "record")}
    text = folder / "text.jsonl"
    documents = [f"{HOSTILE} the words of document {number} " * (1 + number) for number in range(4)]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    rows = ["--preset", "none", "causal", "pr1350", "learn", "--allow-noncausal"]
    evaluate(["--text", str(text), "--seq-len", "128", *rows, "--report", path["eval"]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(folder)
        (folder / "my_page_loops.py").write_text(LOOP)
        options = ["--vocab-size", "16", "--max-tokens", "60", "--budget", "0.1", "--report", path["audit"]]
        with pytest.raises(SystemExit):
            audit(["--score", "my_page_loops:future", *options])

    runs = []
    for seed in (1, 2):
        result = json.loads(RESULT.read_text())
        result["model"]["metadata"]["seed"] = seed
        result["presets"][1]["adapted"]["nats"] += seed
        result["notes"] = [HOSTILE]
        runs.append(str(folder / f"{seed}.json"))
        Path(runs[-1]).write_text(json.dumps(result))
    record.main([*runs, "--baseline", "1.9,0.001,3", "--name", HOSTILE, "--report", path["record"]])
    return {name: Path(file).read_text(encoding="utf-8") for name, file in path.items()}


NAMES = pytest.mark.parametrize("name", ["eval", "audit", "record"])
SHOWN = {
    "eval": "Result, Gain by preset, Along the stream, Gain by document, Gain against seconds, Where the time went, "
    "Compliance, How it was made",
    "audit": "Conditions, my_page_loops:future, What was read, How it was made",
    "record": "Runs, Against the baseline, Compliance, What the runs say of themselves, What they have in common, "
    "How it was made",
}


def _parsed(text):
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def _tag(element):
    return element.tag.rpartition("}")[2]


@NAMES
def test_a_page_is_well_formed_and_whole(pages, name):
    root = _parsed(pages[name])
    assert [each.text for each in root.iter() if _tag(each) == "h2"] == SHOWN[name].split(", ")
    pictures = [each for each in root.iter() if _tag(each) == "svg"]
    assert len(pictures) == {"eval": 5, "audit": 2, "record": 1}[name]
    for each in pictures:
        assert each.get("aria-label") and each.get("viewBox")
    names = [each.get("id") for each in root.iter() if each.get("id")]
    assert len(names) == len(set(names))
    assert root.find(".//{*}title").text == root.find(".//{*}h1").text


@NAMES
def test_no_reference_leaves_a_page(pages, name):
    root = _parsed(pages[name])
    allowed = set(
        "html head meta link title style body section h1 h2 h3 p pre div table thead tbody tr th td figure figcaption "
        "details summary span ul li bdi svg g path text tspan defs use clipPath rect".split()
    )
    assert {_tag(each) for each in root.iter()} <= allowed
    names = {each.get("id") for each in root.iter()}
    for each in root.iter():
        for key, value in each.items():
            key = key.rpartition("}")[2]
            assert not key.startswith("on") and key not in ("src", "srcset", "action", "data", "poster"), key
            if key == "href":
                assert value == "data:," or value.removeprefix("#") in names, value
            for target in re.findall(r"url\(([^)]*)", value):
                assert target.removeprefix("#") in names, target
    style = root.find(".//{*}style").text
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in root.find(".//{*}meta[2]").get("content")


@pytest.mark.parametrize("name", ["eval", "record"])
def test_what_anybody_wrote_is_shown_and_means_nothing(pages, name):
    words = "".join(_parsed(pages[name]).itertext())
    assert '<script>alert("1")</script> ]]> &amp; <!-- $x^{$ \ufffd\ufffd </svg>' in words
    assert "<script" not in pages[name] and "<img" not in pages[name] and "\x01" not in pages[name]


def test_the_pages_say_what_the_commands_said(pages):
    words = {name: "".join(_parsed(text).itertext()) for name, text in pages.items()}
    for said in (
        "gain: bits per byte less than none",
        "NOT causal",
        "32 windows share one parameter",
        "C3: charged before",
    ):
        assert said in words["eval"], said
    assert "LEAK in my_page_loops:future" in words["audit"] and re.search(
        r"the score of token \d+ moved", words["audit"]
    )
    assert "what weights and files were made from" in words["audit"]
    assert "Welch's test" in words["record"] and "No record: the gain" in words["record"]
    for name, text in words.items():
        assert f"slotfast {name} " in text.replace("python -m slotfast.", "slotfast ") and "--report" in text


def test_a_leak_is_no_headline():
    rows = [("none", True, 1.5), ("causal", True, 1.4), ("leak", False, 1.0)]
    presets = [{"preset": name, "causal": causal, "adapted": {"bpb": bpb}} for name, causal, bpb in rows]
    found = {"text": {"source": "a text"}, "presets": presets}
    assert headline(found) == "a text: 1.5000 bits per byte, 1.4000 with causal"
    assert headline(found | {"presets": [presets[0], presets[2]]}) == "a text: 1.5000 bits per byte"


def test_of_many_loops_those_that_leak_are_open(tmp_path):
    result = json.loads((RESULT.parents[1] / "audit-pr1350.json").read_text())
    (leaks,) = result["loops"]
    clean = leaks | {"loop": "clean", "verdict": "clean", "leaks": [], "places": {}}
    for loops, folded in (([clean] * 2 + [leaks], 0), ([clean] * 4 + [leaks], 4)):
        write_audit(str(tmp_path / "a.html"), result | {"loops": loops})
        root = _parsed((tmp_path / "a.html").read_text(encoding="utf-8"))
        assert [each.text for each in root.iter() if _tag(each) == "summary"].count("clean") == folded
        assert "Nothing that must not." in "".join(root.itertext())


def test_what_is_put_into_a_page_is_escaped_unless_it_is_html():
    made = page.element("p", "a<b", page.element("b", 'x"&', title='"<'), class_="")
    assert made == '<p>a&lt;b<b title="&quot;&lt;">x&quot;&amp;</b></p>'
    assert page.escaped("\x00\ud800\ufffe\u202e\n") == "\ufffd\ufffd\ufffd\ufffd\n"


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("no/such/x.html", "x.html: its folder does not exist or cannot be written"),
        ("x.txt", "--report .*x.txt: is to be an HTML page as written here: expected a name that ends with .html"),
        ("mine.html", "--report .*mine.html: exists, and is not an HTML page as written here; --force"),
        ("-", "--report -: expected a file, not standard output"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_run(tmp_path, monkeypatch, report, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.html").write_text("<!DOCTYPE html>\n<html><body>my own</body></html>")
    Path("run.json").write_text(RESULT.read_text())
    for command, options in (
        (evaluate, ["--text", "nowhere"]),
        (audit, ["--text", "nowhere"]),
        (record.main, ["run.json"]),
    ):
        with pytest.raises(InputError, match=message):
            command([*options, "--report", report])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "run.json"]


def test_a_page_without_matplotlib_is_refused_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"--report: needs matplotlib: pip install 'slotfast\[plot\]'"):
        evaluate(["--text", "nowhere", "--report", "x.html"])


def test_a_browser_opens_the_pages_without_a_word(pages, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/own",
    ]
    for name, text in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        command = [browser, *flags, "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
        titles = [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", done.stdout)]
        assert titles == SHOWN[name].split(", ") and "<script" not in done.stdout
