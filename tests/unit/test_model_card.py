"""What a model card says: of the base and its licence, the data, what training took and how it scored."""

import json

import pytest
import yaml

from llamanb import REPOSITORY, Card, Recipe, load_data, merge, plan, push, to_gguf, train
from llamanb.export.describe import gguf_card
from llamanb.export.model_card import CARD, NOTICE, Licence, card_of, licence, shown
from llamanb.export.push import tagged
from llamanb.tiny import DEFAULTS
from llamanb.training import BASE
from tests.adapted import adapted_run
from tests.checkpoints import make_checkpoint
from tests.unit.fake_run import ONE, run_on_a_t4

COMMIT = "0a1b2c3d" * 5


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def t4_run(folder, **fields):
    """A run over a base that came from the Hub."""
    folder.mkdir(exist_ok=True)
    (folder / BASE).write_text(json.dumps({"commit": COMMIT, "fingerprint": "f"}))
    return run_on_a_t4(folder, **fields).replace(rows={"trained on": 1000, "held out": 64})


def with_fields(run, **fields):
    return run.replace(plan=run.plan.replace(recipe=run.plan.recipe.replace(**fields)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base whose name says whose it is, with the licence's text beside it."""
    folder = make_checkpoint("mini", tmp_path_factory.mktemp("models") / "Llama-3.1-mini")
    (folder / "LICENSE").write_text("the agreement")
    return folder


def test_the_card_of_a_run_on_a_gpu(tmp_path):
    run = t4_run(tmp_path, dataset="rajpurkar/squad:plain_text", rank=12)
    card = card_of(run)
    assert header(card) == {
        "base_model": ONE,
        "base_model_relation": "adapter",
        "license": "llama3.2",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["rajpurkar/squad"],
        "tags": ["llamanb", "llama"],
    }
    assert "**Built with Llama**" in card.split("\n## ")[0], "before anything has to be scrolled"
    wanted = [f"(https://huggingface.co/{ONE}), revision `{COMMIT}`", "Llama 3.2 Community License", REPOSITORY]
    wanted += ["https://www.llama.com/llama3_2/license/", '"rank": 12', "1,000 rows trained on, 64 rows held out"]
    wanted += ["`rajpurkar/squad:plain_text`, split `train`", "5 steps over 2,500 tokens in 2 s", "`torch` `2.11.0`"]
    wanted += ["3.20 of 14.56 GiB at most (`VRAM in use (NVML)`)", "`backward` 3.00", "`loss` 2.75", "in fp16"]
    wanted += [str(run.scores.tables()[0]), str(run.scores.verdict), f'revision="{COMMIT}"']
    wanted += ['bnb_4bit_quant_type="nf4"', 'bnb_4bit_compute_dtype="float16"', "BitsAndBytesConfig"]
    assert [part for part in wanted if part not in card] == []


def test_the_card_of_a_whole_model(tmp_path):
    card = card_of(with_fields(t4_run(tmp_path), method="full"))
    assert (header(card)["library_name"], header(card)["base_model_relation"]) == ("transformers", "finetune")
    assert "peft" not in card.split("## Scores")[0]


def test_what_lies_on_this_machine_is_shown_by_its_name_alone(tmp_path):
    rows = tmp_path / "secret-project" / "rows.jsonl"
    rows.parent.mkdir()
    rows.touch()
    run = t4_run(tmp_path, dataset=str(rows))
    (tmp_path / BASE).write_text('{"commit": null, "fingerprint": "f"}')
    card = card_of(with_fields(run, model=str(tmp_path / "Llama-3-mine")))
    assert "`rows.jsonl`" in card
    assert "`Llama-3-mine`, a folder" in card
    assert str(tmp_path) not in card
    assert "secret" not in card
    assert header(card).keys() & {"base_model", "datasets"} == set()
    signed = card_of(t4_run(tmp_path, dataset="https://example.org/rows.jsonl?Signature=abc#x"))
    assert "https://example.org/rows.jsonl`" in signed
    assert "abc" not in signed


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "llama3.1"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("unsloth/llama-3-8b-bnb-4bit", "llama3"),
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
        ("elyza/Llama-3-ELYZA-JP-8B", "llama3"),
        ("nvidia/Llama-3_1-Nemotron-51B-Instruct", "llama3.1"),
        ("openlm-research/open_llama_3b_v2", None),
        ("huggyllama/llama-30b", None),
        ("meta-llama/Llama-2-7b-hf", None),
        ("a/b", None),
        ("tiny", "apache-2.0"),
    ],
)
def test_the_licence_of_a_base_by_its_name(name, tag):
    assert getattr(licence(name), "tag", None) == tag


