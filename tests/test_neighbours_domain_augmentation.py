"""Guards of kdnb.neighbours.domain_augmentation. Oracles: scipy integration and optimisation."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize

from kdnb.core import make_rng
from kdnb.neighbours import domain_augmentation as D
from kdnb.neighbours.common import fit_logistic


def density(x, domain):
    at = {"source": -1.0, "target": 1.5, "beyond": 3.2, "opposite": -3.5}[domain]
    return math.exp(-0.5 * ((x - at) / 0.7) ** 2) / (0.7 * math.sqrt(2 * math.pi))


def truth(x):
    return 1 / (1 + math.exp(-(2.5 * math.sin(1.6 * x + 0.3) + 0.3 * x)))


@pytest.mark.parametrize("domain", ["source", "target", "beyond", "opposite"])
def test_ruler_of_a_domain_against_quadrature(domain):
    found = D.measure_on(lambda x: 0.5 * x - 0.2, domain)

    def p(x):
        return 1 / (1 + math.exp(-(0.5 * x - 0.2)))

    recall = quad(lambda x: density(x, domain) * (truth(x) * math.log(p(x)) + (1 - truth(x)) * math.log(1 - p(x))), -8, 8, limit=200)[0]
    precision = quad(lambda x: density(x, domain) * (p(x) * math.log(truth(x)) + (1 - p(x)) * math.log(1 - truth(x))), -8, 8, limit=200)[0]
    np.testing.assert_allclose([found.recall, found.precision], [recall, precision], atol=1e-8)


def test_mixing_path_against_scipy_and_monotone():
    alphas = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    found = D.mixing_path(alphas, lambda x: torch.sigmoid(D.true_log_odds(x)))

    def loss(c, domain):
        return quad(lambda x: density(x, domain) * (np.logaddexp(0, c[0] + c[1] * x) - truth(x) * (c[0] + c[1] * x)), -6, 7, limit=200)[0]

    c = minimize(lambda c: 0.7 * loss(c, "source") + 0.3 * loss(c, "target"), np.zeros(2), tol=1e-8).x
    np.testing.assert_allclose([found["source"][1], found["target"][1]], [loss(c, "source"), loss(c, "target")], atol=1e-6)
    np.testing.assert_allclose(found["target"], found["true target"], atol=1e-12)
    fine = D.mixing_path(torch.linspace(0, 1, 41, dtype=torch.float64), lambda x: torch.sigmoid(x))
    assert (fine["target"].diff() <= 1e-9).all()
    assert (fine["source"].diff() >= -1e-9).all()


def test_a_wrong_teacher_lets_the_true_loss_rise():
    path = D.mixing_path(torch.tensor([0.0, 1.0], dtype=torch.float64), lambda x: torch.where(x > 0.5, 0.05, torch.sigmoid(D.true_log_odds(x))))
    assert path["target"][1] < path["target"][0]
    assert path["true target"][1] > path["true target"][0]


def test_ensemble_is_the_mean_of_single_fits():
    rng = make_rng(1)
    x = torch.randn(2, 50, generator=rng, dtype=torch.float64)
    y = (x > 0).double()
    teacher = D.fit_teacher(x, y, make_rng(2))
    w = torch.poisson(torch.ones(D.MEMBERS, 2, 50, dtype=torch.float64), generator=make_rng(2)) / 50
    alone = [torch.sigmoid(D.bumps(x[1]) @ fit_logistic(D.bumps(x[1]), y[1], w[m, 1], ridge=1e-3)) for m in range(D.MEMBERS)]
    np.testing.assert_allclose(D.ensemble_labels(teacher, x)[1], torch.stack(alone).mean(0), atol=1e-6)
    far = D.bumps(torch.tensor([50.0], dtype=torch.float64))
    assert far[0, 0] == 1
    assert far[0, 1:].abs().max() < 1e-12


def test_upsampling():
    weights = D.upsample_hard(torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), 4.0)
    np.testing.assert_array_equal(weights, [1, 4, 4])


def make_seen(n=80, s=3):
    rng = make_rng(3)
    x, target, source = (D.DOMAINS[d].expand(s).sample(n, rng)[..., 0] for d in ("source", "target", "source"))
    y = (torch.rand(s, n, generator=rng, dtype=torch.float64) < torch.sigmoid(D.true_log_odds(x))).double()
    return D.Seen(x, y, target, source, D.fit_teacher(x, y, rng))


def test_arms():
    seen = make_seen()
    arms = D.train_arms(seen)
    own = D.ensemble_labels(seen.teacher, seen.x)
    np.testing.assert_allclose(arms["DTA"], fit_logistic(D.line(torch.cat([seen.x, seen.target], -1)), torch.cat([own, D.ensemble_labels(seen.teacher, seen.target)], -1)), atol=1e-9)
    sharp = own**2 / (own**2 + (1 - own) ** 2)
    np.testing.assert_allclose(arms["distilled, τ = 0.5"], fit_logistic(D.line(seen.x), sharp), atol=1e-6)
    wrong = ((D.line(seen.x) @ arms["distilled"][..., None])[..., 0] > 0) != (seen.labels > 0.5)
    repeated = [torch.cat([a[0], *[a[0][wrong[0]]] * 2]) for a in (seen.x, own)]  # counting three times is being there three times
    np.testing.assert_allclose(arms["DMU"][0], fit_logistic(D.line(repeated[0]), repeated[1]), atol=1e-6)
    assert len(arms) == 10


def test_pairs_are_what_their_labels_say():
    rng = make_rng(4)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=rng))]

    labels = []
    for _ in range(300):
        premise, hypothesis, label = D.animal_pair(pick)
        words, said = premise.rstrip(".").split(), hypothesis.rstrip(".").split()
        assert label == (said[2] == words[2] and "never" not in said)
        labels.append(label)
        premise, hypothesis, label = D.person_pair(pick)
        _, a, v, _, b = premise.rstrip(".").split()
        active, passive = [("The", a, v), ("The", b, v)], [("The", b, "was", v, "by", "the", a), ("The", a, "was", v, "by", "the", b)]
        said = tuple(hypothesis.rstrip(".").split())
        assert label == (said[:3] == active[0] or said == passive[0])
        assert said[:3] in active or said in passive
    assert 90 < sum(labels) < 210
    assert D.shallow("The dog ran home.", "The cat never ran.") == [1.0, 0.5, 0.0, 1.0]
