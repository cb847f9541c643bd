"""Guards of kdnb.neighbours.common. Oracles: chains of two symbols, scipy.optimize, scikit-learn, plain sampling, scores of whole sequences."""

import re

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from kdnb.chain import MarkovChain, exact_entropy, exact_kl, exact_precision, exact_recall
from kdnb.core import Estimate, Ruler, combine, difference, estimate, make_rng
from kdnb.em import fit_em
from kdnb.exact import exact_measure
from kdnb.lm import Tokens, toy_lm
from kdnb.mixture import Mixture
from kdnb.neighbours import common as C
from kdnb.scoring import score_lm
from kdnb.store import Run, read_metrics


def tables(*shape, seed=0):
    p = torch.rand(*shape, generator=make_rng(seed, "tables"), dtype=torch.float64)
    return (p / p.sum(-1, keepdim=True)).log()


def test_against_chains():
    student, truth = tables(5, 3, 3, seed=1), tables(5, 3, 3, seed=2)
    initial = tables(5, 3, seed=3).exp()
    found = C.conditional_ruler(student, truth, initial)
    p, q = (MarkovChain(initial, t.exp(), 2) for t in (student, truth))
    alone = torch.special.entr(initial).sum(-1)
    expected = [exact_precision(p, q, "sequence") + alone, exact_recall(p, q, "sequence") + alone, exact_entropy(p, "sequence") - alone, exact_entropy(q, "sequence") - alone,
                exact_kl(p, q, "sequence"), exact_kl(q, p, "sequence")]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_against_sampling():
    "Two labels per input by ancestral sampling: within five standard errors (false alarm below 1e-6)."
    student, truth = tables(50_000, 3, seed=4), tables(50_000, 3, seed=5)
    found = C.conditional_ruler(student, truth)
    for value, p, q in ((found.precision, student, truth), (found.recall, truth, student)):
        labels = torch.multinomial(p.exp(), 2, replacement=True, generator=make_rng(6))
        scores = q.gather(-1, labels).mean(-1)
        assert abs(value - scores.mean()) < 5 * scores.std() / len(scores) ** 0.5


def test_a_class_of_probability_zero():
    sure = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    half = torch.full((1, 2), 0.5, dtype=torch.float64).log()
    found = C.conditional_ruler(half, sure)
    assert found.precision == -torch.inf
    np.testing.assert_allclose(found.recall, np.log(0.5))
    assert found.truth_entropy == 0
    with pytest.raises(ValueError, match=re.escape("truth must hold log-probabilities that sum to 1 over the last axis, got 0.5")):
        C.conditional_ruler(half, half + np.log(0.5))
    with pytest.raises(ValueError, match=re.escape("student must hold log-probabilities that sum to 1 over the last axis, got nan")):
        C.conditional_ruler(half * torch.nan, half)


def test_sharpen_labels():
    p = tables(7, 4)
    for tau in (0.3, 1.0, 2.0):
        power = p.exp().numpy() ** (1 / tau)
        np.testing.assert_allclose(C.sharpen_labels(p, tau).exp(), power / power.sum(-1, keepdims=True), rtol=1e-12)
    with pytest.raises(ValueError, match=re.escape("tau must be > 0, got nan")):
        C.sharpen_labels(p, float("nan"))


def test_two_classes_far_out():
    z = torch.tensor([-800.0, 0.0, 800.0], dtype=torch.float64)
    np.testing.assert_allclose(C.two_classes(z), [[0.0, -800.0], [np.log(0.5)] * 2, [-800.0, 0.0]], atol=1e-12)


def problem(n=60, f=3, seed=0):
    rng = make_rng(seed, "problem")
    x = 2 * torch.randn(n, f, generator=rng, dtype=torch.float64)
    return x, torch.rand(n, generator=rng, dtype=torch.float64), torch.rand(n, generator=rng, dtype=torch.float64)


def test_fit_logistic_against_scipy_and_in_a_batch():
    x, y, w = problem()
    xb, yb, wb = (torch.stack([a, b]) for a, b in zip(problem(seed=0), problem(seed=1), strict=True))

    def loss(c):
        z = x.numpy() @ c
        return (w.numpy() * (np.logaddexp(0, z) - y.numpy() * z)).sum() + 0.005 * c @ c

    found = C.fit_logistic(x, y, w, ridge=0.01)
    np.testing.assert_allclose(found, minimize(loss, np.zeros(3), tol=1e-12).x, atol=1e-5)
    np.testing.assert_allclose(C.fit_logistic(xb, yb, wb, ridge=0.01)[0], found, atol=1e-10)


