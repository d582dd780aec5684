import collections
import itertools
import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from sunfish_jax.data.sources import SPLITS, open_source
from sunfish_jax.errors import UserError


def source_of(path, data_dir=None, **keys):
    config = ConfigDict({"source": str(path), "text_key": "text", "prompt_key": "prompt", **keys})
    return open_source(config, data_dir or path.parent)


def all_examples(source):
    return {split: list(source.examples(split)) for split in SPLITS}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


def test_default_corpus_is_whole_split_by_title_and_prompted(corpus_dir):
    source = source_of("vital_articles", corpus_dir)
    splits = all_examples(source)
    sizes = {split: len(examples) for split, examples in splits.items()}
    assert sum(sizes.values()) == 10_033
    assert abs(sizes["train"] / 10_033 - 0.94) < 0.01
    assert abs(sizes["validation"] - sizes["test"]) < 60
    titles = {split: {example.prompts[0] for example in examples} for split, examples in splits.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not titles[one] & titles[other]
    prompts = {example.prompts[0]: example.prompts for examples in splits.values() for example in examples}
    assert prompts["Abstract expressionism"] == (
        "Abstract expressionism",
        "Write about Abstract expressionism",
        "American post–World War II art movement",
        "Abstract expressionism: american post–World War II art movement",
        "Arts",
    )
    assert not any("Uncategorized" in of_article for of_article in prompts.values())
    # The topic is known of each article that has one, and is then the last of its prompts.
    examples = [example for examples in splits.values() for example in examples]
    assert collections.Counter(example.topic for example in examples)[None] == 1000
    assert len({example.topic for example in examples}) == 12
    assert all(example.topic in (None, example.prompts[-1]) for example in examples)
    assert source.identity == source_of("vital_articles", corpus_dir).identity


def test_opening_a_source_does_not_import_tfds(tmp_path):
    (tmp_path / "text.txt").write_text("Some text. " * 1000)
    code = f"""
import sys
from pathlib import Path
from ml_collections import ConfigDict
from sunfish_jax.data.sources import open_source
for name in ("vital_articles", "{tmp_path}/text.txt"):
    open_source(ConfigDict({{"source": name}}), Path("{tmp_path}"))
print("tensorflow_datasets" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_prepared_tfds_dataset_by_name(corpus_dir):
    list(source_of("vital_articles", corpus_dir).examples("test"))  # prepares it
    (prepared,) = (path for path in (corpus_dir / "vital_articles").iterdir() if path.is_dir())
    source = source_of("tfds:vital_articles", prepared, prompt_key="title")
    default = source_of("vital_articles", corpus_dir)
    named, ours = list(source.examples("test")), list(default.examples("test"))
    assert [e.text for e in named] == [e.text for e in ours]
    assert [e.prompts for e in named] == [e.prompts[:1] for e in ours]
    with pytest.raises(UserError, match=r"no feature `body`.*description"):
        source_of("tfds:vital_articles", prepared, text_key="body")
    with pytest.raises(UserError, match=r"no feature `titel`.*set data\.prompt_key"):
        source_of("tfds:vital_articles", prepared, prompt_key="titel")


class Sayings(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    word = "saying"

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": ((i, {"text": f"{self.word} {i}"}) for i in range(300))}

    def _generate_examples(self):
        return iter(())


def prepare_sayings(folder):
    Sayings(data_dir=str(folder), file_format="array_record").download_and_prepare()


def test_tfds_dataset_with_a_train_split_only_is_split_by_text(tmp_path):
    prepare_sayings(tmp_path)
    splits = all_examples(source_of("tfds:sayings", tmp_path))
    assert sorted(e.text for part in splits.values() for e in part) == sorted(f"saying {i}" for i in range(300))
    assert len(splits["train"]) > 250 and splits["validation"] and splits["test"]
    assert splits["train"][0].prompts == ()


def test_a_tfds_dataset_prepared_anew_from_other_texts_is_another(tmp_path, monkeypatch):
    words = {"one": "saying", "same": "saying", "other": "said"}
    for folder, word in words.items():
        monkeypatch.setattr(Sayings, "word", word)
        prepare_sayings(tmp_path / folder)
    identity = {folder: source_of("tfds:sayings", tmp_path / folder).identity for folder in words}
    assert identity["one"] == identity["same"] != identity["other"]


def test_unknown_tfds_dataset(tmp_path):
    with pytest.raises(UserError, match="tfds:no_such_thing cannot be opened"):
        source_of("tfds:no_such_thing", tmp_path)


@pytest.mark.parametrize("many_files", [False, True])
def test_text_is_split_without_loss_into_separate_parts(tmp_path, many_files):
    lines = [f"line {i} of a text with an é in it\r\n" for i in range(3000)]
    if many_files:
        path = tmp_path / "folder"
        (path / "deeper").mkdir(parents=True)
        for part in range(3):
            name = "deeper/b.txt" if part == 1 else f"{part}.txt"
            (path / name).write_bytes("".join(lines[part::3]).encode())
        (path / "picture.png").write_bytes(b"\x89PNG")
    else:
        path = tmp_path / "text.txt"
        path.write_bytes("".join(lines).encode())
    source = source_of(path)
    splits = {split: [e.text for e in source.examples(split)] for split in SPLITS}
    found = [line for part in splits.values() for text in part for line in text.splitlines()]
    assert sorted(found) == sorted(line.rstrip() for line in lines)
    held_out = sum(map(len, splits["validation"])) / sum(len(line) for line in lines)
    assert 0.02 < held_out < 0.05
    assert len(splits["validation"]) > 2, "held-out text comes from all over the corpus"
    assert source.continuous


@pytest.mark.parametrize("word", ["word", "文字列"])
@pytest.mark.parametrize("size", [26_000, 100_000, 1_000_000])
def test_text_without_line_breaks_is_split_too(tmp_path, size, word):
    text = "".join(f"{word} {number} " for number in range(size // 10))
    (tmp_path / "one_line.txt").write_text(text, encoding="utf-8")
    source = source_of(tmp_path / "one_line.txt")
    characters = {split: sum(len(example.text) for example in source.examples(split)) for split in SPLITS}
    assert sum(characters.values()) == len(text)
    assert 0.01 < min(characters["validation"], characters["test"]) / len(text) < 0.06


def test_identity_follows_the_contents_not_the_name(tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("some text")
    other.write_text("some text")
    assert source_of(one).identity == source_of(other).identity
    other.write_text("some next")
    assert source_of(one).identity != source_of(other).identity
    records = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "prompt": "b"}])
    before = source_of(records).identity
    write_jsonl(records, [{"text": "a", "prompt": "c"}])
    assert source_of(records).identity != before


def test_jsonl_and_csv_hold_the_same(tmp_path):
    records = [
        {"text": f'text {i}, "quoted"\nand on', "prompt": f"prompt {i}" if i % 2 else ""} for i in range(200)
    ]
    jsonl = write_jsonl(tmp_path / "a.jsonl", records)
    csv_file = tmp_path / "a.csv"
    quoted = ['"' + r["text"].replace('"', '""') + '",' + r["prompt"] for r in records]
    csv_file.write_text("\n".join(["text,prompt", *quoted]))
    splits = all_examples(source_of(jsonl))
    assert splits == all_examples(source_of(csv_file))
    examples = [example for part in splits.values() for example in part]
    assert sorted((e.text, "".join(e.prompts)) for e in examples) == sorted(
        (r["text"], r["prompt"]) for r in records
    )
    assert all(len(e.prompts) in (0, 1) and "" not in e.prompts for e in examples)


def test_equal_texts_share_a_split_and_small_corpora_have_all_splits(tmp_path):
    texts = [f"text {i % 5}" for i in range(40)]
    splits = all_examples(source_of(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])))
    sets = {split: {e.text for e in examples} for split, examples in splits.items()}
    assert all(sets.values())
    assert sum(map(len, sets.values())) == 5


def test_half_surrogates_and_blank_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n\n{"text": "  "}\n{"text": "c", "prompt": null}\n')
    splits = all_examples(source_of(path))
    assert sorted(e.text for part in splits.values() for e in part) == ["a ? b", "c"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": broken}\n', "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "fine"}\n["a"]\n', "line 2.*not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: `text` is 3, not a string"),
        ("a.jsonl", b'{"text": "fine", "prompt": ["a"]}\n', r"line 1: `prompt` is \[\"a\"\], not a string"),
        ("a.jsonl", b'{"body": "a", "title": "b"}\n', "line 1: no `text` .it has body, title."),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("a.csv", b"body,title\na,b\n", "no column `text` .it has body, title."),
        ("a.csv", b"text,prompt\n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b'text\n"a\n', "line 2: broken CSV"),
        ("a.csv", b'text\n"a" b\n', "line 2: broken CSV"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.parquet", b"PAR1", "unknown ending"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, name, contents, message):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(UserError, match=message) as caught:
        source_of(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_prompts_under_a_name_that_was_given_must_be_there(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "a", "title": "b"}\n' if name.endswith("jsonl") else "text,title\na,b\n")
    assert next(source_of(path).examples("train")).prompts == ()
    assert next(source_of(path, prompt_key="title").examples("train")).prompts == ("b",)
    with pytest.raises(UserError, match=r"no prompt under data\.prompt_key=titel"):
        source_of(path, prompt_key="titel")


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("Some text. " * 1000)
    assert source_of("~/text.txt", tmp_path).identity == source_of(tmp_path / "text.txt").identity


def test_missing_file_and_folder_without_text(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        source_of(tmp_path / "missing.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.txt file"):
        source_of(tmp_path / "empty")