@pytest.mark.parametrize(
    ("file", "text", "tag"),
    [
        (CARD, "---\nlicense: llama3.3\n---\n# mine", "llama3.3"),
        (CARD, "---\nlicense: mit\nbase_model:\n- meta-llama/Llama-3.2-3B\n---\n", "llama3.2"),
        (CARD, "---\nlicense: 'mit'\n---\n", "mit"),
        (CARD, "---\nlicense: other\n---\n", None),
        (CARD, "license: llama3.3, says the text", None),
        ("config.json", '{"_name_or_path": "meta-llama/Meta-Llama-3-8B"}', "llama3"),
        ("config.json", '{"_name_or_path": 3}', None),
        ("config.json", "[", None),
    ],
)
def test_the_licence_of_a_folder_by_its_files(file, text, tag, tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / file).write_text(text)
    assert getattr(licence(str(folder)), "tag", None) == tag


def test_llama_3_asks_for_other_words_than_those_after_it():
    first, later = licence("meta-llama/Meta-Llama-3-8B"), licence("meta-llama/Llama-3.1-8B")
    assert (first.built_with, later.built_with) == ("Built with Meta Llama 3", "Built with Llama")
    assert first.notice.startswith(
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta"
    )
    assert later.notice == (
        "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved."
    )


def test_an_unknown_licence_is_not_guessed(tmp_path):
    card = card_of(with_fields(t4_run(tmp_path), model="owner/model"))
    assert "license" not in header(card)
    assert "Built with" not in card
    assert "See the base model's licence" in card
    assert tagged(card) is None


@pytest.mark.parametrize("name", ["null", "true", "123", "1e5", "0x10", "no", "a", "2024-01-01", "1/2", "a/b"])
def test_a_name_stays_text_in_the_header(name, tmp_path):
    fields = header(card_of(with_fields(t4_run(tmp_path), model=name, dataset=name)))
    assert fields["base_model"] == name
    assert fields["datasets"] == [name]


def test_the_header_says_which_licence_it_is(tmp_path):
    assert tagged(card_of(t4_run(tmp_path))) == licence("meta-llama/Llama-3.2-1B")
    assert tagged('---\nlicense: "mit"\n---\n') == tagged("---\nlicense: mit\n---\n") == Licence("mit", "mit")
    assert tagged("# no header\nlicense: mit\n") is None


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "https://x/y?token=1", "a b", "..", "x" * 5000])
def test_odd_names_are_shown(name):
    assert "token" not in shown(name)
    assert licence(name) is None


def test_the_card_of_a_training(tmp_path):
    recipe = Recipe(**{**DEFAULTS, "steps": 2}, eval_rows=4)
    data = load_data(recipe)
    run = train(plan(recipe, Card("CPU", None)), data, runs=tmp_path)
    shown = push(run.folder, "me/notes")
    assert shown.remarks == ()
    for part in (f"{len(data.train):,} rows trained on, 4 rows held out", "2 steps over ", "GiB at most"):
        assert part in shown.card, "not training's own, which knew less"
    assert f"{run.scores.tables()[0]}\n\n{run.scores.verdict}\n```" in shown.card
    assert "did not come to its end" not in shown.card
    assert str(tmp_path) not in shown.card
    card = run.saved / CARD
    card.write_text(card.read_text() + "\nMine.\n")
    changed = push(run, "me/notes")
    assert changed.card == card.read_text()
    assert any("not as training left it" in remark for remark in changed.remarks)
    card.write_text(shown.card + "\nMine too.\n")
    assert push(run, "me/notes").card.endswith("Mine too.\n")
    assert push(run, "me/notes").remarks == ()


def test_merged_and_gguf_carry_the_card_on(llama, tmp_path):
    adapted_run(tmp_path / "run", model=str(llama), method="lora", rank=4)
    run = tmp_path / "run"
    merged = merge(run)
    card = (merged / CARD).read_text()
    assert header(card)["library_name"] == "transformers"
    for part in (
        "**Built with Llama**",
        "merged in fp16 into the weights",
        "## Scores",
        '"rank": 4',
        'dtype="float16"',
    ):
        assert part in card
    assert "Llama 3.1 is licensed" in (merged / NOTICE).read_text()
    assert (merged / "LICENSE").read_text() == "the agreement"
    file = to_gguf(merged, kind="q8_0")
    text = file.with_suffix(".md").read_text()
    assert header(text) == {**header(card), "library_name": "gguf"}
    assert "ollama create merged-q8_0 -f model/merged-q8_0.Modelfile" in text
    assert "from transformers" not in text
    assert text.split("## Licence")[1] == card.split("## Licence")[1], "and all that follows it"


def test_a_gguf_of_a_foreign_folder_does_not_take_its_card(llama, tmp_path):
    assert "Built with Llama" in gguf_card(llama, "x.gguf", "f16")
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n# Buy this\n")
    card = gguf_card(tmp_path, "x.gguf", "f16")
    assert "Buy" not in card
    assert header(card)["license"] == "mit"


def test_a_run_that_was_ended_says_so(tmp_path):
    run = t4_run(tmp_path).replace(status="stopped after 30 minutes")
    assert "did not come to its end: `stopped after 30 minutes`" in card_of(run)