def test_fit_logistic_on_separable_hard_labels():
    x, _, _ = problem(n=100)
    y = (x[:, 0] > 0).double()
    found = C.fit_logistic(x, y, ridge=1e-6)
    theirs = LogisticRegression(C=1 / (100 * 1e-6), fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy()).coef_[0]
    np.testing.assert_allclose(found, theirs, rtol=1e-3)
    with pytest.raises(ValueError, match=re.escape("ridge must be > 0, got 0.0; separable labels have no finite fit")):
        C.fit_logistic(x, y, ridge=0.0)
    with pytest.raises(ValueError, match=re.escape("labels must be between 0 and 1, got nan")):
        C.fit_logistic(x, y * torch.nan)


def test_minimise_against_newton():
    x, y, w = problem()
    coef = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def loss():
        return (w * (torch.nn.functional.softplus(x @ coef) - y * (x @ coef))).sum() + 0.005 * coef.square().sum()

    C.minimise([coef], loss, 1000, 0.1)
    np.testing.assert_allclose(coef.detach(), C.fit_logistic(x, y, w, ridge=0.01), atol=1e-5)
    still = coef.detach().clone()
    C.minimise([coef], loss, 1, 1e-9)
    np.testing.assert_allclose(coef.detach(), still, atol=1e-8)


def test_labels_of_tokens_and_of_embeddings_against_scores():
    "Prompts of different lengths; those of one length also by their embeddings, in batches."
    lm = toy_lm(0, vocab_size=5)
    prompts = [[0, 1, 2], [0, 3], [0, 4], [0, 2, 2]]
    found = C.next_label(lm, prompts, [1, 3])
    for prompt, row in zip(prompts, found, strict=True):
        by_score = [score_lm(lm, Tokens(torch.tensor([[*prompt[1:], word]]), torch.tensor([len(prompt)])))[0, -1].double() for word in (1, 3)]
        np.testing.assert_allclose(row, torch.stack(by_score).log_softmax(-1), atol=1e-5)  # single precision
    ids = torch.cat([torch.zeros(7, 1, dtype=torch.int64), torch.randint(5, (7, 3), generator=make_rng(26))], -1)
    embedded = lm.model.get_input_embeddings()(ids).detach().double()
    scores = torch.stack([score_lm(lm, Tokens(torch.cat([ids[:, 1:], torch.full((7, 1), word)], -1), torch.full((7,), 4)))[:, -1].double() for word in (1, 3)], -1)
    np.testing.assert_allclose(C.embedded_label(lm, embedded, [1, 3], batch_size=3), scores.log_softmax(-1), atol=1e-5)


def ruler(p, r):
    return C.Place(*(torch.tensor(v, dtype=torch.float64) for v in (p, r)))


@pytest.mark.parametrize(("dp", "dr", "words"), [
    (1, 1, "gain on both"), (-1, -1, "loss on both"), (1, -1, "trade-off: precision for recall"), (-1, 1, "trade-off: recall for precision"),
    (0, 0, "cannot tell"), (1, 0, "gain of precision alone"), (0, -1, "loss of recall alone"), (-1, 0, "loss of precision alone"), (0, 1, "gain of recall alone"),
])
def test_movement_in_words(dp, dr, words):
    noise = np.array([-0.1, 0.1, -0.05, 0.05])
    direct = ruler(noise * 3, noise)
    record = C.movement("a", 2.0, ruler(noise * 4 + dp, noise * 2 + dr), direct)
    assert C.verdict_of(record) == words
    np.testing.assert_allclose(record["d_recall"].mean, dr, atol=1e-12)
    frame = C.movement_frame([record], change=True)
    assert frame.precision[0] == record["d_precision"].mean
    assert frame.recall_hi[0] == record["d_recall"].hi
    table = C.movement_table([C.movement("direct", "", direct, direct), record])
    assert list(table.columns) == ["arm", "knob", "precision", "Δ precision", "recall", "Δ recall", "movement"]
    assert list(table.movement) == ["", words]


