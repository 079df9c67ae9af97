"""The small encoders: their data, their tokenizers, how they are cached, and (slow) what they have learnt."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from harness.tiny.encoders import EncoderOptions, build_encoder, data_sets
from harness.tiny.world import RELATIONS, World

BARELY = replace(EncoderOptions(), steps=1, train=60, test=20, hidden=32, layers=1, mlp=32)


def test_data_sets() -> None:
    world = World(BARELY.world)
    found = data_sets(world, BARELY)
    assert found == data_sets(World(BARELY.world), BARELY)  # by the seed alone
    assert found != data_sets(world, replace(BARELY, seed=1))
    assert {name: len(rows) for name, rows in found.items()} == {
        "sentences": 20,
        **{
            f"{name}_{s}": n
            for name in ("kinds", "pairs", "numbers", "spans")
            for s, n in (("train", 60), ("test", 20))
        },
    }
    names = {relation.name for relation in RELATIONS}
    assert {row["label"] for row in found["kinds_train"]} == names
    assert not {row["text"] for row in found["kinds_train"]} & {row["text"] for row in found["kinds_test"]}
    assert {row["label"] for row in found["pairs_train"]} == {0, 1}
    assert {row["number"] for row in found["numbers_train"]} <= {0.0, 1.67, 3.33, 5.0}
    facts = {fact.question: fact for fact in world.facts}
    without = 0
    for row in found["spans_train"] + found["spans_test"]:
        fact = facts[row["question"]]
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        without += not texts
        if texts:
            assert (texts, len(starts)) == ([fact.answer], 1)
            assert row["context"].startswith(fact.answer, starts[0])
        else:
            assert not any(statement in row["context"] for statement in fact.statements)
    assert 5 < without < 40


@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_built_once_and_a_plain_hugging_face_folder(family: str, tmp_path: Path) -> None:
    encoder = build_encoder(family, tmp_path, BARELY)  # type: ignore[arg-type]
    written = (encoder.model / "model.safetensors").stat().st_mtime_ns
    again = build_encoder(family, tmp_path, BARELY)  # type: ignore[arg-type]
    assert again == encoder and (again.model / "model.safetensors").stat().st_mtime_ns == written
    assert build_encoder(family, tmp_path, replace(BARELY, seed=1)).model != encoder.model  # type: ignore[arg-type]
    model, loading = AutoModelForMaskedLM.from_pretrained(encoder.model, output_loading_info=True)
    assert not loading["missing_keys"] and model.dtype == torch.float32
    assert model.config.model_type == {"roberta": "roberta", "deberta": "deberta-v2"}[family]
    tokenizer = AutoTokenizer.from_pretrained(encoder.model)
    text = json.loads((encoder.data / "sentences.jsonl").read_text().splitlines()[0])["text"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == text.split()
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert ("token_type_ids" in tokenizer("a", "b")) == (family == "deberta")
    assert model(**tokenizer([text], return_tensors="pt")).logits.shape[-1] == len(tokenizer)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_they_have_learnt_to_fill_in_masked_tokens(family: str) -> None:
    encoder = build_encoder(family)  # type: ignore[arg-type]
    assert encoder.info["masked_accuracy"] > 0.5
    assert encoder.info["counts"]["parameters"] < 1_000_000