@pytest.mark.parametrize(("verdicts", "word"), [
    (["held", "held"], "holds"), (["held", "cannot tell"], "cannot tell"), (["cannot tell"], "cannot tell"), (["held", "did not hold"], "fails"), (["cannot tell", "did not hold"], "fails"),
])
def test_outcome(verdicts, word):
    assert C.outcome(v for v in verdicts) == word


def test_sampled_students_move_as_their_paired_differences():
    "Against `kdnb.core.combine` and `difference`, which know seeds as Estimates."
    rng = make_rng(27)
    rulers = [[Ruler(*(estimate(torch.randn(50, generator=rng)) for _ in Ruler._fields)) for _ in range(3)] for _ in range(2)]
    record = C.movement("a", "", *(C.place_of(some) for some in rulers))
    for part in ("precision", "recall"):
        ours, direct = ([getattr(r, part) for r in some] for some in rulers)
        np.testing.assert_allclose(record[part], combine(ours), rtol=1e-12)
        np.testing.assert_allclose(record[f"d_{part}"], difference(ours, direct), rtol=1e-12)


def test_findings_are_read_as_they_were_written(tmp_path):
    direct, far = ruler([-1.0, -1.1], [-2.0, -2.1]), ruler([-0.5, -0.6], [-2.0, -2.2])
    movements = [C.movement("direct", "", direct, direct), C.movement("method", 0.5, far, direct)]
    claims = C.judge({"more precise": movements[1]["d_precision"]})
    verdict = C.Verdict("method", "knob", "needs", "exact", C.outcome(c["verdict"] for c in claims), "sentence")
    C.write_findings(Run({"n": 2}, tmp_path, "test"), 2, {"own": movements[1]["recall"]}, movements, movements[:1], claims, {"gain": movements[1]["d_precision"]}, verdict)
    found = read_metrics(tmp_path)
    assert found["estimates"] == {"movement": movements, "common": movements[:1], "own": movements[1]["recall"]}
    assert isinstance(found["estimates"]["movement"][1]["d_recall"], Estimate)
    assert found["claims"] == [{"claim": "more precise", "verdict": "held", "evidence": movements[1]["d_precision"]}]
    assert (found["verdict"], found["seeds"]) == (verdict._asdict(), [0, 1])
    assert found["headline"][0]["label"] == "gain"


def test_common_world_is_that_of_the_experiment():
    "By hand, stream by stream, as in experiments/gmm.ipynb."
    world = C.common_world(3, seed=5)
    rng = make_rng(5, "draws")
    x = world.truth.expand(3).sample(100, rng)
    torch.testing.assert_close(world.x, x, rtol=0, atol=0)
    teacher = fit_em(x, 4, rng=make_rng(5, "starts"), n_init=10).mixture
    torch.testing.assert_close(world.teacher.means, teacher.means, rtol=0, atol=0)
    torch.testing.assert_close(world.draws, teacher.sample(1000, rng), rtol=1e-9, atol=1e-9)  # sharpening by β = 1 rounds the weights
    for student, points in ((world.direct, x), (world.plain, world.draws)):
        np.testing.assert_allclose(student.means[:, 0], points.mean(1), atol=1e-12)
        np.testing.assert_allclose(student.covs[:, 0], points.var(1, correction=0), rtol=1e-9)
    assert (exact_measure(world.direct, world.truth, 1e-6).precision < -6).all()


def test_common_movements_against_a_sum_over_a_grid():
    "A student of one wide Gaussian: both numbers by brute force, and the direct student first."
    world = C.common_world(2, seed=5)
    wide = Mixture([[1.0]] * 2, [[[0.1, 0.0]], [[0.0, -0.2]]], [[[1.0, 0.8]]] * 2)
    axis = np.linspace(-7, 7, 561)
    mesh = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    p, q = (m.log_prob(mesh) for m in (world.truth, wide))
    cell = (axis[1] - axis[0]) ** 2
    start, moved = C.common_movements({("wide", 1): wide}, world)
    np.testing.assert_allclose(moved["precision"].mean, (np.exp(q) * p).sum(-1).mean() * cell, atol=1e-4)
    np.testing.assert_allclose(moved["recall"].mean, (np.exp(p) * q).sum(-1).mean() * cell, atol=1e-4)
    assert (start["arm"], start["knob"], start["d_recall"].mean) == ("direct", "", 0)
    assert C.common_movements({}, world, wide)[0]["precision"] == moved["precision"]
